"""Faults of adapters."""

from collections.abc import Iterator
from typing import Any

from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import fault, find, override


def adapted(subject: Subject) -> Iterator[Any]:
    for path, *_ in subject.spec.adapter.linears:  # type: ignore[attr-defined]
        yield find(subject.model.lm, path)


@fault("adapter_scale", where="q_proj", case="adapters")
def multiplied_by_alpha(subject: Subject) -> None:
    """The change is multiplied by alpha instead of alpha / r, as where PEFT's alpha goes into mlx-lm's scale."""
    for module in adapted(subject):
        module.scale = subject.spec.adapter.alpha  # type: ignore[attr-defined]


@fault("adapter_scale", where="q_proj", case="adapters")
def one_adapter_with_another_alpha(subject: Subject) -> None:
    """One layer keeps the default alpha of the library."""
    *_, last = adapted(subject)
    last.scale = 20.0


@fault("adapter_not_applied", where="o_proj", case="adapters")
def adapter_not_called(subject: Subject) -> None:
    """A fused attention takes the base's output projection past the wrapper."""
    module = subject.model.lm.model.layers[0].self_attn.o_proj
    override(module, lambda _, x: module.base_layer(x))


@fault("adapters_swapped", where="q_proj", case="adapters")
def b_of_another_layer(subject: Subject) -> None:
    """Two layers of one shape use each other's B."""
    attention = subject.model.lm.model.layers[0].self_attn
    q, o = attention.q_proj.lora_B, attention.o_proj.lora_B
    override(q, lambda _, x: x @ o.weight.T)
    override(o, lambda _, x: x @ q.weight.T)


@fault("adapters_swapped", where="o_proj", case="adapters")
def a_loaded_under_another_name(subject: Subject) -> None:
    """The loader sorts layers in another order than the writer did."""
    names = [f"lm.model.layers.0.self_attn.{end}.lora_A.weight" for end in ("q_proj", "o_proj")]

    def load(original: Any, model: Any, arrays: Any) -> None:
        original(model, arrays | {names[0]: arrays[names[1]], names[1]: arrays[names[0]]})

    override(subject.backend, load, "load")
