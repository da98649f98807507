"""The rules that keep the shared half free of frameworks and the two backends one model."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MLX, TORCH = REPOSITORY / "mlx_training" / "mlx_backend", REPOSITORY / "torch_backend"
TORCH_ALONE = {"sharding.py"}  # MLX has nothing like FSDP2
NOT_MIRRORED = {"layer_parts.py"}  # parts of frozen layers: mlx-lm's there, our own here
FRAMEWORKS = {"mlx", "mlx_lm", "torch", "transformers"}

# Imports run one way: a module may import from its own room and from the rooms before it.
CONFIGURATION = {
    *(
        "yaml_loader",
        "configs",
        "config_section",
        "config_dataset",
        "config_pretrained",
        "config_timeseries",
        "config_language",
        "config_decoder",
        "config_ssm",
        "config_model",
        "config_samples",
        "config_training",
        "config_schema",
    ),
    *("config_presets", "config_model_checks", "config_objectives", "config_performance", "config_checks"),
    *("config_errors", "config"),
}
ROOMS = (
    {"errors"},
    {"spec", "blas", "environment", "llm_config", "torch_archive", "json_text", "optim", "schedule"} | CONFIGURATION,
    {
        "init",
        "json_lines",
        "checkpoint_files",
        "checkpoint_writer",
        "ops",
        "data",
        "objectives",
        "metrics",
        "sampling",
        "protocols",
        "llm_source",
        "notes",
        "pretrained",
        "trained_run",
        "waiting",
        "quantize",
        "hf_mamba",
        "hf_gpt2",
        "hf_llama",
        "huggingface",
        "progress",
        "run_directory",
        "run_lock",
        "signals",
        "checkpoint",
        "opentslm",
        "adapters",
        "initial",
        "merge",
    },
    {"backend"},
    {
        "tracking",
        "events",
        "memory",
        "fingerprint",
        "assemble",
        "resume",
        "trainer",
        "generate",
        "evaluate",
        "samples",
        "together",
        "every_checkpoint",
        "export",
        "import_run",
        "diagnostics",
    },
    {"checkpoint_tools", "checkpoint_text"},
    {"verbs", "flags", "cli"},
)
# The left half and the protocols; `llm_*` read a pretrained directory, `checkpoint` checks names and shapes.
LEFT_HALF = {"errors", "spec", "init", "ops", "data", "objectives"}
OPEN_TO_BACKENDS = LEFT_HALF | {"backend", "optim", "blas", "environment", "llm_config", "llm_source", "checkpoint"}
FRAMEWORK_HOOKS = {"train"}  # methods one framework calls itself: torch's switch between training and evaluation
MAY_IMPORT_A_FRAMEWORK = {"environment"}  # inside a function, to ask an installed framework for its device


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def shared_files() -> list[Path]:
    return [path for path in sorted((REPOSITORY / "mlx_training").rglob("*.py")) if MLX not in path.parents]


def room_of(module: str) -> int:
    return next((index for index, room in enumerate(ROOMS) if module in room), -1)


def module_of(path: Path) -> str:
    """mlx_training/data/rows.py -> data; mlx_training/cli.py -> cli."""
    return path.relative_to(REPOSITORY / "mlx_training").parts[0].removesuffix(".py")


def shared_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of the imports of this package: `mlx_training.data.rows` gives data."""
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "mlx_training" and len(parts) > 1:
            yield line, parts[1]


def test_shared_modules_import_earlier_rooms_only() -> None:
    wrong = []
    for path in shared_files():
        module = module_of(path)
        if module == "__init__":
            continue
        assert room_of(module) >= 0, f"{path.name}: give mlx_training.{module} a room in ROOMS"
        for line, other in shared_imports(path):
            if other != module and room_of(other) > room_of(module):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line}: {module} may not import {other}")
    assert not wrong, "\n".join(wrong)


def test_backends_import_the_left_half_only() -> None:
    wrong = []
    for folder, own in ((MLX, "mlx_backend"), (TORCH, "torch_backend")):
        for path in sorted(folder.glob("*.py")):
            for line, module in shared_imports(path):
                if module not in OPEN_TO_BACKENDS | {own}:
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{line}: a backend may not import {module}")
            others = FRAMEWORKS & {name.split(".")[0] for _, name in imports(path)}
            allowed = {"mlx", "mlx_lm"} if own == "mlx_backend" else {"torch"}
            if others - allowed:
                wrong.append(f"{path.relative_to(REPOSITORY)}: imports {', '.join(sorted(others - allowed))}")
    assert not wrong, "\n".join(wrong)


def test_only_backend_get_names_the_backend_packages() -> None:
    wrong = []
    for path in shared_files():
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "torch_backend" or parts[:2] == ["mlx_training", "mlx_backend"]:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line}: imports {name}; ask mlx_training.backend.get")
            if parts[0] in FRAMEWORKS and module_of(path) not in MAY_IMPORT_A_FRAMEWORK:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line}: imports {parts[0]} outside a backend")
        strings = {node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant)}
        if strings & {"torch_backend", "mlx_training.mlx_backend"} and path.name != "backend.py":
            wrong.append(f"{path.relative_to(REPOSITORY)}: names a backend package; ask mlx_training.backend.get")
    assert not wrong, "\n".join(wrong)


def test_importing_the_cli_loads_no_framework() -> None:
    code = "import sys, mlx_training.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "mlx_training" in loaded
    slow = {"matplotlib", "pyarrow", "rich", "sentencepiece", "sklearn", "scipy", "pandas", "wandb"}
    assert not loaded & (FRAMEWORKS | slow)


def public_names(path: Path) -> list[str]:
    """Public classes with their public methods, and public functions, each with its arguments, in order."""
    found = []
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append(f"{node.name}{arguments(node)}")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found.append(f"class {node.name}")
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or method.name in FRAMEWORK_HOOKS:
                    continue
                if not method.name.startswith("_") or method.name in ("__init__", "__call__"):
                    name = "__call__" if method.name == "forward" else method.name  # the frameworks' own spelling
                    found.append(f"    {node.name}.{name}{arguments(method)}")
    return found


def arguments(function: ast.FunctionDef) -> str:
    """Names and which of them have defaults; the types are each framework's own."""
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    first_default = len(positional) - len(given.defaults)
    shown = [name + ("=" if index >= first_default else "") for index, name in enumerate(positional)]
    shown += [f"*{given.vararg.arg}"] if given.vararg else ["*"] if given.kwonlyargs else []
    shown += [
        argument.arg + ("=" if default else "")
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return f"({', '.join(shown)})"


def test_backends_have_the_same_files() -> None:
    assert {path.name for path in TORCH.glob("*.py")} - {path.name for path in MLX.glob("*.py")} == TORCH_ALONE
    assert {path.name for path in MLX.glob("*.py")} <= {path.name for path in TORCH.glob("*.py")}


@pytest.mark.parametrize("name", sorted({path.name for path in MLX.glob("*.py")} - NOT_MIRRORED))
def test_mirrored_files_have_the_same_public_names(name: str) -> None:
    assert public_names(MLX / name) == public_names(TORCH / name)
