"""Token streams, in memory and in the cache."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_training.data import text_files
from mlx_training.data.text_files import Document
from mlx_training.data.text_sources import Part
from mlx_training.data.token_cache import cached_streams, encode_parts
from mlx_training.data.tokenizer import Tokenizer, train_bpe

TEXTS = {"train": ["the trend is up", "é 数"], "test": ["down"]}


def parts() -> Iterator[Part]:
    for split, texts in TEXTS.items():
        for text in texts:
            yield Part(split, Document(text))


def refuse() -> Iterator[Part]:
    raise AssertionError("the cache should have been read")


def test_documents_stand_between_bos_and_eos(tiny_tokenizer: Tokenizer) -> None:
    bos, eos, encode = tiny_tokenizer.bos_id, tiny_tokenizer.eos_id, tiny_tokenizer.encode
    streams = encode_parts(parts(), tiny_tokenizer)
    first = [bos, *encode(TEXTS["train"][0]), eos]
    assert streams["train"].tokens.tolist() == [*first, bos, *encode(TEXTS["train"][1]), eos]
    assert streams["train"].starts.tolist() == [0, len(first)]
    assert (streams["train"].num_characters, streams["train"].num_bytes) == (18, 21)
    assert streams["train"].tokens.dtype == np.uint16
    assert streams["test"].tokens.tolist() == [bos, *encode("down"), eos]


def test_a_document_in_pieces_is_one_document(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "what is the trend, up or down? " * 30
    whole = encode_parts(iter([Part("train", Document(text), 3, 777)]), tiny_tokenizer)["train"]
    monkeypatch.setattr(text_files, "PIECE", 40)
    stream = encode_parts(iter([Part("train", Document(text), 3, 777)]), tiny_tokenizer)["train"]
    assert stream.starts.tolist() == [0]
    assert tiny_tokenizer.decode(stream.tokens.tolist()) == text[3:777]
    assert (stream.num_characters, stream.num_bytes) == (774, 774)
    assert stream.tokens.tolist() == whole.tokens.tolist()


def test_pieces_of_a_sentencepiece_text(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer_sentencepiece" / "test_model.model")
    text = "Once upon a time there was a cat who said: I am a cat. " * 20
    monkeypatch.setattr(text_files, "PIECE", 40)
    stream = encode_parts(iter([Part("train", Document(text))]), tokenizer)["train"]
    assert stream.tokens.tolist() == [1, *tokenizer.encode(text), 2]


def test_the_cap_holds_to_the_token_and_for_training_only(tiny_tokenizer: Tokenizer) -> None:
    streams = encode_parts(parts(), tiny_tokenizer, max_tokens=4)
    whole = encode_parts(parts(), tiny_tokenizer)
    assert streams["train"].tokens.tolist() == whole["train"].tokens[:4].tolist()
    assert streams["test"].tokens.tolist() == whole["test"].tokens.tolist()
    assert streams["train"].starts.tolist() == [0]
    assert streams["train"].num_characters == len(tiny_tokenizer.decode(streams["train"].tokens.tolist()))


def test_the_cache_is_written_once_and_mapped(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    state = {"source": "a", "fraction": {"test": 0.1}}
    built = cached_streams(tmp_path, state, parts, tiny_tokenizer)
    found = cached_streams(tmp_path, state, refuse, tiny_tokenizer)
    memory = encode_parts(parts(), tiny_tokenizer)
    for streams in (built, found):
        assert isinstance(streams["train"].tokens, np.memmap)
        for split in TEXTS:
            assert streams[split].tokens.tolist() == memory[split].tokens.tolist()
            assert streams[split].starts.tolist() == memory[split].starts.tolist()
            assert streams[split].num_bytes == memory[split].num_bytes
    assert len(list(tmp_path.iterdir())) == 1, "nothing temporary is left"


def test_other_text_options_or_tokenizer_have_a_cache_of_their_own(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    cached_streams(tmp_path / "c", {"source": "a"}, parts, tiny_tokenizer)
    cached_streams(tmp_path / "c", {"source": "b"}, parts, tiny_tokenizer)
    other = train_bpe(["another text"], 280, tmp_path / "t")
    assert cached_streams(tmp_path / "c", {"source": "a"}, parts, other)["test"].tokens.tolist() != []
    assert len(list((tmp_path / "c").iterdir())) == 3


@pytest.mark.parametrize("damage", ["header", "another state", "short", "long", "missing"])
def test_a_damaged_cache_is_noticed_and_made_again(
    tmp_path: Path, tiny_tokenizer: Tokenizer, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = cached_streams(tmp_path, {}, parts, tiny_tokenizer)["train"].tokens.tolist()
    (place,) = tmp_path.iterdir()
    tokens, header = place / "train.tokens", place / "header.json"
    match damage:
        case "header":
            header.write_text(header.read_text()[:40])
        case "another state":
            header.write_text(header.read_text().replace('"version": 1', '"version": 0'))
        case "short":
            tokens.write_bytes(tokens.read_bytes()[:-2])
        case "long":
            tokens.write_bytes(tokens.read_bytes() + b"xx")
        case "missing":
            (place / "test.starts").unlink()
    assert cached_streams(tmp_path, {}, parts, tiny_tokenizer)["train"].tokens.tolist() == whole
    assert f"{place} is damaged; it is made again" in capsys.readouterr().err
    assert cached_streams(tmp_path, {}, refuse, tiny_tokenizer)["train"].tokens.tolist() == whole


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    def broken() -> Iterator[Part]:
        yield from parts()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_streams(tmp_path, {}, broken, tiny_tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proof
def test_a_text_larger_than_the_memory_it_takes(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """60 MB in one document: divided, tokenised and read back; what the process grows by is far below its size."""
    line = "what is the trend of the series? up down it has mean 0.1 and std 2.3: Answer: yes no\n"
    with (tmp_path / "large.txt").open("w") as file:
        for i in range(60_000_000 // len(line)):
            file.write(f"{i % 97} {line}"[: len(line) - 1] + "\n")
    assert isinstance(tiny_tokenizer, Tokenizer)
    tiny_tokenizer.save(tmp_path / "tokenizer")
    code = """
import resource, sys
from pathlib import Path
from mlx_training.data.text_sources import Division, Source, TextSplits
from mlx_training.data.token_cache import cached_streams
from mlx_training.data.tokenizer import Tokenizer
here = Path(sys.argv[1])
tokenizer = Tokenizer.load(here / "tokenizer")
tokenizer.encode_batch(["up and down " * 20000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = Source.of_files(str(here / "large.txt"))
division = Division([source], TextSplits({"validation": 0.1}))
parts = lambda: division.parts(source)
streams = cached_streams(here / "cache", division.state(source), parts, tokenizer)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, streams["train"].tokens.size, streams["train"].num_bytes + streams["validation"].num_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    grown, num_tokens, num_bytes = map(int, done.stdout.split())
    size = (tmp_path / "large.txt").stat().st_size
    print(f"{size / 1e6:.0f} MB of text, {num_tokens} tokens: {grown / 1e3:.0f} MB more")
    assert num_bytes == size
    assert grown / (1024 if sys.platform == "darwin" else 1) < 30_000, f"{grown} kB"
