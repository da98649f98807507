"""What `mlx-training checkpoint` does: list a run's checkpoints, verify them, and compare two of them.

Exporting is `export.py`; how the results look is `checkpoint_text.py`.
"""

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.checkpoint import CheckpointStore
from mlx_training.checkpoint_files import (
    CONTENTS,
    MANIFEST,
    MODEL,
    NOT_JSON_OF_OURS,
    OPTIMIZER,
    STATE,
    STEP_DIRECTORY,
    Checkpoint,
    verify,
)
from mlx_training.errors import CheckpointError, UserError
from mlx_training.json_text import parse_json
from mlx_training.llm_source import safetensors_header
from mlx_training.progress import wrong_progress

Shapes = Mapping[str, tuple[int, ...]]
Problem = dict[str, Any]  # {"file", "problem", "expected", "found"}


def list_checkpoints(run: Path) -> dict[str, Any]:
    """Every checkpoint of a run, oldest first; sizes are compared with the manifest's, sums are not."""
    store = _store(run)
    names = {which: _pointed(store, which) for which in ("latest", "best")}

    def entry(path: Path) -> dict[str, Any]:
        size = sum(file.lstat().st_size for file in path.iterdir())
        saved = (path / MANIFEST if (path / MANIFEST).is_file() else path).stat().st_mtime
        return {
            "name": path.name,
            "path": str(path),
            "step": _step(path),
            "bytes": size,
            "saved": datetime.fromtimestamp(saved).astimezone().isoformat(timespec="seconds"),
            "latest": path.name == names["latest"],
            "best": path.name == names["best"],
            "complete": _is_complete(path),
        }

    found = _of_each(store.paths, entry)
    if found and not any(item["latest"] for item in found):
        found[-1]["latest"] = True  # the run has gone on since: without a usable `latest` the newest, as in resuming
    return {"run": str(run), "checkpoints": found}


def verify_checkpoints(path: Path) -> dict[str, Any]:
    """Every sum, and every shape against the run's spec, of one checkpoint or of all those of a run.

    `shapes` says whether the spec could be made: "checked", or why not. Raises CheckpointError where nothing is.
    """
    single = _is_checkpoint(path)
    store = CheckpointStore(run_of(path)) if single else _store(path)
    expected, state, sha256, note = _expected(store.directory.parent)

    def entry(checkpoint: Path) -> dict[str, Any]:
        problems = _problems(checkpoint) or _misfits(checkpoint, expected, state, sha256)
        about = {"name": checkpoint.name, "path": str(checkpoint), "step": _step(checkpoint)}
        return about | {"ok": not problems, "problems": problems}

    checked = _of_each(lambda: [path] if single and path.is_dir() else [] if single else store.paths(), entry)
    if not checked:
        raise CheckpointError(f"{path}: no checkpoint to verify: expected {path}/checkpoints/step_...; none was saved")
    pointers = [] if single else _lost_pointers(store)
    healthy = not pointers and all(entry["ok"] for entry in checked)
    return {"path": str(path), "ok": healthy, "shapes": note, "checkpoints": checked, "pointers": pointers}


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Two checkpoints (of a run: its best, else its latest): parameters, moments and the two runs' settings.

    `relative` is |a - b| / max(|a|, |b|) in the Euclidean norm. Raises CheckpointError when one cannot be read.
    """
    one, two = _load(a), _load(b)
    parameters, moments = _compare(one.model, two.model), _compare(one.optimizer, two.optimizer)
    same = all(item["identical"] for item in parameters["both"] + moments["both"])
    lonely = any(part[side] for part in (parameters, moments) for side in ("only_in_a", "only_in_b"))
    return {
        "a": {"path": str(one.path), "step": one.step},
        "b": {"path": str(two.path), "step": two.step},
        "identical": same and not lonely,
        "parameters": parameters,
        "moments": moments,
        "settings": _settings(run_of(one.path), run_of(two.path)),
    }


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint directory belongs to."""
    return checkpoint.resolve().parent.parent


def _store(run: Path) -> CheckpointStore:
    if not (run / "checkpoints").is_dir() and not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run}: neither a run (with checkpoints/) nor a checkpoint (checkpoints/step_...); give the output_dir "
            "of a training run"
        )
    return CheckpointStore(run)


def _is_checkpoint(path: Path) -> bool:
    return bool(STEP_DIRECTORY.fullmatch(path.resolve().name)) or (path / MODEL).is_file()


def _step(path: Path) -> int | None:
    found = STEP_DIRECTORY.fullmatch(path.resolve().name)
    return int(found[1]) if found else None


def _pointed(store: CheckpointStore, which: str) -> str | None:
    """The name a pointer holds. Without a usable `latest`, the newest, as in resuming."""
    names = [path.name for path in store.paths()]
    name = store.pointer(which)
    newest = names[-1] if names and which == "latest" else None
    return name if name in names else newest


def _of_each(paths: Callable[[], list[Path]], entry: Callable[[Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """An entry for every checkpoint, without those that a run that goes on drops meanwhile."""
    while found := paths():
        entries = []
        for path in found:
            try:
                made = entry(path)
            except FileNotFoundError:
                if path.is_dir():
                    raise
            if path.is_dir():
                entries.append(made)
        if entries:
            return entries
    return []


def _lost_pointers(store: CheckpointStore) -> list[Problem]:
    lost = store.lost_pointers()
    names = [path.name for path in store.paths()]
    return [
        {
            "file": str(store.directory / which),
            "problem": sentence.removeprefix(f"{store.directory / which} "),
            "expected": names,
            "found": store.pointer(which),
        }
        for which, sentence in lost.items()
        if store.lost_pointers().get(which) == sentence  # else the run goes on
    ]


def _manifest(path: Path) -> dict[str, Any]:
    """{file: {"sha256", "size"}}; empty where the manifest cannot be read."""
    try:
        return dict(parse_json((path / MANIFEST).read_bytes())["files"]) if (path / MANIFEST).is_file() else {}
    except NOT_JSON_OF_OURS:
        return {}


def _is_complete(path: Path) -> bool:
    files = _manifest(path)
    try:
        return bool(files) and all((path / name).stat().st_size == files[name]["size"] for name in (*CONTENTS, *files))
    except (OSError, KeyError, TypeError):
        return False


def _problems(path: Path) -> list[Problem]:
    """What `verify` finds, with the manifest's entry of each file beside the real one."""
    files = _manifest(path)
    found = []
    for sentence in verify(path):
        name, _, problem = sentence.partition(": ")
        expected = files.get(name, "a manifest of these files" if name == MANIFEST else None)
        found.append({"file": name, "problem": problem, "expected": expected, "found": _digest(path / name)})
    return found


def _digest(path: Path) -> dict[str, Any] | None:
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}
    except OSError:
        return None


def _expected(run: Path) -> tuple[Shapes | None, Shapes, str | None, str]:
    """Shapes of a run's parameters and optimiser state, its frozen LM's sum, and "checked" or why there are none."""
    if not (run / "config.yaml").is_file():
        return None, {}, None, f"not checked: {run} has no config.yaml"
    from mlx_training.assemble import llm_sha256
    from mlx_training.export import run_spec
    from mlx_training.trained_run import read_run_config

    try:
        spec, optim = run_spec(run), read_run_config(run).optim
    except UserError as error:  # the frozen LM or the tokenizer is somewhere else now
        return None, {}, None, f"not checked: {error}"
    shapes = {name: param.shape for name, param in spec.params().items()}
    return shapes, optim.state_shapes(spec), llm_sha256(spec), "checked"


def _misfits(path: Path, expected: Shapes | None, optimizer: Shapes, sha256: str | None) -> list[Problem]:
    """Arrays of a whole checkpoint that are not those of the run's spec and optimiser, and another frozen LM."""
    if expected is None:
        return []
    state = parse_json((path / STATE).read_bytes())
    wanted: dict[str, Shapes] = {MODEL: expected}
    wrong: list[str] = []
    if "progress" in state or safetensors_header(path / OPTIMIZER)[0]:  # else weights alone, as of an imported file
        wanted[OPTIMIZER] = optimizer
        wrong = wrong_progress(state, state["step"])
    found: list[Problem] = [{"file": STATE, "problem": text, "expected": None, "found": None} for text in wrong]
    for file, shapes in wanted.items():
        header, _ = safetensors_header(path / file)
        given = {name: tuple(entry["shape"]) for name, entry in header.items()}
        for name in [*shapes, *(given.keys() - shapes.keys())]:
            want, have = shapes.get(name), given.get(name)
            if want != have:
                held = "is missing" if have is None else f"has shape {have}"
                text = f"{name} {held}, config.yaml expects {'no such array' if want is None else want}"
                found.append({"file": file, "problem": text, "expected": want, "found": have})
    then = state.get("llm_sha256")
    if then is not None and then != sha256:
        text = f"trained with a frozen LM of sha256 {then}, model.llm_id in config.yaml now has {sha256}"
        found.append({"file": STATE, "problem": text, "expected": sha256, "found": then})
    return found


def _load(path: Path) -> Checkpoint:
    if _is_checkpoint(path):
        return CheckpointStore(run_of(path)).load(path)
    return _store(path).best_or_latest()


def _compare(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, Any]:
    both = [{"name": name, **_compare_arrays(a[name], b[name])} for name in a if name in b]
    return {"both": both, "only_in_a": sorted(a.keys() - b.keys()), "only_in_b": sorted(b.keys() - a.keys())}


def _compare_arrays(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape_a": a.shape, "shape_b": b.shape}
    if a.shape != b.shape:
        return entry | {"identical": False, "max_abs": None, "relative": None}
    one, two = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        gap, scale = np.abs(one - two), max(np.linalg.norm(one), np.linalg.norm(two))
    return entry | {
        "identical": a.dtype == b.dtype and a.tobytes() == b.tobytes(),
        "max_abs": float(gap.max(initial=0.0)),
        "relative": float(np.linalg.norm(gap) / scale) if scale else 0.0,
    }


def _settings(a: Path, b: Path) -> dict[str, Any] | None:
    """{key: [of a, of b]} for the keys of the two config.yaml that differ; None where one is absent."""
    if not all((run / "config.yaml").is_file() for run in (a, b)):
        return None
    from mlx_training.yaml_loader import read_yaml

    one, two = (dict(_leaves(read_yaml(run / "config.yaml").data)) for run in (a, b))
    return {key: [one.get(key), two.get(key)] for key in sorted({*one, *two}) if one.get(key) != two.get(key)}


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
