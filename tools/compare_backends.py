"""MLX against PyTorch, layer by layer: outputs, loss and gradients of one batch, and where they first part.

    python tools/compare_backends.py CONFIG [--batch 0] [--tolerance 1e-4] [key=value ...]

Both get the same initial values. Differences are relative, ||mlx - torch|| / ||torch||; exit code 1 beyond tolerance.
"""

import argparse
import sys
from collections.abc import Sequence

from mlx_training.config import load_config
from mlx_training.diagnostics.compare import compare
from mlx_training.diagnostics.subject import from_config
from mlx_training.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 beyond the tolerance, or that of what is wrong with the configuration or its data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--batch", type=int, default=0, help="training micro-batch by index (default: 0)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of every relative difference (default: 1e-4)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, as for train")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, [*args.overrides, "device=cpu"])
        mlx, torch = (from_config(config, name) for name in ("mlx", "torch"))
        torch.backend.load(torch.model, mlx.backend.export(mlx.model))
        found = compare(mlx.backend, mlx.model, torch.backend, torch.model, mlx.objective, mlx.batch(args.batch))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(found.table(args.tolerance))
    first = found.first_divergence(args.tolerance)
    print(f"\nfirst divergence: {first}" if first else f"\nall {len(found.rows)} within {args.tolerance:.0e}")
    return 1 if first else 0


if __name__ == "__main__":
    sys.exit(main())
