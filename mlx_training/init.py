"""Initial values of a spec's parameters, drawn in NumPy so that both backends start from the same numbers."""

import hashlib

import numpy as np

from mlx_training.spec import Param, Spec


def initialise(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Draw every parameter of the table, float32, canonical names.

    Each parameter has its own stream, seeded by (seed, name): adding or renaming one leaves the others alone.
    Parameters with init "pretrained" are left out; the backend fills them from the frozen model.
    """
    return {name: _draw(p, seed, name) for name, p in spec.params().items() if p.init != "pretrained"}


def _draw(param: Param, seed: int, name: str) -> np.ndarray:
    if param.init in ("zeros", "ones"):
        return np.full(param.shape, param.init == "ones", dtype=np.float32)
    if param.init in ("counts", "log_counts"):
        counts = np.arange(param.shape[-1])
        row = param.scale * counts if param.init == "counts" else np.log1p(counts)
        return np.broadcast_to(row, param.shape).astype(np.float32)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    if param.init == "normal":
        return (param.scale * rng.standard_normal(param.shape)).astype(np.float32)
    if param.init == "time_steps":  # Mamba's: the inverse of softplus, log(exp(t) - 1)
        steps = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), param.shape))
        return (steps + np.log(-np.expm1(-steps))).astype(np.float32)
    assert param.init == "uniform", f"no rule for init {param.init!r} of {name}"
    return rng.uniform(-param.scale, param.scale, param.shape).astype(np.float32)
