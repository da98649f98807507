"""Text from a configuration: what is read, refused, reported and trained on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.assemble import TextData, assemble, validate
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.data.text import Mixture
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.label_checks import supervision
from mlx_training.diagnostics.plan import _vocabulary
from mlx_training.diagnostics.subject import from_config
from mlx_training.errors import ConfigError, DataError
from mlx_training.evaluate import evaluate_run
from mlx_training.export import export_huggingface
from mlx_training.protocols import Protocol, documents_of
from mlx_training.trainer import train
from tests.e2e.tiny import decoder_config

WORDS = [
    "the",
    "cat",
    "saw",
    "a",
    "dog",
    "and",
    "one",
    "bird",
    "in",
    "its",
    "old",
    "tree",
    "by",
    "our",
    "small",
    "house",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of text, 300 stories and a long one."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    stories = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(300)]
    (tmp_path / "stories.txt").write_text("\n".join(stories))
    (tmp_path / "long.txt").write_text(" ".join(rng.choice(WORDS, 800)))
    (tmp_path / "tiny.yaml").write_text(decoder_config(Path("run")))
    return tmp_path


FIM = "<fim_prefix>, <fim_middle>, <fim_suffix>"


def config_of(*overrides: str, dataset: str = '{path: stories.txt, options: {separator: "\\n"}}') -> Any:
    base = ["dataset=null", "dataset={format: text, num_samples_train: null}", "training.batch_size=2"]
    limits = [f"dataset.num_samples_{split}=null" for split in ("train", "validation", "test")]
    return load_config("tiny.yaml", [*base, *limits, f"dataset={dataset}", *overrides])


def text_of(*overrides: str, **given: str) -> TextData:
    data = assemble(config_of(*overrides, **given)).data
    assert isinstance(data, TextData)
    return data


def documents(data: TextData, split: str) -> set[str]:
    streams = data.streams[split]
    parts = [part for stream in streams for part in np.split(stream.tokens, stream.starts[1:])]
    return {data.tokenizer.decode(part.tolist()) for part in parts}


def test_sizes_are_those_of_the_text(folder: Path) -> None:
    data = text_of()
    lines = (folder / "stories.txt").read_text().split("\n")
    assert {line for split in data.splits for line in documents(data, split)} == set(lines)
    assert not documents(data, "train") & documents(data, "validation")
    assert sum(data.sizes(split)["documents"] for split in data.splits) == len(lines)
    assert sum(data.sizes(split)["characters"] for split in data.splits) == sum(map(len, lines))
    with pytest.raises(DataError, match="no split 'other'; it has: train, validation, test"):
        data.sizes("other")


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_validate_reports_every_split(folder: Path, packing: str) -> None:
    report = validate(config_of(f"dataset.packing={packing}"))["text"]
    assert list(report) == ["train", "validation", "test"]
    for split in report.values():
        assert split["bytes"] == split["characters"] > split["tokens"] > split["documents"] > 10
        assert split["bytes_per_token"] == pytest.approx(split["bytes"] / split["tokens"], abs=1e-4)
        assert ("packing_efficiency" in split) == (packing == "documents")
    assert packing == "windows" or report["train"]["packing_efficiency"] > 0.9


def test_the_cache_holds_what_memory_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, cached, again = text_of(), text_of("dataset.cache_dir=cache"), text_of("dataset.cache_dir=cache")
    said = capsys.readouterr().err
    assert said.count("MB of text become tokens in cache") == 1
    for split in plain.splits:
        assert plain.sizes(split) == cached.sizes(split) == again.sizes(split)
        assert plain.splits[split].tokens.tolist() == again.splits[split].tokens.tolist()
    for batches in (cached.train_batches(), again.train_batches()):
        assert batches.batch(3).tokens.tolist() == plain.train_batches().batch(3).tokens.tolist()
    (folder / "stories.txt").write_text((folder / "stories.txt").read_text() + "\none more story")
    text_of("dataset.cache_dir=cache", "dataset.splits={seed: 1}")
    assert len(list((folder / "cache").iterdir())) == 2


def test_large_text_is_cached_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
    text_of()
    assert not (folder / "home").exists()
    monkeypatch.setattr("mlx_training.data.text_data.LARGE", 1000)
    assert isinstance(text_of().splits["train"].tokens, np.memmap)
    assert (folder / "home" / "mlx-training" / "tokens").is_dir()


def test_sources_are_mixed_by_weight(folder: Path) -> None:
    data = text_of(dataset='{sources: [{path: stories.txt, separator: "\\n", weight: 3}, {path: long.txt, weight: 1}]}')
    rows = data.splits["train"]
    assert isinstance(rows, Mixture)
    first, second = rows.draws()
    assert first == pytest.approx(3 * second, abs=2) and first + second == len(rows)
    assert data.summary()["train"]["rows_drawn_per_epoch"] == [first, second]
    assert data.sizes("train")["documents"] > 200
    assert len(list(data.eval_batches("test", 4, None))) == -(-len(data.splits["test"]) // 4)


def test_files_per_split(folder: Path) -> None:
    files = '{path: ., options: {separator: "\\n"}, splits: {file: {train: stories.txt, test: long.txt}}}'
    data = text_of("evaluation.split=test", dataset=files)
    assert list(data.splits) == ["train", "test"]
    assert documents(data, "test") == {(folder / "long.txt").read_text()}


def test_a_vocabulary_that_is_too_small_is_refused_before_the_first_step(folder: Path) -> None:
    """CodeT5's 32,000 ids, 100 sentinels and 2 special tokens, on a small scale and then with its own numbers."""
    tokens = 'model.tokenizer.special_tokens=["<extra_id_{0..99}>", "<s>", "</s>"]'
    with pytest.raises(DataError, match="model.vocab_size: the tokenizer has 402 ids but the model embeds 401.*to 402"):
        train(config_of(tokens, "model.vocab_size=401"))
    assert not (folder / "run" / "checkpoints").exists()
    larger = assemble(config_of(tokens, "model.vocab_size=500"))
    assert larger.spec.params()["model.embed_tokens.weight"].shape[0] == 500
    assert larger.data.tokenizer.vocab_size == 402
    assert _vocabulary(config_of(tokens).model) == 402, "as the plan foresees"


def test_codet5_numbers(folder: Path) -> None:
    vocabulary = {f"t{i}": i for i in range(32_000)} | {"a": 32_000 - 1}
    del vocabulary["t31999"]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    (folder / "code").mkdir()
    (folder / "code" / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    (folder / "code" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    load = 'model.tokenizer={train: null, load: code, special_tokens: ["<extra_id_{0..99}>", "<s>", "</s>"]}'
    with pytest.raises(
        DataError, match="the tokenizer has 32102 ids but the model embeds 32101: ids 32101..32101 have"
    ):
        assemble(config_of(load, "model.vocab_size=32101"))
    assert _vocabulary(config_of(load).model) == 32_102


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.path=empty.txt"], "empty.txt: no text: it is empty, or blank"),
        (["dataset.path=binary.txt"], "binary.txt: a binary file"),
        (["dataset.path=nowhere"], "no data file 'nowhere'"),
        (["training.batch_size=9999"], "training.batch_size 9999 is larger than the training data: .* rows of 16"),
        (["dataset.splits={unit: document, fraction: {validation: 0.001, test: 0.1}}"], "no text for 'validation'"),
        (["training.objective=fill_in_the_middle"], "the tokenizer has no tokens <fim_prefix>"),
    ],
)
def test_text_that_cannot_be_used(folder: Path, overrides: Sequence[str], message: str) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(DataError, match=message):
        validate(config_of(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.tokenizer={load: x}"], "model.tokenizer.load: both are given .null removes a key.; exactly one"),
        (["model.tokenizer={train: null}"], "neither is given; exactly one of train and load"),
        (["model.tokenizer.pattern=gpt2"], "model.tokenizer.pattern: it is read with the tiktoken file"),
        (["dataset.sources=[{path: a}]"], "dataset.sources: both say where the text is"),
        (["dataset={path: null, sources: [{path: a, weight: 1}, {path: b}]}"], "give all or none"),
        (
            ["dataset={path: null, sources: [{path: a}], splits: {fraction: null, file: {train: a, test: b}}}"],
            "files per split go with dataset.path",
        ),
        (["dataset={path: null, sources: []}"], "dataset.sources: given .*; allowed: a list"),
        (["training.fim_rate=0.1"], "objective: causal does not read it"),
    ],
)
def test_keys_that_contradict_each_other(folder: Path, overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)


def test_packing_is_for_families_that_read_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_training.config_decoder.DecoderConfig.reads_segments", False)
    with pytest.raises(ConfigError, match="dataset.packing: documents is read by the decoder family; "):
        config_of("dataset.packing=documents")


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize("objective", ["causal", "fill_in_the_middle"])
def test_the_doctor_knows_packed_and_turned_rows(folder: Path, packing: str, objective: str) -> None:
    tokens = f"model.tokenizer.special_tokens=[{FIM}]"
    config = config_of(tokens, f"dataset.packing={packing}", f"training.objective={objective}")
    exam = Exam(from_config(config))
    assert [finding.status for finding in supervision(exam)] == ["pass"]
    shifted = [replace(batch, targets=batch.tokens) for batch in exam.batches]
    vars(exam)["batches"] = shifted
    assert [finding.cause for finding in supervision(exam)] == ["labels_shifted"]


def test_packed_documents_are_kept_apart_by_every_protocol(folder: Path, backend_name: str) -> None:
    """The run's own rows, windows that are made for a protocol, and the same text as a file: one loss."""
    overrides = ["dataset.packing=documents", "model.decoder.context_length=8", "training.learning_rate=1e-2"]
    train(config_of(*overrides, f"backend={backend_name}", "evaluation.test_split=validation"))
    own = evaluate_run(Path("run"), split="validation")
    text = text_of(*overrides)
    stories = documents_of(text.tokens("validation"), text.tokenizer)
    Path("again.txt").write_text("\n".join(stories))
    for given in (
        {"split": "validation", "protocol": Protocol("windows", context_length=8)},
        {"split": "validation", "protocol": Protocol("position")},
        {"data": Path("again.txt")},
    ):
        found = evaluate_run(Path("run"), **given)
        assert found["loss"] == pytest.approx(own["loss"], rel=1e-5) and found["tokens"] == own["tokens"]
        assert found["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-5)


def test_a_run_keeps_the_tokenizer_it_was_given(folder: Path, backend_name: str) -> None:
    train(config_of(f"backend={backend_name}"))
    size = Tokenizer.load("run/tokenizer").vocab_size + 3
    load = f"model.tokenizer={{train: null, load: run/tokenizer, special_tokens: [{FIM}]}}"
    fim = ["training.objective=fill_in_the_middle", "training.fim_rate=1.0"]
    given = [load, *fim, f"backend={backend_name}", "output_dir=second"]
    result = train(config_of(*given))
    assert np.isfinite(result["eval"]["loss"])
    assert CheckpointStore(folder / "second").load().model["model.embed_tokens.weight"].shape[0] == size
    export_huggingface(folder / "second", folder / "exported")
    assert json.loads((folder / "exported" / "config.json").read_text())["vocab_size"] == size
    more = train(config_of(*given, "training.max_steps=6", "dataset.cache_dir=cache"), resume="auto")
    assert more["steps"] == 6


@pytest.mark.parametrize(
    ("name", "options", "num_documents"),
    [
        ("hackernews_titles/titles.txt", ', separator: "\\n", max_documents: 4000', 4000),
        ("tinystories/train.txt", "", 3),
        ("tinyshakespeare/input.txt", "", 3),
        ("issue_patch/issues.jsonl", ", text_column: problem_statement", 200),
    ],
)
def test_real_text(folder: Path, shared_data: Path, name: str, options: str, num_documents: int) -> None:
    """Many documents are drawn, one long text is cut in order; nothing is lost, and nothing is in two splits."""
    dataset = f"{{sources: [{{path: {shared_data / name}{options}}}], packing: documents, splits: {{}}}}"
    data = text_of("model.tokenizer={train: 300}", dataset=dataset)
    sizes = [data.sizes(split) for split in data.splits]
    assert sum(size["documents"] for size in sizes) == num_documents
    if num_documents == 3:
        assert sum(size["bytes"] for size in sizes) == (shared_data / name).stat().st_size
    assert all(summary["packing_efficiency"] > 0.97 for summary in data.summary().values())
    first, *others = (documents(data, split) for split in ("train", "validation", "test"))
    assert not first & others[0] and not first & others[1] and not others[0] & others[1]
