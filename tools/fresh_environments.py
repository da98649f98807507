"""Prove that the wheel works with one backend alone: `python tools/fresh_environments.py [--only mlx]`.

Builds the wheel, looks at what is in it, then for each extra: a fresh virtual environment, the wheel with that extra
through constraints.txt, and the commands a user would type, from an empty directory and with the other framework
absent. Takes a few minutes and a few gigabytes in the temporary directory, which it removes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
EXTRAS = {"mlx": "torch", "torch": "mlx.core"}  # extra -> the module that must be absent
SHIPPED = ("mlx_training/configs/quick_test.yaml", "mlx_training/builtin/tiny-llama-4bit/config.json")
SMALL = "training.max_steps={steps} training.batch_size=4 dataset.num_samples_train=64 evaluation.max_rows=8 \
dataset.num_samples_validation=8 dataset.num_samples_test=8 evaluation.every_steps=5 checkpoint.every_steps=5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=EXTRAS, help="prove one of the two extras")
    only = parser.parse_args().only
    extras = [only] if only else list(EXTRAS)
    with tempfile.TemporaryDirectory(prefix="mlx-training-") as folder:
        wheel = build_wheel(Path(folder))
        for extra in extras:
            prove(Path(folder) / extra, wheel, extra)
    print(f"\nfresh environments: {', '.join(extras)}: all commands ran")


def build_wheel(folder: Path) -> Path:
    """Build the wheel and check its contents: the two packages, the configurations and the built-in model."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    expected = {"mlx_training", "torch_backend", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    assert top == expected, f"the wheel's top level is {sorted(top)}, expected {sorted(expected)}"
    missing = [name for name in SHIPPED if name not in names]
    assert not missing, f"the wheel lacks {missing}"
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.2f} MB")
    return wheel


def prove(folder: Path, wheel: Path, extra: str) -> None:
    """Install `wheel[extra]` into a fresh environment and train, resume, evaluate and generate there."""
    print(f"\n== only the {extra} extra", flush=True)
    venv.create(folder / "venv", with_pip=True)
    work = folder / "work"
    work.mkdir()
    python, command = folder / "venv/bin/python", folder / "venv/bin/mlx-training"
    constraints = REPOSITORY / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, f"{wheel}[{extra}]", cwd=work)
    absent = EXTRAS[extra]
    done = run(python, "-c", f"import {absent}", cwd=work, check=False)
    assert "ModuleNotFoundError" in done.stderr, f"{absent} is importable with only the {extra} extra"

    def cli(*arguments: str) -> dict[str, Any]:
        done = run(command, *arguments, "--json", cwd=work)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    assert "quick_test" in run(command, "ls", cwd=work).stdout
    environment = cli("env")
    assert environment["auto"] == extra, environment
    assert "missing" in environment["backends"]["torch" if extra == "mlx" else "mlx"], environment
    cli("validate", "quick_test")
    first = cli("train", "quick_test", *SMALL.format(steps=5).split(), "output_dir=run")
    assert (first["backend"], first["steps"]) == (extra, 5), first
    resumed = cli("train", "quick_test", *SMALL.format(steps=10).split(), "output_dir=run", "--resume", "auto")
    assert resumed["steps"] == 10, resumed
    assert cli("evaluate", "run")["rows"] == 8
    row = {"pre_prompt": "Look at", "series": [[1.0, 2.0, 3.0]], "series_text": ["the series"], "post_prompt": "Trend?"}
    (work / "rows.jsonl").write_text(json.dumps({**row, "answer": ""}) + "\n")
    cli("generate", "run", "--rows", "rows.jsonl")
    cli("train", "tiny_llama", "training.max_steps=2", "training.batch_size=8", "output_dir=decoder")
    other = "torch" if extra == "mlx" else "mlx"
    refused = run(command, "train", "quick_test", "--backend", other, "output_dir=other", cwd=work, check=False)
    assert refused.returncode == 2, refused
    assert f"pip install 'mlx-training[{other}]'" in refused.stderr, refused.stderr


def run(*command: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout's import path; print it, and its output when it fails."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if check and done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\nexit code {done.returncode}: {shlex.join(words)}")
    return done


if __name__ == "__main__":
    main()
