"""Notes: what a configuration may say and hardly means. Found before anything is built; none of it is an error."""

from collections.abc import Iterator

from mlx_training.config_model import LanguageConfig, ModelConfig
from mlx_training.spec import AdapterSpec, DecoderSpec, PretrainedSpec, Spec, SSMSpec


def notes(model: ModelConfig, spec: Spec, tokenizer_size: int | None = None) -> list[str]:
    """One sentence each. Without `tokenizer_size` (the ids that it really has) nothing is said of the tokenizer."""
    found: list[str] = []
    if isinstance(spec, DecoderSpec | SSMSpec):
        found += _reach(spec, f"model.{model.family}")
    if isinstance(spec, PretrainedSpec) and spec.adapter is not None:
        found += _ranks(spec.adapter)
    if isinstance(model, LanguageConfig) and tokenizer_size is not None:
        found += _vocabulary(model, tokenizer_size)
    return found


def _reach(spec: DecoderSpec | SSMSpec, section: str) -> Iterator[str]:
    """Sparse attention whose pattern does not fit into a training window."""
    most, causal = spec.context_length, "in training such a layer is causal"
    reaches = {"local": ("window", spec.window, causal)}
    if isinstance(spec, DecoderSpec):
        reaches["strided"] = ("stride", spec.stride, "in training such a layer sees its own token alone")
        reaches["fixed"] = ("fixed.local_context", spec.fixed.local_context, causal)
    for mixer, (key, reach, what) in reaches.items():
        if mixer in spec.mixers and reach >= most:
            yield f"{section}.{key} {reach}: not below context_length {most}, so that {what}; lower it to mean anything"


def _ranks(adapter: AdapterSpec) -> Iterator[str]:
    """Adapters of a higher rank than any change of their matrix can have."""
    small = {path: min(sides) for path, *sides in adapter.linears if min(sides) < adapter.rank}
    if small:
        path = min(small, key=lambda name: small[name])
        yield (
            f"model.lora.rank {adapter.rank}: {len(small)} of {len(adapter.linears)} matrices have a smaller side than "
            f"that, {path} {small[path]}; more than {small[path]} changes nothing there"
        )


def _vocabulary(model: LanguageConfig, size: int) -> Iterator[str]:
    """A tokenizer for which the text was too small."""
    wanted = model.tokenizer
    if not isinstance(wanted, str) and wanted.train is not None and size < wanted.train:
        yield f"model.tokenizer.train {wanted.train}: the training text has merges for {size} ids only"
