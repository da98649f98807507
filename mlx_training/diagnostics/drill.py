"""The resume drill: a process that knows nothing but a configuration and a saved state takes the next two steps.

`python -m mlx_training.diagnostics.drill FOLDER`: config.yaml and saved.safetensors in, resumed.safetensors out.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import load_file, save_file

from mlx_training.backend import Arrays, Step
from mlx_training.config import RunConfig, load_config, to_yaml
from mlx_training.diagnostics.subject import Subject, from_config
from mlx_training.errors import UserError

RATE = 1e-3


class Saved(NamedTuple):
    """Parameters and optimiser state."""

    model: Arrays
    optimizer: Arrays


def save(subject: Subject, step: Step) -> Saved:
    """What a checkpoint holds: the weights' averages, if the step keeps some, and the state with those that train."""
    with getattr(step, "averaged", nullcontext)():  # a step of one's own need not know of averages
        model = subject.backend.export(subject.model)
    return Saved(model, step.export())


def steps(subject: Subject, step: Step, numbers: Sequence[int]) -> None:
    """Take these steps, each on the micro-batch of its number."""
    for number in numbers:
        step([subject.batch(number - 1)], step=number, lr=dict.fromkeys(subject.spec.groups, RATE))


def in_a_fresh_process(config: RunConfig, backend: str, saved: Saved) -> Arrays:
    """Parameters after steps 3 and 4, taken elsewhere. Raises UserError with the other process's last words."""
    with tempfile.TemporaryDirectory(prefix="resume-drill-") as name:
        folder = Path(name)
        own = config.model_copy(update={"backend": backend})
        (folder / "config.yaml").write_text(to_yaml(own), encoding="utf-8")
        arrays = {f"{kind}/{n}": a for kind, part in saved._asdict().items() for n, a in part.items()}
        save_file(arrays, folder / "saved.safetensors")
        command = [sys.executable, "-m", "mlx_training.diagnostics.drill", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise UserError(f"a fresh process could not resume: {done.stderr.strip()[-500:]}")
        return load_file(folder / "resumed.safetensors")


def main() -> None:
    folder = Path(sys.argv[1])
    subject = from_config(load_config(folder / "config.yaml"))
    arrays = load_file(folder / "saved.safetensors")
    model, optimizer = (
        {n.removeprefix(f"{kind}/"): a for n, a in arrays.items() if n.startswith(f"{kind}/")} for kind in Saved._fields
    )
    subject.backend.load(subject.model, model)
    step = subject.new_step()
    step.load(optimizer)
    steps(subject, step, (3, 4))
    save_file(save(subject, step).model, folder / "resumed.safetensors")


if __name__ == "__main__":
    main()
