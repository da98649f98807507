"""KgramSpec: a multi-layer perceptron on the last k tokens (Bengio et al. 2003), in three forms."""

from dataclasses import dataclass
from typing import Literal

from mlx_training.spec.param import Param, Spec, linear


@dataclass(frozen=True)
class KgramSpec(Spec):
    """Sizes of a k-gram language model; the k tokens are the current one and those before it.

    onehot: a Linear over the one-hot codes of the k tokens. embedding: a Linear over their embeddings, side by side.
    convolution: a depthwise convolution over their embeddings, then a Linear. `num_layers` Linears, SiLU after each.
    """

    vocab_size: int
    form: Literal["onehot", "embedding", "convolution"] = "embedding"
    k: int = 3
    embed_size: int = 128  # onehot has no embeddings
    hidden_size: int = 128
    num_layers: int = 2
    context_length: int = 128
    init_std: float = 1.0

    @property
    def token_size(self) -> int:
        """Numbers that a token enters with: its embedding, or its columns of the one-hot codes' Linear, one a lag."""
        return self.k * self.hidden_size if self.form == "onehot" else self.embed_size

    @property
    def window_size(self) -> int:
        """Width of the k tokens together, as they reach the first Linear."""
        return {"onehot": self.token_size, "embedding": self.k * self.embed_size}.get(self.form, self.embed_size)

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """(out, in) of the Linears after the window of k tokens; in form onehot the window is the first one."""
        inner = [(self.hidden_size, self.hidden_size)] * (self.num_layers - 1)
        return inner if self.form == "onehot" else [(self.hidden_size, self.window_size), *inner]

    def params(self) -> dict[str, Param]:
        """Tokens N(0, init_std), all else as PyTorch's Linear and Conv1d start; biases not decayed.

        The window's kernel and what a token enters with go from the earliest of the k tokens to the current one.
        """
        table = {"embed_tokens.weight": Param((self.vocab_size, self.token_size), "normal", self.init_std)}
        if self.form == "onehot":
            table["window.bias"] = Param((self.hidden_size,), "zeros", decay=False)
        if self.form == "convolution":
            bound = self.k**-0.5
            table["window.weight"] = Param((self.embed_size, 1, self.k), "uniform", bound)
            table["window.bias"] = Param((self.embed_size,), "uniform", bound, decay=False)
        for i, sizes in enumerate(self.layer_sizes):
            table |= linear(f"layers.{i}", *sizes, group="model")
        table["lm_head.weight"] = Param((self.vocab_size, self.hidden_size), "uniform", self.hidden_size**-0.5)
        return table
