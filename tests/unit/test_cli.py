"""The command line: flags, JSON, exit codes, and what it must not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_training import cli
from mlx_training.errors import DataError, DivergedError, Interrupted

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def trained(monkeypatch):
    """A stand-in for the trainer that records its arguments."""
    calls = []

    class Trainer:
        @staticmethod
        def train(config, *, resume=None, allow_change=()):
            print("progress")
            calls.append((config, resume, allow_change))
            return {"run": Path(config.output_dir), "loss": np.float32(0.5), "eval": {"accuracy": float("nan")}}

    monkeypatch.setitem(sys.modules, "mlx_training.trainer", Trainer)
    return calls


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys, time; start = time.process_time()\n"
        "from mlx_training import cli; code = cli.main(['--help'])\n"
        "used = time.process_time() - start\n"
        "heavy = {'mlx', 'torch', 'mlx_lm', 'transformers', 'pydantic', 'numpy', 'yaml'} & {*sys.modules}\n"
        "sys.exit(f'{code} {used:.2f} {heavy}' if code or heavy or used > 0.4 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout


def test_reading_a_configuration_imports_no_framework():
    program = (
        "import sys; from mlx_training import cli, config; config.load_config('quick_test')\n"
        "heavy = {'mlx', 'torch', 'mlx_lm', 'transformers', 'matplotlib', 'rich'} & {*sys.modules}\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_and_json(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*verb.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and cli.VERBS[verb].example in text.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["training.max_steps=7", "--backend", "mlx", "--resume", "auto", "training.batch_size=3", "--json"],
        ["--json", "--backend", "mlx", "training.max_steps=7", "training.batch_size=3", "--resume", "auto"],
    ],
)
def test_overrides_stand_anywhere_and_json_is_the_last_line(arguments, trained, capsys):
    assert cli.main(["train", "quick_test", *arguments]) == 0
    ((config, resume, allow_change),) = trained
    assert (config.training.max_steps, config.training.batch_size, config.backend) == (7, 3, "mlx")
    assert (resume, allow_change) == ("auto", [])
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": "runs/quick_test", "loss": 0.5, "eval": {"accuracy": None}}
    assert out.count("\n") == 1 and "progress" in err


def test_changes_are_allowed_one_by_one(trained):
    flags = ["--allow-change", "model.llm_id", "--resume", "auto", "--allow-change", "dataset.path"]
    assert cli.main(["train", "quick_test", *flags]) == 0
    assert trained[0][1:] == ("auto", ["model.llm_id", "dataset.path"])


def test_people_get_text(trained, capsys):
    assert cli.main(["train", "quick_test"]) == 0
    assert capsys.readouterr().out == "progress\nrun: runs/quick_test\nloss: 0.5\neval:\n  accuracy: nan\n"
    assert trained[0][0].backend == "auto" and trained[0][1] is None


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (DataError("bad rows"), 3),
        (DivergedError("loss is nan", 1), 4),
        (Interrupted(2, "saved step 7"), 130),
        (Interrupted(15), 143),
        (KeyboardInterrupt(), 130),
        (FileNotFoundError(2, "No such file or directory", "gone.npz"), 3),
    ],
)
def test_exit_codes(raised, code, monkeypatch, capsys):
    def train(config, *, resume=None, allow_change=()):
        raise raised

    monkeypatch.setitem(sys.modules, "mlx_training.trainer", type("Trainer", (), {"train": staticmethod(train)}))
    assert cli.main(["train", "quick_test", "--json"]) == code
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("interrupted" if code > 100 else "error: ")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["trian", "quick_test"], 2, "unknown verb 'trian'"),
        (["trian", "quick_test"], 2, "did you mean train?"),
        (["checkpoint"], 2, "unknown verb 'checkpoint'; the verbs are checkpoint ls, checkpoint verify, "),
        (["checkpoint", "verfy", "run"], 2, "did you mean checkpoint verify?"),
        (["checkpoint", "ls", "nowhere"], 3, "RUN 'nowhere' is not a directory"),
        (["checkpoint", "verify", "nowhere"], 3, "RUN|CHECKPOINT 'nowhere' is not a directory"),
        (["checkpoint", "diff", ".", "nowhere"], 3, "B 'nowhere' is not a directory; give the output_dir of a"),
        (["checkpoint", "export", "nowhere", "--to", "x", "--format", "hf"], 3, "RUN 'nowhere' is not a directory"),
        (["validate", "x" * 5000], 3, "File name too long"),
        (["train", "missing.yaml"], 2, "no configuration 'missing.yaml'"),
        (["train", "quick_test", "training.max_steps=x"], 2, "override: training.max_steps: given the text 'x'"),
        (["train", "quick_test", "nonsense"], 2, "'nonsense' is not key=value"),
        (["evaluate", "nowhere"], 3, "RUN 'nowhere' is not a directory"),
        (["evaluate", ".", "--data", "nowhere.jsonl"], 3, "--data 'nowhere.jsonl' is not a file"),
        (["generate", ".", "--rows", "nowhere.jsonl"], 3, "--rows 'nowhere.jsonl' is not a file"),
    ],
)
def test_mistakes_are_one_clear_message(argv, code, message, capsys):
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "argv",
    [
        ["train"],
        ["train", "quick_test", "--fast"],
        ["evaluate", ".", "--split", "test", "--data", "x"],
        ["checkpoint", "diff", "one"],
        ["checkpoint", "export", ".", "--to", "x"],
        ["checkpoint", "export", ".", "--to", "x", "--format", "gguf"],
        ["checkpoint", "export", ".", "--to", "x", "--format", "mlx", "--bits", "5"],
        ["validate", "quick_test", "--allow-change", "model"],
    ],
)
def test_wrong_flags_exit_with_2(argv):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_for_the_checkpoint_verbs(flag, capsys):
    assert cli.main(["checkpoint", flag]) == 0
    assert "\n  checkpoint export " in capsys.readouterr().out


def test_ls_and_schema(capsys):
    assert cli.main(["ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["configs"]
    assert {"quick_test", "timeseries/har"} <= {config["name"] for config in listed}
    assert all(config["description"] and os.path.isfile(config["path"]) for config in listed)
    assert cli.main(["ls"]) == 0
    assert "timeseries/curriculum/stage1" in capsys.readouterr().out
    assert cli.main(["schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
