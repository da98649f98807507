"""Convert between a run and OpenTSLM's model_checkpoint.pt.

python tools/opentslm_checkpoint.py export RUN OUT.pt       the best checkpoint of a run (else its latest)
python tools/opentslm_checkpoint.py import IN.pt OUT_DIR    a directory for training.init_from
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mlx_training.checkpoint import CheckpointStore
from mlx_training.errors import UserError
from mlx_training.export import export_opentslm
from mlx_training.opentslm import read_opentslm
from mlx_training.run_directory import claim_run_directory


def export_run(run: Path, out: Path) -> str:
    """Write the encoder, projector and adapters of a run."""
    return f"{out}: {export_opentslm(run, out)}"


def import_file(source: Path, out: Path) -> str:
    """Make a run directory that holds the file's weights as step 0."""
    foreign = read_opentslm(source)
    claim_run_directory(out, resume=False)
    state: dict[str, Any] = {"source": source.name, "epoch": foreign.epoch, **foreign.sizes}
    arrays = dict(foreign.arrays)
    if (lora := foreign.lora) is not None:
        arrays |= lora.arrays
        state["adapter"] = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "dora": lora.dora}
    CheckpointStore(out).save(0, arrays, {}, state, best=True, keep=1)
    return f"{out}: {len(foreign.arrays)} arrays, {foreign.sizes}; {foreign.lora or 'no LoRA'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=["export", "import"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert = export_run if arguments.direction == "export" else import_file
    try:
        print(convert(arguments.source, arguments.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
