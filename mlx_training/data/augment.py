"""Augmentation of training rows: their series are turned, scaled and disturbed at random, anew each epoch.

Um et al. 2017 (arXiv 1706.00527), for wearable sensors: where a device sits on a body, and how strongly the body moves,
says nothing about the activity.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from mlx_training.data.prompt import STATS_TEXT
from mlx_training.data.rows import Row
from mlx_training.data.series import series_stats
from mlx_training.errors import DataError

AXES = 3


@dataclass(frozen=True)
class Augmentation:
    """What `dataset.augment` says. The changes come in the order of the fields; 0 leaves one out."""

    rotation_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the rotation vector, std about x, y and z
    roll_fraction: float = 0.0  # share of the rows that are first turned about x by any angle
    scale: float = 0.0  # std of the logarithm of a factor, one a series
    jitter: float = 0.0  # std of noise on each sample, in standard deviations of its series

    @property
    def rotates(self) -> bool:
        """Whether rows must be three axes."""
        return any(self.rotation_degrees) or self.roll_fraction > 0

    def check(self, row: Row) -> None:
        """Raise DataError for a row whose series are no three axes of one sensor, where axes are turned."""
        lengths = [values.size for values in row.series]
        if self.rotates and (len(lengths) != AXES or len(set(lengths)) != 1):
            keys = [
                f"dataset.augment.{key}" for key in ("rotation_degrees", "roll_fraction") if np.any(getattr(self, key))
            ]
            raise DataError(
                f"{row.name}: {len(lengths)} series of {', '.join(map(str, lengths)) or 'no'} samples, but "
                f"turning by {' and '.join(keys)} takes the three axes of one sensor; give rows of exactly 3 series of "
                "equal length, or set it to 0"
            )

    def row(self, row: Row, rng: np.random.Generator) -> Row:
        """The row with the changes that `rng` draws, and without statistics of its own series in its texts.

        Raises what `check` does.
        """
        self.check(row)
        series = [values.astype(np.float64) for values in row.series]
        if self.rotates:
            turn = rotation(np.radians(self.rotation_degrees) * rng.standard_normal(AXES))
            if self.roll_fraction and rng.random() < self.roll_fraction:
                turn = turn @ rotation(np.array([rng.uniform(-math.pi, math.pi), 0, 0]))
            series = list(turn @ np.stack(series))
        if self.scale:
            series = [values * math.exp(self.scale * rng.standard_normal()) for values in series]
        if self.jitter:
            series = [values + self._noise(values, rng) for values in series]
        return replace(
            row,
            series=tuple(values.astype(np.float32) for values in series),
            series_text=tuple(STATS_TEXT.sub("", text) for text in row.series_text),
        )

    def _noise(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.jitter * series_stats(values).std * rng.standard_normal(values.size)


def rotation(vector: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) about `vector` (3,) by its length in radians (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle == 0:
        return np.eye(AXES)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(AXES) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
