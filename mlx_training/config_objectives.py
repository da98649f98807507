"""Which models an objective trains, and which keys it reads."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_training.config_model import DecoderConfig
from mlx_training.config_model_checks import Conflict

if TYPE_CHECKING:
    from mlx_training.config_schema import RunConfig

READERS = {"fim_rate": "fill_in_the_middle", "fim_spm_rate": "fill_in_the_middle", "mask_rate": "masked"}
MIXERS = "model.decoder.mixers"


def objective_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    """Contradictions of `training.objective` with other keys."""
    training, model = config.training, config.model
    for key, reader in READERS.items():
        if training.objective != reader and getattr(training, key) != type(training).model_fields[key].default:
            message = f"objective: {training.objective} does not read it; remove it or give {reader}"
            yield Conflict((f"training.{key}", "training.objective"), message)
    mixers = model.decoder.mixers if isinstance(model, DecoderConfig) else ()
    if training.objective != "masked":
        if "bidirectional" in mixers:
            message = (
                f"given {', '.join(mixers)}; the objective {training.objective} predicts the next token, which "
                "a bidirectional layer sees: give training.objective: masked, or other mixers"
            )
            yield Conflict((MIXERS, "training.objective"), message)
        return
    if not isinstance(model, DecoderConfig):
        message = f"given masked; it trains the decoder family (with mixers: [bidirectional]), not {model.family}"
        yield Conflict(("training.objective", "model.family"), message)
    elif set(mixers) != {"bidirectional"}:
        message = (
            f"given masked, which needs layers that see both sides, but {MIXERS} is {', '.join(mixers)}; "
            f"give {MIXERS}=[bidirectional], or objective: causal"
        )
        yield Conflict(("training.objective", MIXERS), message)
    if config.evaluation.samples is not None:
        message = "a masked model cannot continue a text; remove it (null), or give objective: causal"
        yield Conflict(("evaluation.samples", "training.objective"), message)
