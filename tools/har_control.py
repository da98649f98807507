"""What the soft prompt of tools/har_report.py is held against: a linear head on the same encoder. No product.

The encoder of configs/timeseries/har.yaml from the same initial values, mean-pooled over real patches, channels side by
side, and a linear layer to the classes. It sees the same batches in the same order, the same normalisation and scale,
the same optimiser, learning rates and steps, and its checkpoint is chosen on the same validation subjects.
"""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from mlx_training.assemble import Assembly, RowData, assemble, open_backend
from mlx_training.config import RunConfig
from mlx_training.data.batch import Batch
from mlx_training.data.batching import eval_batches
from mlx_training.data.collate import collate
from mlx_training.data.rows import Row
from mlx_training.evaluate import save_predictions
from mlx_training.init import initialise
from mlx_training.metrics import answer_metrics
from mlx_training.objectives import Objective, Sums
from mlx_training.progress import Progress
from mlx_training.run_directory import write_atomic
from mlx_training.spec import EncoderSpec, Param, Spec, TimeSeriesSpec
from mlx_training.spec.param import linear
from mlx_training.trainer import Cadence, judge, learning_rates, plan

TEST, WEIGHTS = "test", "control.safetensors"
Result = dict[str, Any]


@dataclass(frozen=True)
class ControlSpec(Spec):
    """An encoder and a linear layer over the pooled channels, which learns at the projector's rate."""

    encoder: EncoderSpec
    num_channels: int
    num_classes: int

    def params(self) -> dict[str, Param]:
        in_size = self.num_channels * self.encoder.hidden_size
        return self.encoder.params() | dict(linear("head", self.num_classes, in_size, group="projector"))


def build_control(spec: ControlSpec) -> Any:
    """The control in PyTorch: a batch -> logits (B, C); S series, P patches, d hidden size, C classes."""
    import torch
    from torch import Tensor, nn

    from torch_backend.timeseries import Encoder

    class Control(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spec = spec
            self.encoder = Encoder(spec.encoder)
            self.head = nn.Linear(spec.num_channels * spec.encoder.hidden_size, spec.num_classes)

        def forward(self, batch: Batch) -> Tensor:
            h_SPd = self.encoder(batch.series, batch.scale, batch.num_patches, batch.series_place)
            real_SP = torch.arange(h_SPd.shape[1], device=h_SPd.device) < batch.num_patches[:, None]
            pooled_Sd = (h_SPd * real_SP[..., None]).sum(1) / batch.num_patches[:, None]
            return self.head(pooled_Sd.view(len(batch.rows), -1))  # the channels of a row stand together

    return Control()


def open_control(config: RunConfig, assembly: Assembly) -> tuple[Any, Any, RowData]:
    """Backend, model with any values, and rows."""
    data, backend = assembly.data, open_backend(config, "torch")
    assert isinstance(assembly.spec, TimeSeriesSpec) and isinstance(data, RowData)
    first = data.rows("train")[0]
    spec = ControlSpec(assembly.spec.encoder, len(first.series), len(first.options))
    return backend, build_control(spec).to(backend.device), data  # type: ignore[attr-defined]


def load_control(config: RunConfig, run: Path) -> tuple[Any, Any, RowData]:
    """Backend, model and rows of a control that `train_control` has trained."""
    backend, model, data = open_control(config, assemble(config))
    backend.load(model, load_file(run / WEIGHTS))
    return backend, model, data


def train_control(config: RunConfig, run: Path) -> Result:
    """Train, choose and test the control as the trainer does a model; the same result, its weights, predictions."""
    started = time.monotonic()
    seed, assembly = config.experiment.seed, assemble(config)
    backend, model, data = open_control(config, assembly)
    backend.load(model, initialise(model.spec, seed))
    step = backend.make_step(model, control_objective(data.rows("train")), config.optim, seed=seed)
    batches, total_steps = plan(assembly)
    cadence, progress = Cadence(config, total_steps, batches.num_batches), Progress()
    accumulation = config.training.grad_accumulation_steps
    validation = data.rows(config.evaluation.split)[: config.evaluation.max_rows]
    best, number = backend.export(model), 0
    with closing(batches.prefetch(0, total_steps * accumulation)) as stream:
        while number < total_steps and not progress.stopped_early:
            number += 1
            micro_batches = [next(stream) for _ in range(accumulation)]
            metrics = step(micro_batches, step=number, lr=learning_rates(config, number, total_steps))
            if cadence.evaluates(number):
                progress.loss = float(metrics["loss"])
                with step.averaged():
                    values, _ = score_control(backend, model, data, validation)
                    if judge(config, progress, values, number):
                        best = backend.export(model)
    seconds = time.monotonic() - started

    backend.load(model, best)
    save_file(best, run / WEIGHTS)
    metrics, predictions = score_control(backend, model, data, data.rows(TEST))
    save_predictions(run / f"predictions_{TEST}.jsonl", predictions)
    result = {"run": str(run), "backend": "torch", "steps": number, "loss": progress.loss}
    result |= {"seconds": round(seconds, 2), "eval": metrics}
    write_atomic(run / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def control_objective(rows: Sequence[Row]) -> Objective:
    """Cross-entropy in nats, summed over the rows of a batch, and their number."""
    import torch
    import torch.nn.functional as F

    classes = torch.tensor([row.options.index(row.answer) for row in rows])

    def objective(model: Any, batch: Batch) -> Sums:
        logits_BC = model(batch)
        classes_B = classes[list(batch.rows)].to(logits_BC.device)
        loss = F.cross_entropy(logits_BC, classes_B, reduction="sum")
        return {"loss": loss, "weight": torch.full_like(loss, len(batch.rows))}

    return objective


def score_control(
    backend: Any, model: Any, data: RowData, rows: Sequence[Row]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of the control on rows with the mean loss, and every row's prediction."""
    import torch

    objective = control_objective(rows)
    size = data.config.evaluation.batch_size or data.config.training.batch_size
    given, loss = [""] * len(rows), 0.0
    for batch in eval_batches(rows, data.encode, size, collate):
        loss += backend.score(model, objective, batch)["loss"]
        with torch.no_grad():
            chosen = model(backend.to_device(batch)).argmax(-1).tolist()
        for row, index in zip(batch.rows, chosen, strict=True):
            given[row] = rows[row].options[index]
    lines = [
        {"id": r.id, "type": r.type, "answer": r.answer, "prediction": p} for r, p in zip(rows, given, strict=True)
    ]
    return answer_metrics(rows, given) | {"loss": loss / len(rows)}, lines
