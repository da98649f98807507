"""One of two processes that share out a model (test_sharding.py): all that a backend does is as with one process."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlx_training import backend as backends
from mlx_training.backend import Arrays, HeadChunks, Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec
from torch_backend.sharding import own

SPEC = DecoderSpec(61, 16, 24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, context_length=16)
OPTIM = Optim(weight_decay=0.1, grad_clip_norm=0.5, ema_decay=0.5)


class Found(NamedTuple):
    """What came of three steps."""

    metrics: list[dict[str, float]]
    probe: dict[str, dict[str, float]]
    logits: list[np.ndarray]  # of generation
    held: tuple[int, int]  # elements of parameters and of optimiser state
    parameters: Arrays  # averaged
    state: Arrays
    gradients: Arrays


def batch(rng: np.random.Generator, mask: float) -> Batch:
    """Three rows; where the mask is 0 they do not count."""
    tokens, targets = rng.integers(0, SPEC.vocab_size, (2, 3, 12), dtype=np.int32)
    return Batch(tokens, targets, np.full((3, 12), mask, np.float32), np.full(3, 12, np.int32), rows=(0, 1, 2))


def trained(group: Any, batches: list[Batch]) -> Found:
    """Three steps; with a group each process takes the batch of its rank. Logits come in chunks."""
    backend: Any = backends.get("torch", Runtime(device="cpu", shard=group is not None))
    backend.group = group or backend.group
    model = backend.build(SPEC)
    model.head_chunks = HeadChunks(4, 4)  # what a chunk computes again needs the head whole again
    prompts = replace(batches[0], lengths=np.array([12, 7, 9], np.int32))
    backend.session(model).prefill(prompts)  # before anything else has used the model
    backend.load(model, initialise(SPEC, 0))
    step = backend.make_step(model, lm, OPTIM, seed=0)
    mine = [batches[group.rank]] if group else batches
    rates = dict.fromkeys(SPEC.groups, 1e-2)
    metrics = [step(mine, step=i, lr=rates, probe=i == 3) for i in (1, 2, 3)]
    probe = metrics[2].pop("probe")
    session = backend.session(model)
    logits = [session.prefill(prompts), session.extend(np.array([1, 2, 3]))]
    state = [array for arrays in step.state.values() for array in arrays.values()]
    held = sum(own(p).numel() for p in model.parameters()), sum(array.numel() for array in state)
    raw, gradients = backend.export(model), backend.gradients(model, lm, batches[0])
    with step.averaged():
        parameters = backend.export(model)
    again = backend.export(model)
    assert all((again[name] == array).all() and (parameters[name] != array).any() for name, array in raw.items())
    figures = [{name: float(value) for name, value in found.items()} for found in metrics]
    return Found(figures, probe, logits, held, parameters, step.export(), gradients)


def expect_near(found: Any, expected: Any, what: object) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6, err_msg=str(what))


def main() -> None:
    """Compare, and say which shares of parameters and optimiser state this process holds."""
    rng = np.random.default_rng(0)
    batches = [batch(rng, 1), batch(rng, 0)]  # the second process has nothing that counts
    group: Any = backends.get("torch").group
    group.join()
    two, one = trained(group, batches), trained(None, batches)
    for i, expected in enumerate(one.metrics):
        for name, value in expected.items():
            expect_near(two.metrics[i][name], value, (i, name))
    for name, figures in one.probe.items():
        for key, value in figures.items():
            expect_near(two.probe[name][key], value, (name, key))
    for found, logits in zip(two.logits, one.logits, strict=True):
        expect_near(found, logits, "logits")
    assert set(two.parameters) == (set(one.parameters) if group.rank == 0 else set())
    for name, array in two.parameters.items():
        expect_near(array, one.parameters[name], name)
    for name, array in two.state.items():
        expect_near(array, one.state[name], name)
    for name, array in two.gradients.items():
        expect_near(array, 2 * one.gradients[name], name)  # both have given the same rows
    print(f"held by {group.rank}:", *(a / b for a, b in zip(two.held, one.held, strict=True)), flush=True)
    group.leave()


if __name__ == "__main__":
    main()
