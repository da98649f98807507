"""Draw a metric of several runs over each other: the picture that shows two backends learning alike.

.venv/bin/python tools/plot_runs.py runs/quick_test_torch runs/quick_test_mlx --out docs/loss_curves.png
"""

import argparse
from pathlib import Path
from typing import Any

from mlx_training.json_lines import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--metric", default="loss", help="name in metrics.jsonl (default: loss)")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(args.runs):
        records = [record for record in read_metrics(run / "metrics.jsonl") if args.metric in record]
        style: dict[str, Any] = {
            "linewidth": 3.5 if index == 0 else 1.2,
            "alpha": 0.5 if index == 0 else 1.0,
        }  # the first is underneath
        axes.plot([r["step"] for r in records], [r[args.metric] for r in records], label=run.name, **style)
    axes.set(xlabel="step", ylabel=f"{args.metric} (nats per token)" if args.metric.endswith("loss") else args.metric)
    axes.legend()
    axes.grid(alpha=0.3)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
