"""Tokenizers: loading, special tokens, training, vocabulary check."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_training.data.tokenizer import Tokenizer, check_vocabulary, train_bpe
from mlx_training.errors import DataError


def test_trained_bpe_is_lossless_deterministic_and_uses_its_vocabulary(tmp_path: Path) -> None:
    texts = ["the trend is up", "the trend is down"] * 3
    first = train_bpe(texts, 270, tmp_path / "a")
    train_bpe(texts, 270, tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert first.vocab_size == 270
    assert (first.bos_id, first.eos_id, first.add_bos) == (0, 1, True)
    text = "The trend: é 数 \n 12.5"
    assert first.decode(first.encode(text, bos=True) + [first.eos_id]) == text
    assert len(first.encode(" the trend")) < len(" the trend")
    assert len(first.encode("1234")) == 4  # digits stand alone
    with pytest.raises(DataError, match="258 is too small.*259"):
        train_bpe(texts, 258, tmp_path)


def test_encode_adds_nothing_unasked(tiny_tokenizer: Tokenizer) -> None:
    plain = tiny_tokenizer.encode("the trend")
    assert tiny_tokenizer.bos_id not in plain and tiny_tokenizer.eos_id not in plain
    assert tiny_tokenizer.encode("the trend", bos=True) == [tiny_tokenizer.bos_id, *plain]


def test_decode_ignores_ids_beyond_the_vocabulary(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.decode([*tiny_tokenizer.encode("up"), 300, 5000]) == "up"


@pytest.mark.parametrize(
    ("name", "content", "eos_id"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": "<pad>"}}, 2),
        ("special_tokens_map.json", {"eos_token": "<eos>"}, 1),
        ("generation_config.json", {"eos_token_id": [2, 1]}, 2),
        ("config.json", {"eos_token_id": 2}, 2),
        ("config.json", {"text_config": {"eos_token_id": 2}}, 2),
    ],
)
def test_eos_is_found_where_models_state_it(tmp_path: Path, name: str, content: dict, eos_id: int) -> None:
    train_bpe(["a b"], 260, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_id == eos_id


def test_a_tokenizer_without_usable_eos_is_an_error(tmp_path: Path) -> None:
    train_bpe(["a b"], 260, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<bos>"}')
    with pytest.raises(DataError, match="no end-of-sequence token.*present: tokenizer_config.json"):
        Tokenizer.load(tmp_path)
    config.write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="eos_token '</s>' is not in tokenizer.json"):
        Tokenizer.load(tmp_path)
    config.write_text('{"eos_token_id": 260}')
    with pytest.raises(DataError, match="eos_token_id 260 but tokenizer.json has 260 ids"):
        Tokenizer.load(tmp_path)


def test_add_bos_follows_the_configuration_over_the_template(tmp_path: Path) -> None:
    train_bpe(["a b"], 260, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    assert not Tokenizer.load(tmp_path).add_bos


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a file nor a directory"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="looked for tokenizer.json and tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_vocabulary_check_names_both_sizes() -> None:
    check_vocabulary(32101, 32102, "model x")
    with pytest.raises(DataError, match="model x: the tokenizer has 32102 ids but the model embeds 32101"):
        check_vocabulary(32102, 32101, "model x")


def test_real_sentencepiece(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "tokenizer_sentencepiece" / "test_model.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (1000, 1, 2)
    assert tokenizer.add_bos and tokenizer.adds_space
    assert tokenizer.decode([*tokenizer.encode("Once upon a time", bos=True), 2]) == "Once upon a time"
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a readable sentencepiece model"):
        Tokenizer.load(tmp_path)


def test_real_llama_tokenizer(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "stories260k" / "hf")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    assert tokenizer.encode("Once upon a time", bos=True) == [1, 403, 407, 261, 378]
