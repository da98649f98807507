"""Tokenizer: text to ids and back, from a Hugging Face directory, without transformers.

Reads `tokenizer.json` (the tokenizers library) or `tokenizer.model` (sentencepiece); BOS and EOS come
from the first of tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json
that names them, and for sentencepiece from the model itself.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_training.errors import DataError
from mlx_training.json_text import parse_json
from mlx_training.run_directory import naming

SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")

SPACE_MARKS = ("\u2581", "\u0120")  # how sentencepiece and byte-level BPE spell a space


class TokenizerModel(Protocol):
    """What the two libraries have in common. Ids never include special tokens that the text does not spell."""

    vocab_size: int  # largest id + 1

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, text: str) -> list[str]: ...
    def id_of(self, token: str) -> int | None: ...
    def default_id(self, name: str) -> int | None: ...
    def default_add_bos(self, bos_id: int | None) -> bool: ...


class Tokenizer:
    """Text to ids and back.

    `bos_id` may be None; `eos_id` is always there. `add_bos`: whether this tokenizer puts BOS before a
    text (what a prompt encoder should do once). `adds_space`: whether `encode("a")` begins with a space
    of its own, as sentencepiece's dummy prefix does.
    """

    def __init__(self, model: TokenizerModel, *, bos_id: int | None, eos_id: int, add_bos: bool) -> None:
        self.model = model
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos
        self.vocab_size = model.vocab_size
        self.adds_space = "".join(model.pieces("a")).startswith(SPACE_MARKS)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a directory, or a `tokenizer.json` / `*.model` file with its neighbours; strict."""
        path = Path(path)
        file = _tokenizer_file(path)
        model: TokenizerModel = _JsonModel(file) if file.suffix == ".json" else _SentencePieceModel(file)
        configs = {name: _read_json(file.parent / name) for name in SPECIAL_FILES if (file.parent / name).is_file()}
        bos_id = _special_id("bos", configs, model, file)
        eos_id = _special_id("eos", configs, model, file)
        if eos_id is None:
            raise DataError(
                f"tokenizer {file}: no end-of-sequence token; looked for eos_token and eos_token_id in "
                f"{', '.join(SPECIAL_FILES)} beside it (present: {', '.join(configs) or 'none'}). "
                'Add e.g. tokenizer_config.json with {"eos_token": "</s>"}'
            )
        declared = configs.get("tokenizer_config.json", {}).get("add_bos_token")
        add_bos = bool(declared) if declared is not None else model.default_add_bos(bos_id)
        return cls(model, bos_id=bos_id, eos_id=eos_id, add_bos=add_bos and bos_id is not None)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, after BOS when `bos`; nothing else is added."""
        ids = self.model.encode(text)
        if bos:
            assert self.bos_id is not None, "this tokenizer has no BOS"
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out. Ids beyond the vocabulary (padding rows of a larger head) too."""
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])


class _JsonModel:
    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"tokenizer {file}: not a readable tokenizer.json ({error})") from error
        self.tokenizer.no_truncation()  # both may be stored in the file
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, text: str) -> list[str]:
        return self.tokenizer.encode(text, add_special_tokens=False).tokens

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def default_id(self, name: str) -> int | None:
        return None

    def default_add_bos(self, bos_id: int | None) -> bool:
        return self.tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


class _SentencePieceModel:
    def __init__(self, file: Path) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.Load(str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokenizer {file}: not a readable sentencepiece model ({error})") from error
        self.vocab_size = self.processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        return self.processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.DecodeIds([i for i in ids if not self.processor.IsControl(i)])

    def pieces(self, text: str) -> list[str]:
        return self.processor.EncodeAsPieces(text)

    def id_of(self, token: str) -> int | None:
        index = self.processor.PieceToId(token)
        return index if self.processor.IdToPiece(index) == token else None

    def default_id(self, name: str) -> int | None:
        index = self.processor.bos_id() if name == "bos" else self.processor.eos_id()
        return index if index >= 0 else None

    def default_add_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None  # as Llama's and Gemma's sentencepiece tokenizers do


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"no tokenizer at {str(path)!r}: neither a file nor a directory")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise DataError(f"no tokenizer in {str(path)!r}: looked for tokenizer.json and tokenizer.model")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected an object; got {type(value).__name__}")
    return value


def _special_id(name: str, configs: dict[str, dict[str, Any]], model: TokenizerModel, file: Path) -> int | None:
    """The id of BOS or EOS by the first configuration file that names it, as a token or as an id."""
    for config_name, config in configs.items():
        token = config.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            index = model.id_of(token)
            if index is None:
                raise DataError(f"{file.parent / config_name}: {name}_token {token!r} is not in {file.name}")
            return index
        ids = config.get(f"{name}_token_id", config.get("text_config", {}).get(f"{name}_token_id"))
        if isinstance(ids, list):
            ids = ids[0] if ids else None
        if isinstance(ids, int):
            if not 0 <= ids < model.vocab_size:
                raise DataError(
                    f"{file.parent / config_name}: {name}_token_id {ids} but {file.name} has {model.vocab_size} ids"
                )
            return ids
    return model.default_id(name)


def check_vocabulary(tokenizer_size: int, model_size: int, where: str) -> None:
    """DataError when the tokenizer can emit ids the model has no embedding for. A larger model is fine."""
    if tokenizer_size > model_size:
        raise DataError(
            f"{where}: the tokenizer has {tokenizer_size} ids but the model embeds {model_size}: ids "
            f"{model_size}..{tokenizer_size - 1} have no embedding. Use the tokenizer the model was trained with, "
            "or resize the model's embedding"
        )


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path | str) -> Tokenizer:
    """Train a byte-level BPE and write `tokenizer.json` and `tokenizer_config.json` into `directory`.

    Ids 0, 1, 2 are <bos>, <eos>, <pad>; any text can be encoded (all 256 bytes are tokens); digits are
    tokens of their own. Deterministic in `texts` and `vocab_size`. BOS is put before a text (`add_bos`).
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    specials = ["<bos>", "<eos>", "<pad>"]
    if vocab_size < 256 + len(specials):
        raise DataError(f"vocabulary of {vocab_size} is too small: 256 bytes and {len(specials)} specials need 259")
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    texts = {"tokenizer.json": model.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    for name, text in texts.items():  # not by the library, whose errors of a full disk are no OSError
        with naming(directory / name):
            (directory / name).write_text(text, encoding="utf-8")
    return Tokenizer.load(directory)
