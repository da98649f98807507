"""The seam between the shared half and the two backends: protocols, and `get(name)`.

Everything a trainer, an evaluation or a test asks of a framework is here. Arrays cross the seam as NumPy, under
the canonical names of the parameter table.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.errors import BackendError
from mlx_training.objectives import Objective
from mlx_training.optim import Optim as Optim
from mlx_training.spec import PretrainedSpec, Spec

Arrays = dict[str, np.ndarray]
PACKAGES = {"mlx": "mlx_training.mlx_backend", "torch": "torch_backend"}
TIMEOUT = 600  # seconds that processes which train together wait for each other
MAX_LOGITS = 2**26  # that are made at once: a quarter of a gigabyte a copy; more are made in chunks of an eighth of it
MIN_CHUNK = 256  # labels, for which the head's weights are read once
MAX_PATCHES = {"cpu": 2**12, "gpu": 2**16}  # that are encoded at once: what caches hold, and what fills a GPU
PROBE = ("grad_norm", "param_norm", "update_norm", "m_norm", "v_norm", "zeros", "nonfinite")  # figures of a parameter


class Registered(NamedTuple):
    """A parameter as the framework knows it."""

    shape: tuple[int, ...]
    trainable: bool
    finite: bool  # no NaN, no infinity


@dataclass(frozen=True)
class Runtime:
    """How to run, as opposed to what: nothing here changes the mathematics beyond rounding."""

    device: str = "auto"  # auto | cpu | gpu | cuda | mps
    precision: Literal["float32", "bfloat16"] = "float32"  # of the LM's activations; sums and states stay float32
    gradient_checkpointing: bool = False  # activations of a layer are computed again for its backward pass, not kept
    frozen_prefix: Literal["reuse", "compute", "off"] = "reuse"  # what stands before the series has no gradient
    trim_last_layer: bool = True  # a frozen LM's last layer is computed at the places of labels only
    compile: Literal["auto", "on", "off"] = "auto"  # the loss of a step on torch, all of a step on MLX
    shard: bool = False  # a model trained from scratch is shared out over the processes, not copied to each
    chunked_head: bool = True  # where there are many logits, some of them after the other, twice
    chunked_encoder: bool = True  # where there are many patches, some series after the other


class Model(Protocol):
    """What an objective may ask of either realisation."""

    def logprobs(self, batch: Batch) -> Any:
        """log p(target), float32 (B, K); the head is applied at the label places only."""

    def logits(self, batch: Batch) -> Any:
        """Logits of every place, float32 (B, L, V): small vocabularies and tests."""


class Step(Protocol):
    """One optimiser step: gradients over micro-batches, division by the total weight, clipping, update."""

    @property
    def num_compilations(self) -> int:
        """Functions traced for compilation so far; 0 where nothing is compiled."""

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        """Take step number `step` (from 1) with one learning rate per parameter group.

        Returns device scalars {"loss": mean nats, "weight": supervised tokens, "grad_norm": before clipping,
        "skipped": 0 or 1}, of all processes that train together; calling `float` on one waits for the device. When loss
        or gradient norm is not finite the device itself skips the update: parameters, moments and their step count stay
        as they were.

        With `probe` also "probe": {parameter: {figure: float}}, which waits for the device. Figures (PROBE): L2 norms
        of the mean gradient before clipping ("grad_norm"), of the parameter before the update, of the update (decay
        included), and of both moments after it; "zeros", the share of gradient elements that are exactly zero;
        "nonfinite", how many are NaN or infinite. A moment that the optimiser does not have is 0.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """For a while the model has the averages of its weights, where those are kept and a step has been taken."""

    def export(self) -> Arrays:
        """Optimiser state, float32: the arrays of `Optim.state_shapes`, zeros where no step has been taken yet.

        Of a sharded model all processes must call it; process 0 gets the arrays, the others none.
        """

    def load(self, arrays: Arrays) -> None:
        """Take over a state that `export` of either backend returned.

        Where weights are averaged, the model holds the averages by now; it gets back the weights that train.
        """


class Session(Protocol):
    """Incremental decoding with a key/value cache."""

    def prefill(self, batch: Batch) -> np.ndarray:
        """Read the prompts, series included; next-token logits (B, V)."""

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token (B,) to every row; next-token logits (B, V)."""

    def fork(self, rows: Sequence[int]) -> "Session":
        """A session over copies of these rows; this one stays valid."""


class Group(Protocol):
    """The processes that take every step together; one, unless a launcher has started several."""

    rank: int
    size: int

    def join(self) -> None:
        """Meet the other processes of this job, if a launcher started several."""

    def leave(self) -> None:
        """Say good-bye, when there is nothing more to sum."""

    def total(self, array: np.ndarray) -> np.ndarray:
        """An array (float32 or int32) summed over the processes. Raises ProcessLostError."""


class Backend(Protocol):
    """One framework."""

    name: str
    runtime: Runtime
    group: Group

    def build(self, spec: Spec) -> Any:
        """Realise a spec: load and freeze what is pretrained; trainable parameters wait for `load`."""

    def load(self, model: Any, arrays: Arrays) -> None:
        """Set every trainable parameter; names and shapes must match the table exactly (CheckpointError)."""

    def export(self, model: Any) -> Arrays:
        """Every trainable parameter, canonical names, float32.

        Of a sharded model all processes must call it; process 0 gets the arrays, the others none.
        """

    def make_step(self, model: Any, objective: Objective, optim: Optim, *, seed: int) -> Step:
        """An optimiser step over the trainable parameters."""

    def score(self, model: Any, objective: Objective, batch: Batch) -> dict[str, float]:
        """The objective's sums without gradients, dropout off."""

    def score_tokens(self, model: Any, batch: Batch) -> Arrays:
        """Of every label, dropout off: "logprobs", log p(target), float32 (B, K); "hits", boolean (B, K): whether the
        target is the most probable token.
        """

    def parameters(self, model: Any) -> dict[str, Registered]:
        """Everything the framework has registered, frozen weights included, whether the table knows it or not."""

    def gradients(
        self, model: Any, objective: Objective, batch: Batch, *, wrt: Literal["parameters", "inputs"] = "parameters"
    ) -> Arrays:
        """d(loss / weight) / d(parameter) under canonical names, dropout off; zero where nothing depends on it.

        With `wrt="inputs"` {"inputs": (B, L, H)}, with respect to what `model.inputs` returns. Of a sharded model all
        processes must call it, for parameters; process 0 gets the sum over all batches, the others none.
        """

    def activations(self, model: Any, objective: Objective, batch: Batch) -> Arrays:
        """Outputs by module path, in the order in which the modules finish; then "inputs" and "logprobs". Dropout off.

        Only modules that return one array; of a module that runs several times the first output.
        """

    def session(self, model: Any) -> Session:
        """A fresh decoding session."""

    def frozen_hash(self, model: Any) -> str:
        """SHA-256 over the frozen weights as they stand in memory ("" if there are none)."""

    def peak_memory(self) -> int:
        """Peak bytes: of the device where it counts them, else of the process."""


def get(name: str, runtime: Runtime | None = None) -> Backend:
    """The backend "mlx" or "torch"; nothing else imports a backend package.

    Raises BackendError when the name is unknown or the framework cannot be imported.
    """
    if name not in PACKAGES:
        raise BackendError(f"unknown backend {name!r}; expected one of: {', '.join(PACKAGES)}")
    try:
        package = importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise BackendError(
            f"backend {name!r} is not usable here ({error}); install it with: pip install 'mlx-training[{name}]'"
        ) from error
    return package.Backend(runtime or Runtime())


@dataclass(frozen=True)
class HeadChunks:
    """More than `most` labels meet the head in chunks of `size`."""

    most: int
    size: int

    def of(self, num_labels: int) -> int:
        """Labels of a chunk, which are all of them if they are not many."""
        return self.size if num_labels > self.most else num_labels


ALL_AT_ONCE = HeadChunks(sys.maxsize, sys.maxsize)


def head_chunks(spec: Spec) -> HeadChunks:
    """How the labels of a micro-batch are divided. MLX has some ten products under way, so chunks are small."""
    sizes: Any = spec.llm if isinstance(spec, PretrainedSpec) else spec
    most: int = max(1, MAX_LOGITS // sizes.vocab_size)
    return HeadChunks(most, min(most, max(most // 8, MIN_CHUNK)))


@dataclass(frozen=True)
class EncoderChunks:
    """Series are encoded together while they have no more than `most` patches, else in chunks of about equal size."""

    most: int

    def of(self, num_series: int, num_patches: int) -> int:
        """Series of a chunk, each of so many patches: all of them if they are not many, and at least one."""
        if num_series * num_patches <= self.most:
            return num_series
        chunks = -(-num_series * num_patches // self.most)
        return -(-num_series // chunks)


def encoder_chunks(runtime: Runtime) -> EncoderChunks:
    """How the series of a micro-batch are divided; `runtime.device` is resolved."""
    if not runtime.chunked_encoder:
        return EncoderChunks(sys.maxsize)
    return EncoderChunks(MAX_PATCHES["cpu" if runtime.device == "cpu" else "gpu"])


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 63-bit seed for one step's dropout: a function of (seed, step), so resuming has no RNG state to lose.

    Processes that train together draw masks of their own.
    """
    text = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def optimizer_groups(spec: Spec) -> dict[tuple[str, bool], list[str]]:
    """Parameters that share a learning-rate group and a decay flag: (group, decay) -> names."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, param in spec.params().items():
        groups.setdefault((param.group, param.decay), []).append(name)
    return groups


def probe_records(table: Mapping[str, Sequence[float]], sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """One record a parameter from its figures in the order of PROBE; "zeros" comes as a count, of `sizes` elements."""
    records = {name: dict(zip(PROBE, figures, strict=True)) for name, figures in table.items()}
    return {name: record | {"zeros": record["zeros"] / sizes[name]} for name, record in records.items()}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one instance (or class) replaced for a while; what was inherited is inherited again."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def expect_names(expected: Iterable[str], given: Iterable[str], what: str) -> None:
    """Internal check that two sets of names agree; the message lists the difference."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    assert not missing and not extra, f"{what}: missing {missing}, unexpected {extra}"
