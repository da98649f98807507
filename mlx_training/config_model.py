"""The `model` section of a configuration: one mapping of keys a family."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from mlx_training.config_decoder import DecoderConfig
from mlx_training.config_language import KgramConfig, LanguageConfig, RecurrentConfig
from mlx_training.config_pretrained import LoRAConfig, PretrainedConfig
from mlx_training.config_ssm import SSMConfig
from mlx_training.config_timeseries import TimeSeriesConfig

FAMILIES = ("timeseries", "decoder", "recurrent", "kgram", "ssm", "pretrained")


def _family(value: Any) -> str | None:
    family = value.get("family") if isinstance(value, dict) else getattr(value, "family", None)
    return f"<{family}>" if family in FAMILIES else None


ModelConfig = Annotated[
    Annotated[TimeSeriesConfig, Tag("<timeseries>")]
    | Annotated[DecoderConfig, Tag("<decoder>")]
    | Annotated[RecurrentConfig, Tag("<recurrent>")]
    | Annotated[KgramConfig, Tag("<kgram>")]
    | Annotated[SSMConfig, Tag("<ssm>")]
    | Annotated[PretrainedConfig, Tag("<pretrained>")],
    Discriminator(_family, custom_error_type="family", custom_error_message="unknown family"),
]

__all__ = [
    "FAMILIES",
    "DecoderConfig",
    "KgramConfig",
    "LanguageConfig",
    "LoRAConfig",
    "ModelConfig",
    "PretrainedConfig",
    "RecurrentConfig",
    "SSMConfig",
    "TimeSeriesConfig",
]
