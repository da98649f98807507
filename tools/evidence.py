"""Where a result comes from: the header of every committed text of results."""

import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def header() -> str:
    """Date, command, commit, versions and machine, one `# key: value` a line."""
    from mlx_training.environment import git_state, versions

    git = git_state(ROOT) or {"commit": "unknown", "dirty": False}
    known = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *map(_without_place, sys.argv)]),
        "commit": git["commit"] + (" with changes" if git["dirty"] else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions()["packages"].items()),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    return "".join(f"# {key}: {value}\n" for key, value in known.items())


def _without_place(word: str) -> str:
    """A word of the command; of a path of this machine only the name, of one in the repository what is below it."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f".../{path.name}"
