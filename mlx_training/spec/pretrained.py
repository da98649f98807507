"""PretrainedSpec: a frozen language model, and the adapters that train on it."""

from dataclasses import dataclass, field
from pathlib import Path

from mlx_training.spec.adapter import AdapterSpec
from mlx_training.spec.decoder import DecoderSpec
from mlx_training.spec.param import Param, Spec


@dataclass(frozen=True)
class FrozenLM:
    """A pretrained LM. Not in the table: its weights are never trained or saved."""

    directory: Path
    hidden_size: int
    vocab_size: int
    sha256: str = ""  # of the weights, recorded in every checkpoint
    weights: str = "dequantized"  # or "resident": packed weights stay packed; or "auto": by free memory
    decoder: DecoderSpec | None = None  # of a run of this project; `directory` is then its checkpoint


@dataclass(frozen=True)
class PretrainedSpec(Spec):
    """A frozen LM that changes by its adapters alone."""

    llm: FrozenLM
    adapter: AdapterSpec | None = field(default=None, kw_only=True)

    def params(self) -> dict[str, Param]:
        """The adapters."""
        return self.adapter.params() if self.adapter else {}

    @property
    def max_length(self) -> int | None:
        """That of a decoder with learned positions; the libraries' models go on."""
        return self.llm.decoder.max_length if self.llm.decoder else None
