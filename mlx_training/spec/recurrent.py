"""RecurrentSpec: an LSTM or GRU language model, names as in torch.nn.LSTM and torch.nn.GRU."""

from dataclasses import dataclass
from typing import Literal

from mlx_training.spec.param import Param, Spec

NUM_GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True)
class RecurrentSpec(Spec):
    """Sizes of a language model that reads one token at a time."""

    vocab_size: int
    cell: Literal["lstm", "gru"] = "lstm"
    embed_size: int = 128
    hidden_size: int = 128
    num_layers: int = 1
    context_length: int = 128
    tie_word_embeddings: bool = False
    dropout: float = 0.0
    init_std: float = 1.0

    def params(self) -> dict[str, Param]:
        """Embeddings N(0, init_std), all else uniform within 1 / sqrt(hidden_size) as in PyTorch; biases not decayed.

        Gates stand in PyTorch's order: input, forget, cell, output; reset, update, new.
        """
        E, H = self.embed_size, self.hidden_size
        G, bound = NUM_GATES[self.cell] * H, H**-0.5
        table = {"embed_tokens.weight": Param((self.vocab_size, E), "normal", self.init_std)}
        for i in range(self.num_layers):
            table[f"rnn.weight_ih_l{i}"] = Param((G, H if i else E), "uniform", bound)
            table[f"rnn.weight_hh_l{i}"] = Param((G, H), "uniform", bound)
            table[f"rnn.bias_ih_l{i}"] = Param((G,), "uniform", bound, decay=False)
            table[f"rnn.bias_hh_l{i}"] = Param((G,), "uniform", bound, decay=False)
        if not self.tie_word_embeddings:
            table["lm_head.weight"] = Param((self.vocab_size, H), "uniform", bound)
        return table
