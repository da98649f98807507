"""Tokenizer: text to ids and back, from files, without transformers.

Reads a directory with `tokenizer.json` (the tokenizers library), `tokenizer.model` (sentencepiece, or tiktoken's base64
and ranks), `vocab.json` and `merges.txt` (GPT-2; also as `encoder.json` and `vocab.bpe`) or a `.tiktoken` file; or such
a file itself. BOS and EOS come from the first of tokenizer_config.json, special_tokens_map.json,
generation_config.json, config.json that names them, else from the model: sentencepiece's own, and <|endoftext|> as EOS.
"""

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_training.data.tokenizer_models import (
    GPT2_FILES,
    JsonModel,
    SentencePieceModel,
    TokenizerModel,
    is_tiktoken,
    load_gpt2,
    load_tiktoken,
    read_object,
)
from mlx_training.errors import ConfigError, DataError
from mlx_training.run_directory import naming

SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
FAST_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}  # what transformers reads a tokenizer.json with
SPACE_MARKS = ("\u2581", "\u0120")  # how sentencepiece and byte-level BPE spell a space


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
        self._known: set[str] = set()  # characters that `check` has seen

    @classmethod
    def load(cls, path: Path | str, special_tokens: Sequence[str] = (), pattern: str | None = None) -> "Tokenizer":
        """Read a directory or a file of a tokenizer with its neighbours; strict.

        `special_tokens` that it lacks get the ids after its last one; a name with "{0..99}" stands for a hundred.
        `pattern`: the pre-tokenisation of a tiktoken file ("gpt2" or "cl100k").
        """
        file = _tokenizer_file(Path(path))
        model = _read_model(file, pattern)
        model.add(expand(special_tokens))
        configs = {name: read_object(file.parent / name) for name in SPECIAL_FILES if (file.parent / name).is_file()}
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

    def save(self, directory: Path | str) -> None:
        """Write files that `load` reads back to an equal tokenizer."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.model.save(directory)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "add_bos_token": self.add_bos}
        known = {name: value for name, value in ids.items() if value is not None}
        _write_config(directory, FAST_CLASS | known if isinstance(self.model, JsonModel) else known)

    @property
    def fingerprint(self) -> str:
        """Changes when the same text could get other ids."""
        return hashlib.sha256(self.model.state() + f"{self.bos_id} {self.eos_id} {self.add_bos}".encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, after BOS when `bos`; nothing else is added."""
        ids = self.model.encode(text)
        if bos:
            assert self.bos_id is not None, "this tokenizer has no BOS"
            return [self.bos_id, *ids]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them. Raises DataError, with the text, when one cannot be encoded."""
        for text in texts:
            self._check(text)
        return self.model.encode_batch(texts)

    def _check(self, text: str) -> None:
        """DataError, quoting the text, when a letter, digit or sign of it has no id and would be lost in silence."""
        new = set(text) - self._known
        for char in sorted(new):
            if unicodedata.category(char)[0] not in "LNPS":  # a mark or a space may be normalised away
                continue
            ids: list[int] | None = None
            with contextlib.suppress(DataError):  # a vocabulary of words: `encode_batch` itself refuses a text
                ids = self.model.encode(char)
            if ids == []:
                place = text.index(char)
                raise DataError(
                    f"the tokenizer cannot encode {char!r} (U+{ord(char):04X}) in "
                    f"{text[max(place - 30, 0) : place + 30]!r}: its vocabulary has neither this character nor an "
                    "unknown token. Take a byte-level tokenizer (model.tokenizer={train: 16000}), or clean the text"
                )
        self._known |= new

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out. Ids beyond the vocabulary (padding rows of a larger head) too."""
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])


def expand(tokens: Iterable[str]) -> list[str]:
    """Names of special tokens, "{a..b}" in one replaced by every number from a to b, as a shell does."""
    found: list[str] = []
    for token in tokens:
        match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", token)
        numbers = range(int(match[2]), int(match[3]) + 1) if match else ()
        found += [f"{match[1]}{n}{match[4]}" for n in numbers] if match else [token]
    return found


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"no tokenizer at {str(path)!r}: neither a file nor a directory")
    pairs = [vocabulary for vocabulary, merges in GPT2_FILES if (path / merges).is_file()]
    tiktoken = [file.name for file in sorted(path.glob("*.tiktoken"))]
    for name in ("tokenizer.json", "tokenizer.model", *pairs, *tiktoken):
        if (path / name).is_file():
            return path / name
    raise DataError(
        f"no tokenizer in {str(path)!r}: looked for tokenizer.json and tokenizer.model, "
        f"{', '.join(' with '.join(pair) for pair in GPT2_FILES)}, and *.tiktoken"
    )


def _read_model(file: Path, pattern: str | None) -> TokenizerModel:
    merges = {vocabulary: file.with_name(merges) for vocabulary, merges in GPT2_FILES}.get(file.name)
    if merges is not None:
        if not merges.is_file():
            raise DataError(f"tokenizer {file}: {merges.name}, which belongs to it, is not beside it")
        return load_gpt2(file, merges)
    if file.suffix == ".tiktoken" or (file.suffix != ".json" and is_tiktoken(file)):
        return load_tiktoken(file, pattern)
    if pattern is not None:
        raise ConfigError(f"model.tokenizer.pattern: {file} is no tiktoken file, which alone reads it; remove the key")
    return JsonModel.load(file) if file.suffix == ".json" else SentencePieceModel(file)


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


def check_vocabulary(tokenizer_size: int, model_size: int, where: str, advice: str | None = None) -> None:
    """DataError when the tokenizer can emit ids the model has no embedding for. A larger model is fine."""
    if tokenizer_size > model_size:
        advice = advice or "Use the tokenizer the model was trained with, or resize the model's embedding"
        raise DataError(
            f"{where}: the tokenizer has {tokenizer_size} ids but the model embeds {model_size}: ids "
            f"{model_size}..{tokenizer_size - 1} have no embedding. {advice}"
        )


def train_bpe(
    texts: Iterable[str], vocab_size: int, directory: Path | str, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE and write `tokenizer.json` and `tokenizer_config.json` into `directory`.

    Ids 0, 1, 2 are <bos>, <eos>, <pad>; any text can be encoded (all 256 bytes are tokens); digits are
    tokens of their own. Deterministic in `texts` and `vocab_size`. BOS is put before a text (`add_bos`).
    `special_tokens` follow the last of the `vocab_size` ids.
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
    model.add_special_tokens(expand(special_tokens))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    with naming(directory / "tokenizer.json"):  # not by the library, whose errors of a full disk are no OSError
        (directory / "tokenizer.json").write_text(model.to_str(pretty=True), encoding="utf-8")
    _write_config(directory, {**FAST_CLASS, **tokens, "clean_up_tokenization_spaces": False})
    return Tokenizer.load(directory)


def _write_config(directory: Path, values: dict[str, Any]) -> None:
    with naming(directory / "tokenizer_config.json"):
        (directory / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
