"""The definitions of the optimisers, in NumPy, against the implementations that they are named after."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_training.diagnostics.optimizers import orthogonal, updated
from mlx_training.optim import Optim
from mlx_training.spec import Param

SHAPE, RATE, STEPS = (6, 10), 0.05, 4


def course(optim: Optim, param: Param) -> list[np.ndarray]:
    """Four steps down a bowl that is steeper along some axes than along others."""
    p, slopes = start(param.shape)
    state = {key: np.zeros(shape) for key, shape in optim.state(param).items()}
    seen = []
    for t in range(1, STEPS + 1):
        p, state = updated(optim, param, p, slopes * p, state, t, RATE)
        seen.append(p)
    return seen


def start(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape), rng.uniform(0.01, 3.0, shape)


def torch_course(make: Callable[[list[Any]], Any], shape: tuple[int, ...] = SHAPE) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    p, slopes = (torch.tensor(array) for array in start(shape))
    p.requires_grad_()
    optimizer, seen = make([p]), []
    for _ in range(STEPS):
        p.grad = (slopes * p).detach()
        optimizer.step()
        seen.append(p.detach().numpy().copy())
    return seen


TORCH: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Adam", {"name": "adam", "betas": (0.8, 0.9), "eps": 1e-2}, {"betas": (0.8, 0.9), "eps": 1e-2}),
    ("AdamW", {"name": "adamw", "betas": (0.8, 0.9), "eps": 1e-2}, {"betas": (0.8, 0.9), "eps": 1e-2}),
    ("SGD", {"name": "sgd"}, {}),
    ("SGD", {"name": "sgd", "momentum": 0.9}, {"momentum": 0.9}),
    ("SGD", {"name": "sgd", "momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {"name": "adagrad", "eps": 1e-2}, {"eps": 1e-2}),
    ("RMSprop", {"name": "rmsprop", "alpha": 0.9, "eps": 1e-2}, {"alpha": 0.9, "eps": 1e-2}),
    ("RMSprop", {"name": "rmsprop", "momentum": 0.5}, {"alpha": 0.99, "momentum": 0.5}),
]


@pytest.mark.parametrize("case", TORCH, ids=lambda case: "-".join(map(str, case[1].values())))
def test_pytorch_s(case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    torch = pytest.importorskip("torch")
    name, ours, theirs = case
    made = torch_course(lambda p: getattr(torch.optim, name)(p, lr=RATE, weight_decay=0.1, **theirs))
    np.testing.assert_allclose(course(Optim(weight_decay=0.1, **ours), Param(SHAPE, "zeros")), made, rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 10), (7,), (3, 4, 5)], ids=str)
def test_transformers_adafactor(shape: tuple[int, ...]) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    made = torch_course(
        lambda p: optimization.Adafactor(p, lr=RATE, weight_decay=0.1, relative_step=False, scale_parameter=False),
        shape,
    )
    ours = course(Optim("adafactor", eps=1e-30, weight_decay=0.1), Param(shape, "zeros"))
    np.testing.assert_allclose(ours, made, rtol=1e-7)


def test_mlx_lion() -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx.optimizers import Lion

    p, slopes = start(SHAPE)
    optimizer, theirs = Lion(RATE, betas=[0.9, 0.99], weight_decay=0.1), {"p": mx.array(p)}
    for ours in course(Optim("lion", betas=(0.9, 0.99), weight_decay=0.1), Param(SHAPE, "zeros")):
        theirs = optimizer.apply_gradients({"p": mx.array(slopes) * theirs["p"]}, theirs)
        np.testing.assert_allclose(ours, np.array(theirs["p"]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)], ids=str)
def test_pytorch_muon(shape: tuple[int, ...]) -> None:
    """Whose Newton-Schulz steps are bfloat16."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    settings: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    made = torch_course(lambda p: torch.optim.Muon(p, lr=RATE, adjust_lr_fn="match_rms_adamw", **settings), shape)
    ours = course(Optim("muon", **settings), Param(shape, "zeros", hidden=True))
    np.testing.assert_allclose(ours, made, atol=2e-3)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (3, 12, 20)], ids=str)
def test_muon_s_matrices(shape: tuple[int, ...]) -> None:
    """Singular values near 1, the same directions; a stack is orthogonalised matrix by matrix; zero stays zero."""
    x = np.random.default_rng(1).standard_normal(shape)
    y = orthogonal(x)
    assert ((values := np.linalg.svd(y, compute_uv=False)) > 0.6).all() and (values < 1.25).all()
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    inner = np.swapaxes(u, -1, -2) @ y @ np.swapaxes(vt, -1, -2)
    np.testing.assert_allclose(inner, inner * np.eye(inner.shape[-1]), atol=1e-9)
    if len(shape) == 3:
        np.testing.assert_allclose(y[1], orthogonal(x[1]))
    assert not orthogonal(0 * x).any()
    update, _ = updated(Optim("muon"), Param(shape, "zeros", hidden=True), 0 * x, x, {"m": 0 * x}, 1, 1.0)
    assert 0.15 < np.sqrt(np.mean(update**2)) < 0.25  # as large as a step of AdamW usually is


def test_muon_leaves_other_parameters_to_adamw() -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.9), "weight_decay": 0.1, "momentum": 0.95, "muon_lr_factor": 7.0}
    muon, table = Optim("muon", **settings), Param(SHAPE, "zeros")
    np.testing.assert_array_equal(course(muon, table), course(Optim(betas=(0.8, 0.9), weight_decay=0.1), table))
    hidden = Param(SHAPE, "zeros", hidden=True)
    once = course(Optim("muon", **settings | {"muon_lr_factor": 1.0}), hidden)[0] - start(SHAPE)[0]
    np.testing.assert_allclose(course(muon, hidden)[0] - start(SHAPE)[0], 7 * once)
