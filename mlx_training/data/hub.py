"""Datasets of the Hugging Face hub: `hub:owner/name`, downloaded once into its own cache."""

import re
from pathlib import Path

from mlx_training.errors import DataError

PREFIX = "hub:"
DOWNLOADED = [f"*{suffix}" for suffix in (".txt", ".md", ".jsonl", ".csv", ".parquet", ".gz")]


def is_hub_name(path: str) -> bool:
    """Whether `dataset.path` names a dataset of the hub. Only the prefix says so: a typing error starts no download."""
    return path.startswith(PREFIX)


def download(name: str) -> Path:
    """The folder of `hub:owner/name`, `hub:owner/name@revision`, either with `/folder` or `/file` after it.

    Raises DataError when the name is wrong or the hub does not deliver it.
    """
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", name)
    if match is None:
        raise DataError(f"dataset.path: {name!r} is no name of a hub dataset; expected hub:owner/name")
    repository, revision, inside = match.groups()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(
            f"{name}: needs huggingface_hub (pip install huggingface_hub); or give a local folder"
        ) from None
    wanted = [inside, f"{inside}/*"] if inside else DOWNLOADED
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted)
    except Exception as error:  # the hub client raises many unrelated types: not found, gated, offline, ...
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DataError(
            f"{name}: the Hugging Face hub did not deliver it ({reason}). Check the name and the network (for gated "
            "data: log in), or download it and give the folder"
        ) from error
    return Path(folder) / inside if inside else Path(folder)
