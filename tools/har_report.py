"""Evidence on real sensors: activities through the frozen LM, beside a linear head on the same encoder.

    python tools/har_report.py --data har_total_acc_train.npz --out runs/har_report [--seeds 1 2 3] [key=value ...]

For every seed: `main` (configs/timeseries/har.yaml), `no_scale` (the same without the numeric scale: mean and std in the
text only) and `control`, which is no part of the product: the same encoder from the same initial values, mean-pooled
over real patches, channels side by side, and a linear layer to the classes. The control sees the same batches in the
same order, with the same normalisation, scale, optimiser, learning rates and number of steps, and its checkpoint is
chosen on the same validation subjects. Test subjects are read once a run, after that choice. What is finished
(result.json) is not run again. Writes report.md, report.json and confusion.png.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from mlx_training.assemble import Assembly, assemble, open_backend
from mlx_training.backend import Backend
from mlx_training.checkpoint import write_atomic
from mlx_training.config import RunConfig, load_config, to_yaml
from mlx_training.data.batch import Batch
from mlx_training.environment import versions
from mlx_training.errors import ConfigError, UserError
from mlx_training.evaluate import save_predictions
from mlx_training.init import initialise
from mlx_training.metrics import answer_metrics, normalise
from mlx_training.spec import EncoderSpec, Param, Spec
from mlx_training.spec.param import linear
from mlx_training.trainer import Cadence, Progress, judge, learning_rates, optim, plan, read_finite, train

CONFIG = "timeseries/har"
VARIANTS = {
    "main": "soft prompt, numeric scale",
    "no_scale": "soft prompt, statistics as text only",
    "control": "linear head on the same encoder",
}
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
    """The control in PyTorch: a batch -> logits (B, classes)."""
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
            h_SPd = self.encoder(batch.series, batch.scale, batch.num_patches)
            real_SP = torch.arange(h_SPd.shape[1], device=h_SPd.device) < batch.num_patches[:, None]
            pooled_Sd = (h_SPd * real_SP[..., None]).sum(1) / batch.num_patches[:, None]
            return self.head(pooled_Sd.view(len(batch.rows), -1))  # a row's channels stand together

    return Control()


def control_objective(targets: np.ndarray) -> Callable[[Any, Batch], dict[str, Any]]:
    """Cross-entropy summed over rows, and their number; `targets`: the class of every training row."""
    import torch
    import torch.nn.functional as F

    def objective(model: Any, batch: Batch) -> dict[str, Any]:
        logits_BC = model(batch)
        classes_B = torch.from_numpy(targets[list(batch.rows)]).to(logits_BC.device)
        return {"loss": F.cross_entropy(logits_BC, classes_B, reduction="sum"), "weight": classes_B.new_tensor(len(classes_B)).float()}

    return objective


def control_answers(backend: Any, model: Any, assembly: Assembly, split: str, classes: Sequence[str]) -> list[str]:
    """The most probable class of every row of a split, in order."""
    import torch

    rows, size = assembly.data.rows(split), assembly.config.evaluation.batch_size or assembly.config.training.batch_size
    answers = [""] * len(rows)
    model.eval()
    with torch.no_grad():
        for batch in assembly.data.eval_batches(split, size, None):
            chosen = model(backend.to_device(batch)).argmax(-1).tolist()
            for row, index in zip(batch.rows, chosen, strict=True):
                answers[row] = classes[index]
    return answers
