"""Train the runs of record and keep what came out, a text and a picture each, in docs/records/.

python tools/record.py                   every record: some hours on one x86 core
python tools/record.py mainrun sinks     these ones

Each record is a module of tools/records and says there what it trains and compares. Runs are in runs/records/ and go on
where they stopped; MLX_TRAINING_DATA names the folder of real data (default: shared/data beside the checkout).
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ("families", "mainrun", "sinks", "sweeps", "vocabulary", "lora", "wikitext", "backends", "one_step_253m")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the records that were asked for."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # two threads under load: 100 times slower
    sys.path.insert(0, str(ROOT))  # so that `python tools/record.py` finds its records and this checkout
    from tools.evidence import header
    from tools.records.lab import RESULTS, Lab

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="*", metavar="RECORD", help=f"default: all of {', '.join(RECORDS)}")
    names = parser.parse_args(argv).records or RECORDS
    if unknown := set(names) - set(RECORDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the records are {', '.join(RECORDS)}")
    for name in names:
        started = time.monotonic()
        record = importlib.import_module(f"tools.records.{name}")
        lines = record.make(Lab(name))
        about = (record.__doc__ or "").strip()
        text = "\n".join(
            [about, "", *lines, "", f"({time.monotonic() - started:.0f} s, runs that were finished apart)"]
        )
        print(text, flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.txt").write_text(header() + "\n" + text + "\n")


if __name__ == "__main__":
    main()
