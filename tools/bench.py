"""Ours against its peers and against loops written by hand: CPU seconds, step time, tokens, memory, as ratios.

python tools/bench.py --opentslm ../OpenTSLM --data ../data --write     every table, kept in docs/benchmarks/
python tools/bench.py limit instruction --repetitions 5                 some of them
python tools/bench.py --device cuda --write                             the GPU's table
python tools/bench.py smoke                                             a few seconds

Every side runs in a process of its own on one thread, with the same weights and rows, and takes turns with the others;
a ratio is the median over paired repetitions with its 95 % interval (bootstrap). A peer that is not installed is named
and left out. The tables are functions of tools/benchmarks/tables.py; `--plot` only draws what was kept.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the tables that were asked for."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))  # so that `python tools/bench.py` finds its parts and this checkout
    from tools.benchmarks import plots
    from tools.benchmarks.measure import PeerError
    from tools.benchmarks.tables import CPU, TABLES, Bench, installed
    from tools.evidence import header

    args = arguments(argv, list(TABLES))
    failed, said = False, header()  # of what is measured: results that are written change the tree
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(
            args.models or Path(folder),
            args.repetitions,
            args.steps,
            args.data,
            str(args.opentslm or ""),
            (args.backend,) if args.backend else installed(),
            args.device,
        )
        for name in [] if args.plot else args.tables or (["cuda"] if args.device == "cuda" else list(CPU)):
            print(f"== {name}: {(TABLES[name].__doc__ or '').splitlines()[0]}", flush=True)
            try:
                results = TABLES[name](bench)
            except PeerError as error:
                print(f"FAILED: {error}", file=sys.stderr)
                failed = True
                continue
            if args.write:
                RESULTS.mkdir(exist_ok=True)
                text = "".join(f"{line}\n" for result in results for line in result.lines())
                (RESULTS / f"{name}.txt").write_text(f"{said}# {(TABLES[name].__doc__ or '').splitlines()[0]}\n{text}")
                kept = {"header": said.splitlines(), "results": [result.asdict() for result in results]}
                (RESULTS / f"{name}.json").write_text(json.dumps(kept) + "\n")
    if args.write or args.plot:
        for file in plots.draw(RESULTS):
            print(f"drawn: {file}")
    return int(failed)


def arguments(argv: Sequence[str] | None, tables: list[str]) -> argparse.Namespace:
    """What to measure, and how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(tables)}; default: all of the device"
    )
    parser.add_argument("--repetitions", type=int, default=10, help="turns of every side (default 10)")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (default 2)")
    parser.add_argument("--backend", choices=("torch", "mlx"), help="default: every installed one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--opentslm", type=Path, help="a checkout of StanfordBDHG/OpenTSLM")
    parser.add_argument("--data", type=Path, help="folder with timeseriesexam, har_uci and wikitext2")
    parser.add_argument("--models", type=Path, help="where the random models are kept (default: nowhere)")
    parser.add_argument("--write", action="store_true", help="keep results in docs/benchmarks/ and draw the plots")
    parser.add_argument("--plot", action="store_true", help="only draw what was kept")
    args = parser.parse_args(argv)
    if unknown := set(args.tables) - set(tables):
        parser.error(f"unknown table {', '.join(sorted(unknown))}; there are: {', '.join(tables)}")
    if args.device == "cuda" and set(args.tables) - {"cuda"}:
        parser.error("--device cuda runs the table cuda; all others are for the CPU")
    return args


if __name__ == "__main__":
    sys.exit(main())
