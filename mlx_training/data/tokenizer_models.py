"""What stands behind a Tokenizer: the tokenizers library, sentencepiece, and files of GPT-2 and tiktoken."""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_training.errors import DataError
from mlx_training.json_text import parse_json
from mlx_training.run_directory import naming

END_OF_TEXT = "<|endoftext|>"
PATTERNS = {  # where a tiktoken vocabulary cuts text before it merges bytes (github.com/openai/tiktoken)
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
END_OF_TEXT_IDS = {50_256: 50_256, 100_256: 100_257}  # published vocabularies by size; others: the next id
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class TokenizerModel(Protocol):
    """What the libraries have in common. Ids never include special tokens that the text does not spell."""

    vocab_size: int  # largest id + 1

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, text: str) -> list[str]: ...
    def id_of(self, token: str) -> int | None: ...
    def default_id(self, name: str) -> int | None: ...
    def default_add_bos(self, bos_id: int | None) -> bool: ...
    def add(self, tokens: Sequence[str]) -> None: ...
    def state(self) -> bytes: ...
    def save(self, directory: Path) -> None: ...


class JsonModel:
    """A model of the tokenizers library, as `tokenizer.json` stores it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()  # both may be stored in the file
        self.tokenizer.no_padding()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, file: Path) -> "JsonModel":
        """Read a `tokenizer.json`."""
        import tokenizers

        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"tokenizer {file}: not a readable tokenizer.json ({error})") from error

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [found.ids for found in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library raises plain Exception
            culprit = next((line for text in texts for line in text.splitlines() if not self._encodes(line)), texts[0])
            raise DataError(f"the tokenizer cannot encode {culprit[:80]!r} ({error})") from error

    def _encodes(self, text: str) -> bool:
        try:
            self.tokenizer.encode(text)
        except Exception:  # noqa: BLE001  the library raises plain Exception
            return False
        return True

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, text: str) -> list[str]:
        return self.tokenizer.encode(text, add_special_tokens=False).tokens if self._encodes(text) else []

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def default_id(self, name: str) -> int | None:
        return self.id_of(END_OF_TEXT) if name == "eos" else None

    def default_add_bos(self, bos_id: int | None) -> bool:
        return self._encodes("a") and self.tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos_id]

    def add(self, tokens: Sequence[str]) -> None:
        import tokenizers

        self.tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens])
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def state(self) -> bytes:
        return self.tokenizer.to_str().encode()

    def save(self, directory: Path) -> None:
        with naming(directory / "tokenizer.json"):
            (directory / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")


class SentencePieceModel:
    """A sentencepiece model, and special tokens that were added to it (`added_tokens.json` beside it)."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.Load(str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokenizer {file}: not a readable sentencepiece model ({error})") from error
        self.vocab_size = self.processor.GetPieceSize()
        self.added: dict[str, int] = {}
        if (file.parent / "added_tokens.json").is_file():
            added = read_object(file.parent / "added_tokens.json")
            self.add(sorted(added, key=lambda token: added[token]))

    def encode(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self.added))})", text) if self.added else [text]
        ids: list[int] = []
        for part in parts:
            ids += [self.added[part]] if part in self.added else self.processor.EncodeAsIds(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < self.processor.GetPieceSize() and not self.processor.IsControl(i)]
        return self.processor.DecodeIds(known)

    def pieces(self, text: str) -> list[str]:
        return self.processor.EncodeAsPieces(text)

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        index = self.processor.PieceToId(token)
        return index if self.processor.IdToPiece(index) == token else None

    def default_id(self, name: str) -> int | None:
        index = self.processor.bos_id() if name == "bos" else self.processor.eos_id()
        return index if index >= 0 else None

    def default_add_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None  # as Llama's and Gemma's sentencepiece tokenizers do

    def add(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            if self.id_of(token) is None:
                self.added[token] = self.vocab_size
                self.vocab_size += 1

    def state(self) -> bytes:
        return self.processor.serialized_model_proto() + json.dumps(self.added).encode()

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(self.processor.serialized_model_proto())
        if self.added:
            (directory / "added_tokens.json").write_text(json.dumps(self.added, indent=1) + "\n", encoding="utf-8")


def load_gpt2(vocabulary: Path, merges: Path) -> JsonModel:
    """GPT-2's byte-level BPE from `vocab.json` and `merges.txt` (or `encoder.json` and `vocab.bpe`)."""
    ids = read_object(vocabulary)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{merges}: not UTF-8 ({error})") from error
    pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise DataError(f"{merges}: expected two tokens a line; got {' '.join(bad)[:60]!r}")
    return _byte_level(ids, pairs, PATTERNS["gpt2"], str(vocabulary), ignore_merges=False)


def load_tiktoken(file: Path, pattern: str | None) -> JsonModel:
    """A tiktoken vocabulary: a line per token with its bytes in base64 and its rank, which is its id.

    `pattern` names the pre-tokenisation (`PATTERNS`); null: gpt2 for GPT-2's 50,256 tokens, else cl100k. <|endoftext|>
    is added, as these files hold no special tokens.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            spelling, number_text = line.split()
            ranks[base64.b64decode(spelling, validate=True)] = int(number_text)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{file}:{number}: expected base64 and a rank; got {line[:60]!r}") from error
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise DataError(f"{file}: {len(missing)} of the 256 bytes have no token (byte {missing[0]} is the first)")
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := _merge(token, ranks, rank)) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    ids = {spelled[token]: rank for token, rank in ranks.items()}
    ids.setdefault(END_OF_TEXT, END_OF_TEXT_IDS.get(len(ranks), max(ranks.values()) + 1))
    chosen = PATTERNS[pattern or ("gpt2" if len(ranks) == 50_256 else "cl100k")]
    return _byte_level(ids, merges, chosen, str(file), ignore_merges=True)  # a whole word's own token comes first


def is_tiktoken(file: Path) -> bool:
    """Whether a file holds base64 and ranks, whatever its suffix."""
    with file.open("rb") as stream:
        return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\s*", stream.readline(1000)) is not None


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected an object; got {type(value).__name__}")
    return value


def _byte_level(ids: dict[str, int], merges: Any, pattern: str, name: str, *, ignore_merges: bool) -> JsonModel:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=ignore_merges))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{name}: vocabulary and merges do not fit each other ({error})") from error
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in ids:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return JsonModel(tokenizer)


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The parts that merges of a rank below `limit` make of a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        ranked = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(ranked, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _byte_letters() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes as printable characters."""
    return dict(_spell_bytes())


def _spell_bytes() -> Iterator[tuple[int, str]]:
    moved = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            yield byte, chr(byte)
        else:
            yield byte, chr(moved)
            moved += 1
