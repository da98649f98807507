"""Specs: models described without a framework."""

from mlx_training.spec.decoder import DecoderSpec, RopeScaling
from mlx_training.spec.param import Param, Spec
from mlx_training.spec.timeseries import EncoderSpec, FrozenLM, ProjectorSpec, TimeSeriesSpec

__all__ = [
    "DecoderSpec",
    "EncoderSpec",
    "FrozenLM",
    "Param",
    "ProjectorSpec",
    "RopeScaling",
    "Spec",
    "TimeSeriesSpec",
]
