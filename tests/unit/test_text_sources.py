"""Splits of text: nothing is in two of them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlx_training.data.text_files import Document
from mlx_training.data.text_sources import Division, Source, TextSplits, sources_of_files
from mlx_training.errors import DataError

TENTHS = {"validation": 0.1, "test": 0.2}


def source_of(texts: Sequence[str], **options: object) -> Source:
    return Source("texts", lambda: [Document(text) for text in texts], **options)  # type: ignore[arg-type]


def divided(*sources: Source, splits: TextSplits) -> dict[str, list[str]]:
    division, found = Division(sources, splits), defaultdict(list)
    for source in sources:
        for part in division.parts(source):
            found[part.split].append("".join(part.pieces()))
    return found


def test_few_documents_are_cut_by_characters_in_order() -> None:
    documents = ["a" * 40, "b" * 45, "c" * 15]
    parts = divided(source_of(documents), splits=TextSplits(TENTHS))
    assert parts == {"train": ["a" * 40, "b" * 30], "validation": ["b" * 10], "test": ["b" * 5, "c" * 15]}
    with pytest.raises(DataError, match="validation would hold 1 of 10 characters of texts"):
        divided(source_of(["0123456789"]), splits=TextSplits({"validation": 0.1}))
    with pytest.raises(DataError, match="train would hold 0 of 10 characters"):
        divided(source_of(["0123456789"]), splits=TextSplits({"validation": 1.0}))


def test_many_documents_are_drawn_and_copies_stay_together() -> None:
    documents = [f"document {i % 700}" for i in range(1000)]
    parts = divided(source_of(documents), splits=TextSplits(TENTHS))
    assert Counter(text for texts in parts.values() for text in texts) == Counter(documents)
    names = {name: set(texts) for name, texts in parts.items()}
    assert not names["train"] & names["validation"] and not names["train"] & names["test"]
    assert not names["validation"] & names["test"]
    assert 40 < len(names["validation"]) < 100 and 100 < len(names["test"]) < 180
    other = divided(source_of(documents), splits=TextSplits(TENTHS, seed=1))
    assert set(other["test"]) != names["test"]


def test_a_document_keeps_its_split_when_others_come() -> None:
    splits = TextSplits({"validation": 0.1})
    first = divided(source_of([f"{i}" for i in range(200)]), splits=splits)
    more = divided(source_of([f"{i}" for i in range(500)]), splits=splits)
    assert set(first["validation"]) <= set(more["validation"]) and set(first["train"]) <= set(more["train"])


def test_the_unit_can_be_said() -> None:
    few, many = ["up and down " * 9] * 1 + ["left and right"] * 9, [f"text {i}" for i in range(200)]
    drawn = divided(source_of([f"{i}" for i in range(30)]), splits=TextSplits({"test": 0.3}, unit="document"))
    assert sorted(map(int, drawn["train"] + drawn["test"])) == list(range(30))
    assert max(map(int, drawn["test"])) < 29 or min(map(int, drawn["test"])) < 20, "not the last ones"
    cut = divided(source_of(many), splits=TextSplits({"test": 0.5}, unit="character"))
    assert cut["train"][0] == "text 0" and cut["test"][-1] == "text 199"
    assert "".join(cut["train"] + cut["test"]) == "".join(many)
    assert divided(source_of(few), splits=TextSplits({"test": 0.5}))["train"]


def test_repeats_of_what_is_cut_in_two_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    novel, other = "A" * 260, "B" * 240
    parts = divided(source_of([novel, other, novel]), splits=TextSplits({"test": 0.5}))
    assert parts == {"train": [novel[:250]], "test": [novel[250:], other]}
    assert "1 repeated documents are left out" in capsys.readouterr().err
    twice = Division([source := source_of([novel, other, novel])], TextSplits({"test": 0.5}))
    assert len(list(twice.parts(source))) == len(list(twice.parts(source))) == 3
    assert capsys.readouterr().err.count("left out") == 1, "said once"
    # nor in another source, whichever way that one is divided
    many = source_of([*(f"text {i}" for i in range(300)), novel])
    parts = divided(many, source_of([novel, other]), source_of([other, "C" * 40]), splits=TextSplits({"test": 0.1}))
    whole = "".join(parts["train"] + parts["test"])
    assert (whole.count("A"), whole.count("B"), whole.count("C")) == (260, 240, 40)
    assert divided(source_of(["A" * 9]), source_of(["A" * 9]), splits=TextSplits({"test": 0.5}))["test"] == ["A" * 4]


def test_files_per_split(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}!" * 10)
    files = {"train": "a.txt", "validation": "b.txt", "test": "c.txt"}
    parts = divided(*sources_of_files(str(tmp_path), files), splits=TextSplits())
    assert parts == {"train": ["a!" * 10], "validation": ["b!" * 10], "test": ["c!" * 10]}
    beside = sources_of_files(str(tmp_path / "a.txt"), {"train": "a.txt", "test": "c.txt"})
    parts = divided(*beside, splits=TextSplits({"validation": 0.5}))
    assert parts == {"train": ["a!" * 5], "validation": ["a!" * 5], "test": ["c!" * 10]}
    with pytest.raises(DataError, match="one file serves two splits"):
        sources_of_files(str(tmp_path), {"train": "a.txt", "test": "./a.txt"})


def test_caps_take_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    source = Source.of_files(str(tmp_path / "a.txt"), separator="\n", max_documents=2)
    assert [document.content for document in source.documents()] == ["one", "two"]
