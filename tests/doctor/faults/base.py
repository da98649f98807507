"""What a fault is, and the few ways of planting one that work on both frameworks."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from mlx_training.assemble import RowData
from mlx_training.config import RunConfig
from mlx_training.data.batch import Batch
from mlx_training.data.prompt import PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.diagnostics.causes import CAUSES
from mlx_training.diagnostics.subject import Subject, from_config

Plant = Callable[[Any], Any]  # mutates a subject (or a run directory) or returns another in its place


@dataclass(frozen=True)
class Fault:
    """One planted fault and what a doctor should say about it.

    `causes`: ids of CAUSES, the planted one first; a second only where it is another name for the same thing.
    `where`: a substring of one of the places that are named. `level` "full": only slow checks can see it.
    """

    name: str
    story: str
    causes: tuple[str, ...]
    plant: Plant
    where: str = ""
    backends: tuple[str, ...] = ("mlx", "torch")
    case: str = "timeseries"
    level: Literal["quick", "full"] = "quick"


@dataclass(frozen=True)
class Lookalike:
    """Something unusual that is not a fault; `case` as for Fault."""

    name: str
    story: str
    plant: Plant
    case: str = "timeseries"


FAULTS: list[Fault] = []
LOOKALIKES: list[Lookalike] = []


def fault_into(faults: list[Fault]) -> Callable[..., Callable[[Plant], Plant]]:
    """A decorator `fault(*causes, **fields)` for functions whose name and docstring are a fault's name and story."""

    def fault(*causes: str, **fields: Any) -> Callable[[Plant], Plant]:
        def register(plant: Plant) -> Plant:
            assert causes and set(causes) <= set(CAUSES), causes
            assert all(plant.__name__ != known.name for known in faults), plant.__name__
            faults.append(Fault(plant.__name__, plant.__doc__ or "", causes, plant, **fields))
            return plant

        return register

    return fault


def lookalike_into(lookalikes: list[Lookalike]) -> Callable[..., Any]:
    """A decorator for look-alikes, bare or with `case`."""

    def lookalike(plant: Plant | None = None, *, case: str = "timeseries") -> Any:
        if plant is None:
            return partial(lookalike, case=case)
        lookalikes.append(Lookalike(plant.__name__, plant.__doc__ or "", plant, case))
        return plant

    return lookalike


fault, lookalike = fault_into(FAULTS), lookalike_into(LOOKALIKES)


def framework(x: Any) -> Any:
    """The module that an array (or a model) belongs to: `mlx.core` or `torch`."""
    types = (kind.__module__.split(".")[0] for kind in type(x).__mro__)
    return importlib.import_module("torch" if "torch" in types else "mlx.core")


def is_torch(x: Any) -> bool:
    """Whether an array or a model is PyTorch's."""
    return framework(x).__name__ == "torch"


def stop(x: Any) -> Any:
    """The same values without gradient."""
    return x.detach() if is_torch(x) else framework(x).stop_gradient(x)


def relu(x: Any) -> Any:
    """max(x, 0)."""
    return framework(x).where(x > 0, x, x * 0)


def take(x: Any, index: Any, axis: int) -> Any:
    """`np.take_along_axis`, the index broadcast."""
    f = framework(x)
    return f.take_along_dim(x, index, axis) if is_torch(x) else f.take_along_axis(x, index, axis)


def cast(x: Any, dtype: str) -> Any:
    """To a type by its name."""
    return x.to(getattr(framework(x), dtype)) if is_torch(x) else x.astype(getattr(framework(x), dtype))


def find(model: Any, path: str) -> Any:
    """The module at a path such as "encoder.layers.0.norm1"."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def override(thing: Any, call: Callable[..., Any], method: str = "") -> None:
    """`thing.method(*args)` becomes `call(original, *args)`; without a method, calling the module itself.

    The class of this one object is replaced by a subclass of the same name; parameters and paths stay.
    """
    kind = type(thing)
    method = method or ("forward" if is_torch(thing) else "__call__")

    def overridden(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(partial(getattr(kind, method), self), *args, **kwargs)

    _set_class(thing, {method: overridden})


def hide(thing: Any, name: str) -> None:
    """Keep the module `name` of an MLX module under `_name`; `thing.name` still finds it."""
    thing[f"_{name}"] = thing.pop(name)
    _set_class(thing, {name: property(lambda self: self[f"_{name}"])})


def _set_class(thing: Any, members: dict[str, Any]) -> None:
    kind = type(thing)
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    object.__setattr__(thing, "__class__", type(kind.__name__, (kind,), members))


def freeze(module: Any) -> None:
    """No gradients for a module."""
    if is_torch(module):
        module.requires_grad_(False)
    else:
        module.freeze()


def unfreeze(module: Any) -> None:
    """Gradients for a module."""
    if is_torch(module):
        module.requires_grad_(True)
    else:
        module.unfreeze()


def set_parameter(model: Any, name: str, values: np.ndarray) -> None:
    """Put another parameter, of any shape, in the place of `name`."""
    path, _, last = name.rpartition(".")
    f = framework(model)
    setattr(find(model, path), last, f.nn.Parameter(f.tensor(values)) if is_torch(model) else f.array(values))


def change_parameters(subject: Subject, change: Callable[[np.ndarray], np.ndarray], part: str) -> None:
    """Load `change(values)` into every parameter whose name contains `part`."""
    arrays = subject.backend.export(subject.model)
    changed = {name: change(array).astype(np.float32) if part in name else array for name, array in arrays.items()}
    subject.backend.load(subject.model, changed)


def each_batch(subject: Subject, change: Callable[[Batch], Batch]) -> None:
    """Every training batch goes through `change`."""
    original = subject.batch
    subject.batch = lambda index: change(original(index))


def edit(batch: Batch, **arrays: Any) -> Batch:
    """The batch with other arrays, in the types of the old ones where there are such."""
    old = batch.arrays()
    typed: dict[str, Any] = dict(arrays)
    for name, values in arrays.items():
        if name in old and isinstance(values, np.ndarray):
            typed[name] = values.astype(old[name].dtype)
    return replace(batch, **typed)


def with_rows(subject: Subject, **splits: Iterable[Row]) -> None:
    """Other rows in some splits, and training batches of them."""
    assert isinstance(subject.data, RowData)
    _use(subject, replace(subject.data), {**subject.data.splits, **{name: list(rows) for name, rows in splits.items()}})


def with_encoder(subject: Subject, tokenizer: Any = None, **settings: Any) -> None:
    """Rows become tokens by other settings than the configuration's."""
    assert isinstance(subject.data, RowData)
    old = subject.data.encoder
    names = ("layout", "normalize", "stats_in_text", "max_length", "max_patches", "max_series")
    tokenizer = tokenizer or old.tokenizer
    encoder = PromptEncoder(tokenizer, old.patch_size, **({name: getattr(old, name) for name in names} | settings))
    _use(subject, replace(subject.data, encoder=encoder, tokenizer=tokenizer), dict(subject.data.splits))


def _use(subject: Subject, data: RowData, splits: dict[str, Any]) -> None:
    vars(data)["splits"] = splits  # where the cached property keeps what it has read
    subject.data = data
    subject.batch = data.train_batches().batch


def rows_of(subject: Subject, split: str) -> list[Row]:
    """The rows of a split."""
    assert isinstance(subject.data, RowData)
    return list(subject.data.rows(split))


def train_rows(subject: Subject) -> list[Row]:
    """The rows of the training split."""
    return rows_of(subject, "train")


def rebuilt(subject: Subject, changes: Mapping[str, Any]) -> Subject:
    """A new subject of the same configuration with other values at dotted keys."""
    assert subject.config is not None
    data = subject.config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = data
        for name in sections:
            section = section[name]
        section[last] = value
    return from_config(RunConfig.model_validate(data), subject.backend.name)
