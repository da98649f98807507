"""The configurations that come with the project: `configs/` of a checkout, package data in a wheel."""

from difflib import get_close_matches
from pathlib import Path

from mlx_training.errors import ConfigError


def shipped_root() -> Path:
    """The directory of the shipped configurations."""
    package = Path(__file__).parent
    inside = package / "configs"
    root = inside if inside.is_dir() else package.parent / "configs"
    return root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root


def shipped_configs() -> dict[str, Path]:
    """Every shipped configuration: "timeseries/har" -> its file, sorted by name."""
    root = shipped_root()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(name: str | Path, *, beside: Path | None = None, source: str = "") -> Path:
    """The file that `name` means: a path (from `beside` if given), else a shipped configuration.

    The suffix may be left off, and a shipped name may begin with `configs/`. `source` (file:line) is cited when
    there is no such file (ConfigError).
    """
    given = str(name)
    base = beside or Path()
    for candidate in (base / given, base / f"{given}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = shipped_configs()
    key = given.removeprefix("configs/").removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    close = get_close_matches(key, shipped, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    place = f"{source}: extends: " if source else ""
    where = f"in {base}" if beside else "here"
    raise ConfigError(f"{place}no configuration {given!r} {where} or among the shipped: {', '.join(shipped)}{hint}")


def description(path: Path) -> str:
    """The first comment line of a configuration: what it is for."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""
