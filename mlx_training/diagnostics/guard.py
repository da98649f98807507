"""What watches over a run while it trains: skipped updates, loss spikes, parameters that stand still."""

import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlx_training.assemble import Assembly
from mlx_training.backend import Arrays, Backend
from mlx_training.data.batch import Batch
from mlx_training.errors import DivergedError
from mlx_training.json_lines import read_metrics
from mlx_training.objectives import Objective

ADVICE = (
    "What was saved before is intact. Try a lower training.learning_rate, training.grad_clip_norm: 1.0 or more "
    "warm-up, and look for odd rows in the data"
)
WINDOW, ENOUGH = 20, 5  # logged losses that a spike is measured against: at most, at least
MAX_NAMED = 8  # rows or parameters in a message
MAX_KEPT = 2**22  # elements of a parameter whose start is kept; of larger ones every n-th row


class Guard:
    """Sees every step. It waits for a step only when the next one is on its way, or when the loop waits anyway."""

    def __init__(
        self,
        assembly: Assembly,
        backend: Backend,
        model: Any,
        objective: Objective,
        *,
        run: Path,
        step: int,
        skipped: int,
    ) -> None:
        """`step` and `skipped`: how many steps were taken, and skipped, before this process."""
        self.assembly, self.backend, self.model, self.objective, self.run = assembly, backend, model, objective, run
        self.settings = assembly.config.diagnostics
        self.skipped, self.in_a_row = skipped, 0
        self._first_step = step
        self._losses = deque(_logged_losses(run, step), maxlen=WINDOW)
        self._start: Arrays | None = self._some_rows() if self.settings.unmoved_after_steps else None
        self._unread: tuple[int, dict[str, Any], Sequence[Batch]] | None = None
        self._unmoved: list[str] = []

    def watch(self, step: int, metrics: dict[str, Any], batches: Sequence[Batch]) -> None:
        """Take note of a step that was launched, and judge the one before it.

        Raises DivergedError after `max_skipped_steps` skipped steps in a row.
        """
        self._judge_unread()
        self._unread = (step, metrics, batches)
        if self._start is not None and step - self._first_step == self.settings.unmoved_after_steps:
            self._unmoved = self._warn_of_unmoved(self._start)
            self._start = None

    def read(self) -> dict[str, Any]:
        """Loss, gradient norm and what is odd about the last step, for the log; waits for the device.

        Raises DivergedError as `watch` does.
        """
        assert self._unread is not None, "nothing was watched since the last reading"
        _, metrics, _ = self._unread
        self._judge_unread()
        loss = float(metrics["loss"])
        values: dict[str, Any] = {"loss": loss, "grad_norm": float(metrics["grad_norm"])}
        if self._is_spike(loss):
            values["spike"] = 1
        if self.skipped:
            values["skipped"] = self.skipped
        if self._unmoved:
            values["unmoved"] = ", ".join(self._unmoved)
            self._unmoved = []
        return values

    def _judge_unread(self) -> None:
        if self._unread is None:
            return
        (step, metrics, batches), self._unread = self._unread, None
        if not float(metrics["skipped"]):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.settings.max_skipped_steps:
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            raise DivergedError(
                f"diverged by step {step}: loss {loss}, gradient norm {norm}; {self.in_a_row} updates in a row were "
                f"skipped. {self._first_not_finite(batches)}. {ADVICE}",
                step,
            )

    def _first_not_finite(self, batches: Sequence[Batch]) -> str:
        """The module, or else the parameter, where the last step stopped being finite, and the rows it was given.

        Looks at everything, whatever it finds: processes that share out a model do it together.
        """
        found = []
        for batch in batches:
            outputs = self.backend.activations(self.model, self.objective, batch)
            if module := _first(outputs):
                bad = np.flatnonzero(~np.isfinite(outputs["logprobs"]).all(axis=1))
                found.append(f"First not finite: the output of {module}, for {self._rows(batch, bad)}")
        for batch in batches:
            if name := _first(self.backend.gradients(self.model, self.objective, batch)):
                rows = self._rows(batch)
                found.append(f"All outputs are finite; first not finite: the gradient of {name}, for {rows}")
        if found:
            return found[0]
        return f"Without dropout every output and gradient is finite, for {self._rows(batches[0])}"

    def _rows(self, batch: Batch, bad: Sequence[int] | np.ndarray = ()) -> str:
        rows = self.assembly.data.splits["train"]
        chosen = [batch.rows[i] for i in bad] or list(batch.rows)
        names = [str(getattr(rows[i], "id", "") or i) for i in chosen]
        of_all = f"{len(names)} of {len(batch.rows)} rows" if len(names) < len(batch.rows) else "the rows"
        return f"{of_all} of the batch: {_listed(names)}"

    def _is_spike(self, loss: float) -> bool:
        factor, known = self.settings.spike_factor, list(self._losses)
        if not math.isfinite(loss):
            return False
        self._losses.append(loss)
        return factor is not None and len(known) >= ENOUGH and loss > factor * median(known) > 0

    def _some_rows(self) -> Arrays:
        """What is compared of every parameter: not where its true gradient is zero, and not all of a large one."""
        rows, exempt = {}, self.assembly.spec.zero_gradients()
        for name, array in self.backend.export(self.model).items():
            keep = np.ones(len(array), bool)
            keep[exempt.get(name, slice(0))] = False
            rows[name] = array[keep][:: -(-array.size // MAX_KEPT)].copy()
        return rows

    def _warn_of_unmoved(self, start: Arrays) -> list[str]:
        """Parameters that only decay has changed since `start`, after saying so on stderr."""
        config, table, now = self.assembly.config, self.assembly.spec.params(), self._some_rows()
        unmoved = []
        for name, before in start.items():
            param, steps = table[name], self.settings.unmoved_after_steps or 0
            rate = config.learning_rates[param.group] * config.optim.rate_factor(param)
            most_decay = rate * config.optim.decay(param) * steps
            if rate and before.size and _stands_still(before, now[name], most_decay):
                unmoved.append(name)
        if unmoved:
            print(
                f"\nwarning: {len(unmoved)} of {len(start)} parameters have not moved in "
                f"{self.settings.unmoved_after_steps} steps: {_listed(unmoved)}; "
                f"run: mlx-training doctor {self.run / 'config.yaml'}",
                file=sys.stderr,
            )
        return unmoved


def _stands_still(before: np.ndarray, now: np.ndarray, most_decay: float) -> bool:
    """Whether `now` is `before`, or `before` shrunk by one factor, no more than weight decay may have done."""
    if np.array_equal(before, now):
        return True
    a, b = before.astype(np.float64).ravel(), now.astype(np.float64).ravel()
    if not most_decay or a.size < 2 or not a.any():
        return False
    factor = (a @ b) / (a @ a)
    shrunk = 1 - 1.1 * most_decay - 1e-6 <= factor <= 1
    return bool(shrunk and np.linalg.norm(b - factor * a) <= 1e-6 * np.linalg.norm(a))


def _first(arrays: Arrays) -> str | None:
    """The first array that holds NaN or infinity."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _logged_losses(run: Path, step: int) -> Iterable[float]:
    """Finite losses that the run logged up to a step, so that a resumed run marks the same spikes."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if step and path.is_file() else []
    losses = [record["loss"] for record in records if "loss" in record and record["step"] <= step]
    return [loss for loss in losses if math.isfinite(loss)]
