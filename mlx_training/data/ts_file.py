"""The `.ts` format of the UCR/UEA archives (format of sktime and aeon).

A header of `@name value` lines and `#` comments, then `@data` and one recording per line: channels
separated by ":", samples by ",", the class label last. Channels and recordings may differ in length.
"""

from pathlib import Path

import numpy as np

from mlx_training.data.files import read_text
from mlx_training.data.rows import numbers_from
from mlx_training.errors import DataError

Recording = tuple[str, tuple[np.ndarray, ...], str]  # "file:line", series per channel, class label


def read_ts(path: Path) -> tuple[list[Recording], list[str]]:
    """All recordings of a labelled `.ts` file, and the header's class labels."""
    header: dict[str, list[str]] = {}
    recordings: list[Recording] = []
    in_data = False
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where, line = f"{path}:{number}", line.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            recordings.append(_recording(line, header, where))
        elif line.startswith("@"):
            name, *values = line[1:].split() or [""]
            header[name.lower()] = values
            if name.lower() == "data":
                _check_header(header, path)
                in_data = True
        else:
            raise DataError(f"{where}: expected '@name value' or '@data' in the header; got {line[:60]!r}")
    if not in_data:
        raise DataError(f"{path}: no '@data' line; is this a .ts file?")
    return recordings, header["classlabel"][1:]


def _check_header(header: dict[str, list[str]], path: Path) -> None:
    if _first(header, "timestamps") == "true":
        raise DataError(f"{path}: series with time stamps are not supported; export them at a fixed rate")
    if _first(header, "classlabel") != "true":
        raise DataError(f"{path}: no class labels ('@classLabel true ...' is missing); only classification is imported")
    if not _first(header, "dimensions", "1").isdecimal():
        raise DataError(f"{path}: '@dimensions {' '.join(header['dimensions'])}': expected the number of channels")


def _first(header: dict[str, list[str]], name: str, default: str = "false") -> str:
    return next(iter(header.get(name, [default])), "").lower()


def _recording(line: str, header: dict[str, list[str]], where: str) -> Recording:
    *channels, label = line.split(":")
    expected = int(header["dimensions"][0]) if "dimensions" in header else None
    if not channels or expected not in (None, len(channels)):
        raise DataError(f"{where}: {len(channels)} channels before the label; expected {expected or 'at least 1'}")
    labels = header["classlabel"][1:]
    if label.strip() not in labels:
        raise DataError(f"{where}: class label {label.strip()!r} is not in the header's {', '.join(labels)}")
    return where, tuple(_channel(text, where, c) for c, text in enumerate(channels)), label.strip()


def _channel(text: str, where: str, channel: int) -> np.ndarray:
    samples = [sample.strip() for sample in text.split(",")]
    if "?" in samples:
        raise DataError(
            f"{where}: channel {channel} has a missing sample ('?') at position {samples.index('?')}; "
            "fill the gap or remove the recording"
        )
    try:
        values = [float(sample) for sample in samples]
    except ValueError as error:
        raise DataError(f"{where}: channel {channel}: not a number ({error})") from error
    return numbers_from(values, where, f"channel {channel}")
