"""Where a frozen pretrained language model comes from, and what its files say. No framework is imported."""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.json_text import parse_json
from mlx_training.llm_config import normalize_llm_config

BUILTIN = Path(__file__).parent / "builtin"
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]
FULL_HASH_LIMIT = 50_000_000  # bytes of weights up to which every byte is hashed
SAMPLES, SAMPLE_SIZE = 64, 65_536
DENSE_SHARE = 0.5  # of the free memory that expanded weights may take

BITS = (2, 3, 4, 5, 6, 8)  # widths and groups of MLX's affine quantisation
GROUP_SIZES = (32, 64, 128)
Shape = Sequence[int]


@dataclass(frozen=True)
class LLMInfo:
    """What can be said of a language model without loading it."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    tie: bool  # the embedding is also the head
    quantization: Mapping[str, Any] | None  # {"group_size", "bits", ...} as MLX writes it
    sha256: str  # of config.json and the weight files
    hashed: str  # "full", or "sampled": sizes and 64 evenly spaced blocks of each file (over 50 MB of weights)


def resolve_llm(llm_id: str, revision: str | None = None) -> Path:
    """The local directory of `llm_id`: `builtin/NAME`, a directory, or a Hugging Face id `org/name`.

    What looks like a path is never looked up on the hub, so that a typing error cannot start a download.

    Raises:
        ConfigError: no such directory or builtin model, or the hub cannot deliver it.
    """
    if llm_id.startswith("builtin/"):
        directory = BUILTIN / llm_id.removeprefix("builtin/")
        if directory.is_dir() and directory.parent == BUILTIN and directory.name != "..":
            return directory
        known = sorted(f"builtin/{p.name}" for p in BUILTIN.glob("*") if (p / "config.json").is_file())
        raise ConfigError(f"no builtin model is called {llm_id!r}; there are: {', '.join(known) or 'none'}")
    path = Path(llm_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        own = "; a checkpoint of OpenTSLM is what a run starts from: training.init_from" if path.suffix == ".pt" else ""
        raise ConfigError(f"{llm_id!r} is a file; give the directory that holds config.json and *.safetensors{own}")
    if _looks_like_path(llm_id):
        near = _near(path)
        hint = f"did you mean {' or '.join(map(str, near))}? " if near else ""
        raise ConfigError(
            f"there is no directory {llm_id!r}. {hint}Give an existing directory, builtin/NAME, or a hub id 'org/name'"
        )
    return _download(llm_id, revision)


def describe_llm(directory: Path) -> LLMInfo:
    """Sizes, quantisation and a fingerprint, from `config.json` and the files' bytes."""
    config = read_llm_config(directory)
    sha256, hashed = fingerprint([directory / "config.json", *weight_files(directory)])
    return LLMInfo(
        model_type=config["model_type"],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        tie=config["tie_word_embeddings"],
        quantization=config.get("quantization"),
        sha256=sha256,
        hashed=hashed,
    )


def read_llm_config(directory: Path) -> dict[str, Any]:
    """`config.json`, normalised so that both backends build the same model from it.

    Raises:
        CheckpointError: the directory or its `config.json` is missing or unreadable.
        ConfigError: an architecture or setting that is not proven equal on both backends.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        what = "has no config.json" if path.parent.is_dir() else "does not exist"
        raise CheckpointError(
            f"{directory} {what}; expected a model directory in Hugging Face or MLX format, or a run of family decoder"
        )
    try:
        config = parse_json(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"the top level is a {type(config).__name__}, expected an object")
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download the model again") from None
    return normalize_llm_config(config, source=str(path))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index if it has one, else all of them.

    Raises:
        CheckpointError: none, one that the index names is missing, one is cut off, or the index is garbled.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(map(str, {*parse_json(index.read_bytes())["weight_map"].values()}))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{index} has no weight_map of file names; download it again") from None
        if outside := [name for name in names if Path(name).name != name or name == ".."]:
            raise CheckpointError(f"{index} names {', '.join(outside)}; weight files stand beside it. Not opened")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)} named in {index.name}; download it again")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no model*.safetensors; weights in other formats are not read")
    for file in files:
        safetensors_header(file)
    return files


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """{name: {"dtype", "shape", "data_offsets"}}, and where the data begins.

    Raises:
        CheckpointError: the file is cut off, or is no safetensors file (a Git LFS pointer, say).
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(start - 8) if start <= size else b"")
        header.pop("__metadata__", None)
        expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} ({size} bytes) is not a safetensors file; download it again") from None
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes where its header announces {expected}; download it again")
    try:
        with safe_open(path, framework="numpy"):  # shapes, types and places of every tensor agree, and none overlap
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} has a header that is not valid ({error}); download it again") from None
    return header, start


def stays_packed(weights: str, dense_bytes: int, free_bytes: int) -> bool:
    """Whether quantised weights stay as they are: "resident", or "auto" where expanded ones take too much memory."""
    return weights == "resident" or (weights == "auto" and dense_bytes > DENSE_SHARE * free_bytes)


def packed_note(dense_bytes: int, free_bytes: int) -> str:
    """What is said when `auto` keeps weights packed."""
    return (
        f"note: the frozen model's quantised weights stay packed: expanded they take {dense_bytes / 1e9:.1f} GB, and "
        f"{free_bytes / 1e9:.1f} GB of memory are free (model.llm_weights=dequantized expands them all the same)"
    )


def match_weights(
    expected: Mapping[str, Shape], stored: Mapping[str, Shape], directory: Path
) -> dict[str, tuple[int, int]]:
    """Checks that the stored tensors are those of the model, dense or packed.

    Args:
        expected: {name: shape} of the model's dense parameters.
        stored: {name: shape} of the checkpoint; a packed `x.weight` has `x.scales` and `x.biases` beside it.

    Returns:
        {path: (group_size, bits)} of the packed layers, read off the shapes (so mixed precision needs no lookup).

    Raises:
        CheckpointError: naming the missing, unused and misshaped tensors.
    """
    dense = {name: tuple(shape) for name, shape in stored.items()}
    packed = {}
    for path in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        weight, scales, biases = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
        if weight not in expected or weight not in stored or stored.get(biases) != stored[scales]:
            continue  # reported below as unused
        in_size = expected[weight][-1]
        group_size = in_size // stored[scales][-1]
        bits = stored[weight][-1] * 32 // in_size
        exact = stored[scales][-1] * group_size == in_size and stored[weight][-1] * 32 == bits * in_size
        if exact and bits in BITS and group_size in GROUP_SIZES:
            packed[path] = (group_size, bits)
            dense[weight] = (*dense[weight][:-1], in_size)
            del dense[scales], dense[biases]

    problems = []
    for what, names in (("missing", expected.keys() - dense.keys()), ("unused", dense.keys() - expected.keys())):
        if names:
            problems.append(f"{len(names)} {what}: {_some(sorted(names))}")
    shapes = [
        f"{name} is {dense[name]}, config.json says {tuple(expected[name])}"
        for name in sorted(expected.keys() & dense.keys())
        if tuple(expected[name]) != dense[name]
    ]
    if shapes:
        problems.append(f"{len(shapes)} of the wrong shape: {_some(shapes)}")
    if problems:
        raise CheckpointError(f"the weights in {directory} do not fit its config.json; " + "; ".join(problems))
    return packed


def is_weight(name: str, config: Mapping[str, Any]) -> bool:
    """False for what old checkpoints store needlessly: RoPE tables, and a copy of a tied head."""
    return "rotary_emb" not in name and not (config["tie_word_embeddings"] and name.startswith("lm_head."))


def is_norm(name: str) -> bool:
    """Whether a weight belongs to a normalisation layer."""
    return name.rpartition(".")[0].endswith("norm")


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "")


def _looks_like_path(llm_id: str) -> bool:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", llm_id) or llm_id.startswith((".", "~")):
        return True
    return Path(llm_id).parent.is_dir() or bool(_near(Path(llm_id)))  # "models/lama" beside an existing models/


def _near(path: Path) -> list[Path]:
    """Existing directories with a name like this one beside it, or of this name in a directory like its own."""
    if path.parent.is_dir():
        return [path.parent / name for name in difflib.get_close_matches(path.name, _directories(path.parent))]
    parents = difflib.get_close_matches(path.parent.name, _directories(path.parent.parent))
    return [found for name in parents if (found := path.parent.parent / name / path.name).is_dir()]


def _directories(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _download(llm_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"there is no local directory {llm_id!r}, and huggingface_hub, which would download it, is not installed; "
            "install the extra 'mlx' or 'torch', or give a local directory"
        ) from None
    try:
        return Path(snapshot_download(llm_id, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub client raises many unrelated types: not found, gated, offline, ...
        raise ConfigError(
            f"there is no local directory {llm_id!r}, and the Hugging Face hub did not deliver revision "
            f"{revision or 'main'!r} of it ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Check the name and the network (for gated models: log in), or download it and give the directory"
        ) from error


def fingerprint(files: Sequence[Path]) -> tuple[str, str]:
    """sha256 over names, sizes and bytes, and "full"; of large checkpoints of evenly spaced blocks, and "sampled"."""
    full = sum(path.stat().st_size for path in files) <= FULL_HASH_LIMIT
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            if full:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * max(size - SAMPLE_SIZE, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest(), "full" if full else "sampled"
