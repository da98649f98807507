"""Subject: what the doctor examines. Public objects of a run; each may be replaced by another of its kind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mlx_training.assemble import Assembly, Data, assemble, open_backend
from mlx_training.backend import Backend, Optim, Registered, Step
from mlx_training.config import RunConfig
from mlx_training.data.batch import Batch
from mlx_training.initial import initial_parameters
from mlx_training.objectives import Objective
from mlx_training.objectives.lm import lm
from mlx_training.spec import Param, Spec
from mlx_training.trainer import learning_rates, plan

MAX_ROWS = 8  # a micro-batch: the checks take a few dozen gradients


@dataclass
class Subject:
    """A model, what it is trained for and on, and how. `data` and `config` are there when a configuration is."""

    backend: Backend
    spec: Spec
    model: Any
    objective: Objective
    batch: Callable[[int], Batch]  # training micro-batch by index
    optim: Optim
    rates: Callable[[int], Mapping[str, float]]  # step (from 1) -> learning rate of every group
    total_steps: int
    seed: int = 0
    accumulation: int = 1
    fresh: bool = True  # parameters have their initial values
    trained: bool = False  # parameters are the outcome of training
    data: Data | None = None
    config: RunConfig | None = None
    make_step: Callable[["Subject"], Step] = field(default=lambda subject: subject.default_step())

    def new_step(self) -> Step:
        """A fresh optimiser step over the model."""
        return self.make_step(self)

    def default_step(self) -> Step:
        """What the backend makes of model, objective and optimiser settings."""
        return self.backend.make_step(self.model, self.objective, self.optim, seed=self.seed)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts the parameters back afterwards."""
        before = self.backend.export(self.model)
        try:
            yield
        finally:
            self.backend.load(self.model, before)


@dataclass(frozen=True)
class TableSpec(Spec):
    """The table of somebody's own model: what it trains, as it stands."""

    table: dict[str, Param]

    @classmethod
    def of(cls, known: Mapping[str, Registered]) -> "TableSpec":
        """Every trainable parameter; matrices decay, vectors do not."""
        return cls({n: Param(p.shape, "pretrained", decay=len(p.shape) > 1) for n, p in known.items() if p.trainable})

    def params(self) -> dict[str, Param]:
        return self.table


def from_config(config: RunConfig, backend: str | None = None, *, max_rows: int = MAX_ROWS) -> Subject:
    """The subject of a configuration at its initial values. Raises what assembling a run raises."""
    return from_assembly(assemble(config), backend, max_rows=max_rows)


def from_assembly(assembly: Assembly, backend: str | None = None, *, max_rows: int = MAX_ROWS) -> Subject:
    """Real model, data and objective; micro-batches of at most `max_rows` rows."""
    config, training = assembly.config, assembly.config.training
    total_steps = plan(assembly)[1]
    small = training.model_copy(update={"batch_size": min(training.batch_size, max_rows)})
    data = replace(assembly.data, config=config.model_copy(update={"training": small}))
    vars(data)["splits"] = assembly.data.splits  # read once
    spec, batches = assembly.spec, data.train_batches()
    chosen = open_backend(config, backend)
    model = chosen.build(spec)
    seed = config.experiment.seed
    chosen.load(model, initial_parameters(spec, seed, training.init_from, partial(chosen.export, model)))
    return Subject(
        backend=chosen,
        spec=spec,
        model=model,
        objective=lm,
        batch=batches.batch,
        optim=config.optim,
        rates=lambda step: learning_rates(config, step, total_steps),
        total_steps=total_steps,
        seed=seed,
        accumulation=training.grad_accumulation_steps,
        fresh=training.init_from is None,
        data=data,
        config=config,
    )
