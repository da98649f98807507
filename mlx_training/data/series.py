"""Numbers of a series: checks, per-series z-score, scale features, padding to whole patches."""

import math
from typing import NamedTuple

import numpy as np

from mlx_training.errors import DataError

STD_FLOOR = 1e-6  # below it a series counts as constant (the reference system's clamp)


class SeriesStats(NamedTuple):
    """Mean and sample standard deviation (n - 1, as torch.std) of a raw series."""

    mean: float
    std: float

    def features(self) -> tuple[float, float]:
        """The encoder's numeric scale: asinh(mean), log(std + 1e-6)."""
        return math.asinh(self.mean), math.log(self.std + STD_FLOOR)


def check_series(values: np.ndarray, where: str) -> None:
    """DataError, beginning with `where`, unless `values` (T,) is non-empty and finite."""
    if values.ndim != 1:
        raise DataError(f"{where}: a series has one dimension (samples); got shape {values.shape}")
    if values.size == 0:
        raise DataError(f"{where}: the series is empty; a series needs at least one sample")
    finite = np.isfinite(values)
    if not finite.all():
        position = int(np.argmin(finite))
        raise DataError(
            f"{where}: {values[position]} at position {position} of {values.size} ({int((~finite).sum())} such samples)"
            "; every sample must be finite: remove the row or fill the gaps"
        )


def series_stats(values: np.ndarray) -> SeriesStats:
    """Statistics of one finite series (T,), accumulated in float64; std is 0 for one sample."""
    first = float(values[0])
    if values.min() == values.max():
        return SeriesStats(first, 0.0)
    centred = values.astype(np.float64) - first  # exact for a small wave on a large offset
    offset = float(centred.mean())
    centred -= offset
    return SeriesStats(first + offset, math.sqrt(float(centred @ centred) / (values.size - 1)))


def zscore(values: np.ndarray, stats: SeriesStats) -> np.ndarray:
    """(values - mean) / max(std, 1e-6) as float32 (T,); a constant series gives zeros."""
    return ((values.astype(np.float64) - stats.mean) / max(stats.std, STD_FLOOR)).astype(np.float32)


def pad_to(values: np.ndarray, length: int) -> np.ndarray:
    """Zeros after the last sample, up to `length`."""
    if values.size >= length:
        return values
    padded = np.zeros(length, values.dtype)
    padded[: values.size] = values
    return padded


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple
