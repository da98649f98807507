"""AdapterSpec: low-rank changes of a frozen language model's Linears.

Sources: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024); names, layouts and initial values of PEFT.
"""

from dataclasses import dataclass

from mlx_training.spec.param import Param


@dataclass(frozen=True)
class AdapterSpec:
    """y = base(x) + alpha / r * B A x; with `dora` each output is then rescaled from ||W + alpha / r * B A|| to m."""

    linears: tuple[tuple[str, int, int], ...]  # (path in the language model, outputs, inputs)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on what enters A
    dora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def params(self) -> dict[str, Param]:
        """A uniform within 1 / sqrt(in) (Kaiming with a = sqrt 5) and B zero, both decayed; m starts at ||W||."""
        table = {}
        for path, out_size, in_size in self.linears:
            name = f"lm.{path}"
            table[f"{name}.lora_A.weight"] = Param((self.rank, in_size), "uniform", in_size**-0.5, True, "lora")
            table[f"{name}.lora_B.weight"] = Param((out_size, self.rank), "zeros", 0.0, True, "lora")
            if self.dora:
                table[f"{name}.lora_magnitude_vector"] = Param((out_size,), "pretrained", 0.0, False, "lora")
        return table
