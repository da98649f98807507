"""The documentation says what the code does: tables, examples, pasted errors and links."""

import re
from pathlib import Path

import pytest

from mlx_training.config import load_config
from mlx_training.data.rows import read_rows
from mlx_training.errors import ConfigError
from tools.document_config import COMMAND, PAGE, page

DOCS = PAGE.parent
PAGES = [
    DOCS / f"{name}.md"
    for name in (
        "checkpoints",
        "configuration",
        "data",
        "doctor",
        "generation",
        "grad_norm_is_zero",
        "language_models",
        "lora",
        "opentslm",
        "optimizers",
        "parity",
        "plan",
        "scale_out",
    )
]
TITLED = re.compile(r"```yaml\n# my.yaml\n(.*?)```\n\n```\n\$ mlx-training validate my.yaml (.*?)\n(.*?)```", re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


SNIPPETS = [(path.stem, text) for path in PAGES for text in blocks(path, "yaml") if not text.startswith("# my.yaml")]


def test_the_tables_of_keys_are_fresh() -> None:
    current = PAGE.read_text(encoding="utf-8")
    assert page(current) == current, f"docs/{PAGE.name} is stale; run {COMMAND}"


@pytest.mark.parametrize(("name", "text"), SNIPPETS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SNIPPETS)])
def test_every_yaml_is_a_configuration(name: str, text: str, tmp_path: Path) -> None:
    """As it stands, or laid over the least that a run needs."""
    needed = "model: {family: timeseries}\ndataset: {path: rows.jsonl}\ntraining: {max_steps: 1}\n"
    (tmp_path / "needed.yaml").write_text(needed)
    whole = "extends:" in text or all(f"{key}:" in text for key in ("model", "dataset", "training"))
    (tmp_path / "c.yaml").write_text(text if whole else f"extends: needed\n{text}")
    without_path = ["dataset.path=null"] if "format: questions" in text and not whole else []
    load_config(tmp_path / "c.yaml", without_path)


def test_the_pasted_errors_are_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TITLED.search(PAGE.read_text(encoding="utf-8"))
    assert found
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(f"# my.yaml\n{found[1]}")
    with pytest.raises(ConfigError) as error:
        load_config("my.yaml", [found[2]])
    assert f"error: {error.value}\n" == found[3]


def test_the_example_rows_are_rows(tmp_path: Path) -> None:
    (example,) = blocks(DOCS / "data.md", "jsonl")
    (tmp_path / "rows.jsonl").write_text(example)
    assert [row.answer for row in read_rows(tmp_path / "rows.jsonl")] == ["rising", "the flow"]


@pytest.mark.parametrize("path", [*PAGES, DOCS.parent / "README.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", path.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        other = path.parent / file if file else path
        assert other.is_file(), target
        if not heading:
            continue
        titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert heading in slugs, target
