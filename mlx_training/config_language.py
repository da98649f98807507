"""The `model` section of the families that are trained from scratch on text: what they share, recurrent and k-gram."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from mlx_training.config_section import Count, Dropout, Names, Positive, Section, Text, either
from mlx_training.spec import KgramSpec, RecurrentSpec, Spec


class TokenizerConfig(Section):
    """A tokenizer that is trained here, or one of files with special tokens added to it."""

    train: Annotated[int, Field(ge=259)] | None = None
    """Train a byte-level BPE on the training text; its size: 256 bytes, <bos>, <eos>, <pad> and merges."""
    load: Text | None = None
    """Directory or file of a tokenizer; exactly one of train and load."""
    special_tokens: Names = ()
    """Tokens to add, with the ids after its last one; a name with {0..99} in it stands for a hundred."""
    pattern: Literal["gpt2", "cl100k"] | None = None
    """Of a tiktoken file: where text is cut before bytes are merged; null: gpt2 for 50,256 tokens, else cl100k."""


class LanguageConfig(Section):
    """A language model on text: its sizes, in a section named as the family, and its tokenizer."""

    reads_segments: ClassVar[bool] = False  # several documents in a row, none of which sees another

    tokenizer: Annotated[
        Annotated[Text, Tag("<directory>")] | Annotated[TokenizerConfig, Tag("<options>")],
        either("<options>", "<directory>"),
    ] = TokenizerConfig(train=640)
    """Directory or file of a tokenizer, {train: vocabulary size}, or {load: PATH, special_tokens: [...]}."""
    vocab_size: Count | None = None
    """Ids that the model embeds; null: the tokenizer's. More are unused rows; fewer are an error."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Learning-rate groups that train."""
        return ("model",)

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens per training window."""

    @abstractmethod
    def spec(self, vocab_size: int) -> Spec:
        """The model that these sizes describe."""


class RecurrentShape(Section):
    cell: Literal["lstm", "gru"] = "lstm"
    """LSTM or GRU, as PyTorch has them."""
    hidden_size: Count = 128
    """Width of the states."""
    embed_size: Count | None = None
    """Width of the embeddings. null: hidden_size."""
    num_layers: Count = 1
    """Recurrent layers."""
    context_length: Count = 128
    """Tokens per training window; every window starts from zero states."""
    tie_word_embeddings: bool = False
    """The output head is the embedding table."""
    dropout: Dropout = 0.0
    """Dropout on the embeddings, and on what each layer returns."""
    init_std: Positive | None = None
    """Standard deviation of the initial embeddings. null: 1, or 0.1 where the head is tied to them."""


class RecurrentConfig(LanguageConfig):
    """An LSTM or GRU language model trained from scratch."""

    family: Literal["recurrent"]
    """recurrent: an LSTM or GRU from scratch."""
    preset: Literal["lstm-1024"] | None = None
    """Sizes by name; keys given beside it win."""
    recurrent: RecurrentShape = RecurrentShape()

    @property
    def context_length(self) -> int:
        return self.recurrent.context_length

    def spec(self, vocab_size: int) -> RecurrentSpec:
        shape = self.recurrent.model_dump()
        shape["embed_size"] = shape["embed_size"] or shape["hidden_size"]
        shape["init_std"] = shape["init_std"] or (0.1 if shape["tie_word_embeddings"] else 1.0)
        return RecurrentSpec(vocab_size, **shape)


class KgramShape(Section):
    form: Literal["onehot", "embedding", "convolution"] = "embedding"
    """A Linear over k one-hot codes, over k embeddings side by side, or over a depthwise convolution of them."""
    k: Annotated[int, Field(ge=2)] = 3
    """Tokens that the next one is predicted from, the current one included."""
    embed_size: Count | None = None
    """Width of the embeddings (onehot has none). null: hidden_size."""
    hidden_size: Count = 128
    """Width of the layers."""
    num_layers: Count = 2
    """Linear layers, SiLU after each, before the output head."""
    context_length: Count = 128
    """Tokens per training window; what stands before a window counts as nothing."""
    init_std: Positive = 1.0
    """Standard deviation of the initial embeddings (onehot: of the first layer)."""


class KgramConfig(LanguageConfig):
    """A multi-layer perceptron on the last k tokens, trained from scratch."""

    family: Literal["kgram"]
    """kgram: a perceptron on the last k tokens, from scratch."""
    preset: Literal["kgram-onehot", "kgram-embedding", "kgram-conv"] | None = None
    """Sizes by name; keys given beside it win."""
    kgram: KgramShape = KgramShape()

    @property
    def context_length(self) -> int:
        return self.kgram.context_length

    def spec(self, vocab_size: int) -> KgramSpec:
        shape = self.kgram.model_dump()
        shape["embed_size"] = shape["embed_size"] or shape["hidden_size"]
        return KgramSpec(vocab_size, **shape)
