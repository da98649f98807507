"""Canaries: secrets of the environment turn up in no file, no line of stdout and no message, whatever is run."""

import importlib.util
import shutil
import subprocess

import pytest

from tests.e2e.workbench import CONFIG, DATA, Workbench

SECRETS = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN"),
    "DATABASE_PASSWORD",
)
HAS_WANDB = importlib.util.find_spec("wandb") is not None


@pytest.fixture
def canaries(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Secrets in the environment, in the remote of the repository and in its uncommitted work."""
    values = {name: f"canary{index}" + "f" * 33 for index, name in enumerate(SECRETS)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    code = bench.folder / "code.py"
    if shutil.which("git"):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
        code.write_text("KEY = None\n")
        for command in (
            ["init", "-q"],
            ["remote", "add", "origin", "https://me:canaryremote@example.invalid/x.git"],
            ["add", "code.py"],
            [*who, "commit", "-q", "-m", "code"],
        ):
            subprocess.run(["git", *command], cwd=bench.folder, check=True)
        code.write_text("KEY = 'canarydifference'\n")
    return [value.encode() for value in (*values.values(), "canaryremote", "canarydifference")]


def assert_unseen(bench: Workbench, canaries: list[bytes], said: str) -> None:
    own = {bench.folder / "code.py", *(bench.folder / ".git").rglob("*")}
    places = {str(path): path.read_bytes() for path in bench.folder.rglob("*") if path.is_file() and path not in own}
    assert len(places) > 2
    for place, content in {**places, "what was said": said.encode()}.items():
        for canary in canaries:
            assert canary not in content, f"{place} holds {canary.decode()}"


def test_no_artefact_holds_a_secret(bench: Workbench, canaries: list[bytes]) -> None:
    said = ""
    train = [
        "train",
        bench.config,
        "diagnostics.probe_every_steps=1",
        f"logging.wandb={'offline' if HAS_WANDB else 'disabled'}",
    ]
    for words in (
        [*train, "training.max_steps=2"],
        [*train, "--resume", "auto"],
        ["evaluate", bench.run],
        ["generate", bench.run, "--rows", bench.data],
        ["doctor", bench.run],
        ["plan", bench.config],
        ["validate", bench.config],
        ["env"],
        ["checkpoint", "ls", bench.run],
        ["checkpoint", "verify", bench.run],
    ):
        code, out, err = bench.main(*words, "--json")
        assert code in (0, 1), err
        said += out + err
    if HAS_WANDB:
        runs = list((bench.run / "wandb").glob("offline-run-*"))
        identity = (bench.run / "wandb_id").read_text().strip()
        assert len(runs) == 2 and all(f"-{identity}" in run.name for run in runs), "one W&B run goes on"
    assert_unseen(bench, canaries, said)


def test_an_export_holds_no_secret(bench: Workbench, canaries: list[bytes]) -> None:
    bench.use_decoder()
    bench.train("training.max_steps=1")
    bench.json("checkpoint", "export", bench.run, "--to", bench.folder / "exported", "--format", "hf")
    assert_unseen(bench, canaries, "")


def test_no_ending_repeats_a_secret(bench: Workbench, canaries: list[bytes]) -> None:
    token = canaries[1].decode()
    said = bench.refused(CONFIG, "train", bench.config, f"logging.wandb_api_key={token}")
    said += bench.refused(CONFIG, "train", bench.config, f"logging.project='{token}")
    said += bench.refused(CONFIG, "train", bench.config, f"model.llm_id=https://me:{token}@example.invalid/x")
    said += bench.refused(CONFIG, "train", bench.config, "model.llm_id=https://me:canaryremote@example.invalid/x")
    said += bench.refused(DATA, "train", bench.config, f"dataset.path={token}.jsonl")
    said += bench.refused(DATA, "evaluate", bench.folder / token)
    bench.train("training.max_steps=1")
    said += bench.refused(CONFIG, "doctor", bench.run, "logging.api_key=canaryremote")
    code, _, err = bench.main(
        "train", bench.config, "training.learning_rate=1e30", "diagnostics.max_skipped_steps=1", "output_dir=hot"
    )
    assert_unseen(bench, canaries, said + err)
    assert code == 4, err
