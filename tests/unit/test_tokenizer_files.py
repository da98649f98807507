"""Tokenizers of GPT-2, tiktoken and sentencepiece; added tokens; text that cannot be encoded."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Model
from tokenizers import models, pre_tokenizers

from mlx_training.data.tokenizer import Tokenizer, expand, train_bpe
from mlx_training.data.tokenizer_models import _byte_letters, is_tiktoken
from mlx_training.errors import ConfigError, DataError

TEXT = "Hello,  world!\n\n  it's 1,234.5 — naïve 数 🦙\t\tend "


@pytest.fixture(scope="module")
def gpt2_cases(shared_data: Path) -> list[tuple[str, list[int]]]:
    folder = shared_data / "tokenizer_gpt2"
    texts = (folder / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = [list(map(int, line.split())) for line in (folder / "ggml-vocab-gpt-2.gguf.out").read_text().splitlines()]
    cases = list(zip(texts, ids, strict=False))
    assert len(cases) > 40
    return cases


def write_tiktoken(source: Path, target: Path) -> Path:
    """GPT-2's vocabulary as tiktoken publishes it."""
    byte = {letter: value for value, letter in _byte_letters().items()}
    ids = json.loads(source.read_text(encoding="utf-8"))
    del ids["<|endoftext|>"]
    lines = [base64.b64encode(bytes(byte[c] for c in token)) + b" %d\n" % rank for token, rank in ids.items()]
    target.write_bytes(b"".join(lines))
    return target


def test_gpt2_files(shared_data: Path, gpt2_cases: list[tuple[str, list[int]]], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer_gpt2")  # encoder.json and vocab.bpe
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (50257, None, 50256, False)
    for text, ids in gpt2_cases:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    shutil.copy(shared_data / "tokenizer_gpt2" / "encoder.json", tmp_path / "vocab.json")
    with pytest.raises(DataError, match="merges.txt, which belongs to it, is not beside it"):
        Tokenizer.load(tmp_path / "vocab.json")
    shutil.copy(shared_data / "tokenizer_gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    assert Tokenizer.load(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(DataError, match="expected two tokens a line; got 'a b c'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("qq qqqqqqqq\n")
    with pytest.raises(DataError, match="do not fit each other"):
        Tokenizer.load(tmp_path)


def test_tiktoken_files(shared_data: Path, gpt2_cases: list[tuple[str, list[int]]], tmp_path: Path) -> None:
    file = write_tiktoken(shared_data / "tokenizer_gpt2" / "encoder.json", tmp_path / "gpt2.tiktoken")
    tokenizer = Tokenizer.load(file)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    for text, ids in gpt2_cases:
        assert tokenizer.encode(text) == ids, text


def test_a_small_tiktoken_file(tmp_path: Path) -> None:
    tokens = [*(bytes([value]) for value in range(256)), b"up", b" up", b"down", b".\n"]  # no merges lead to "down"
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))  # as Llama 3 names it
    assert is_tiktoken(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path, ["<pad>"])
    assert tokenizer.encode("down up up.\n<pad>") == [258, 257, 257, 259, 261]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (260, 262)
    assert Tokenizer.load(tmp_path, pattern="gpt2").encode(".\n") == [46, 10], "a line break stands alone there"
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines) + b"no\n")
    with pytest.raises(DataError, match="tokenizer.model:261: expected base64 and a rank"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:60] + lines[62:]))
    with pytest.raises(DataError, match="2 of the 256 bytes have no token .byte 60 is the first"):
        Tokenizer.load(tmp_path)


def test_a_pattern_is_for_tiktoken_files_only(tmp_path: Path) -> None:
    train_bpe(["a b"], 260, tmp_path)
    with pytest.raises(ConfigError, match="is no tiktoken file, which alone reads it"):
        Tokenizer.load(tmp_path, pattern="gpt2")


def test_special_tokens_follow_the_vocabulary(tmp_path: Path) -> None:
    assert expand(["<a>", "<x{8..11}y>"]) == ["<a>", "<x8y>", "<x9y>", "<x10y>", "<x11y>"]
    trained = train_bpe(["a b"], 270, tmp_path / "t", ["<extra_id_{0..99}>", "<one>"])
    size = trained.vocab_size - 101
    assert [trained.model.id_of(f"<extra_id_{n}>") for n in (0, 99)] == [size, size + 99]
    assert trained.encode("a<one>b") == [*trained.encode("a"), size + 100, *trained.encode("b")]
    assert trained.decode(trained.encode("a<one>b")) == "ab"
    loaded = Tokenizer.load(tmp_path / "t", ["<two>", "<eos>"])  # the second one it has
    assert loaded.vocab_size == trained.vocab_size + 1 and loaded.encode("<two>") == [trained.vocab_size]
    loaded.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.vocab_size, again.bos_id, again.eos_id) == (loaded.vocab_size, loaded.bos_id, loaded.eos_id)
    assert again.fingerprint == loaded.fingerprint != trained.fingerprint and again.add_bos


def test_special_tokens_of_sentencepiece(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "tokenizer_sentencepiece" / "test_model.model"
    tokenizer = Tokenizer.load(file, ["<gap>", "</s>"])
    assert tokenizer.vocab_size == 1001
    assert tokenizer.encode("a cat<gap>once") == [*tokenizer.encode("a cat"), 1000, *tokenizer.encode("once")]
    assert tokenizer.decode([*tokenizer.encode("a cat"), 1000]) == "a cat"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.model.id_of("<gap>") == 1000


def test_text_that_cannot_be_encoded_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "e"}')
    letters = {letter: i for i, letter in enumerate("abcde ")}
    Model(models.BPE(letters, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_batch(["bad cab"]) == [[1, 0, 3, 5, 2, 0, 1]]
    with pytest.raises(DataError, match=r"cannot encode 'é' .U\+00E9. in 'bad cabé': its vocabulary has neither"):
        tokenizer.encode_batch(["bad cabé"])  # the library would leave it out

    words = Model(models.WordLevel({"up": 0, "e": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_batch(["up up"]) == [[0, 0]]
    with pytest.raises(DataError, match="the tokenizer cannot encode 'up and down' .*WordLevel"):
        tokenizer.encode_batch(["up up\nup and down\n"])
