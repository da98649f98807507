"""Specs: models described without a framework."""

from mlx_training.spec.adapter import AdapterSpec
from mlx_training.spec.decoder import DecoderSpec, ExpertsSpec, RopeScaling
from mlx_training.spec.kgram import KgramSpec
from mlx_training.spec.mixers import FixedPattern
from mlx_training.spec.param import Param, Spec
from mlx_training.spec.pretrained import FrozenLM, PretrainedSpec
from mlx_training.spec.recurrent import RecurrentSpec
from mlx_training.spec.ssm import SSMSpec
from mlx_training.spec.timeseries import EncoderSpec, ProjectorSpec, TimeSeriesSpec

__all__ = [
    "AdapterSpec",
    "DecoderSpec",
    "EncoderSpec",
    "ExpertsSpec",
    "FixedPattern",
    "FrozenLM",
    "KgramSpec",
    "Param",
    "PretrainedSpec",
    "ProjectorSpec",
    "RecurrentSpec",
    "RopeScaling",
    "SSMSpec",
    "Spec",
    "TimeSeriesSpec",
]
