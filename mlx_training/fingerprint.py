"""What the rows of a run are, in one line: a run that goes on with other rows than it began with is another run."""

import hashlib

import numpy as np

from mlx_training.assemble import Data, RowData

GENERATED = ("questions", "corpus")  # a function of the configuration


def fingerprint(data: Data) -> str | None:
    """Number of rows (tokens of text) of every split and a SHA-256 of what they hold; None of generated ones."""
    if data.config.dataset.format in GENERATED:
        return None
    digest = hashlib.sha256()
    sizes = []
    if isinstance(data, RowData):
        for name, rows in data.splits.items():
            sizes.append(f"{len(rows)} {name}")
            for row in rows:
                texts = (name, row.pre_prompt, *row.series_text, row.post_prompt, row.answer, *row.options, row.id)
                digest.update(repr(texts).encode("utf-8", "surrogatepass"))
                for series in row.series:
                    digest.update(series.tobytes())
    else:
        for name, streams in data.streams.items():
            sizes.append(f"{sum(stream.tokens.size for stream in streams)} {name}")
            digest.update(name.encode())
            for stream in streams:
                digest.update(np.ascontiguousarray(stream.tokens).data)  # no copy: it may be larger than memory
    return f"{', '.join(sizes)}; sha256 {digest.hexdigest()[:16]}"
