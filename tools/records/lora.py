"""LoRA on instructions over the project's own pretrained decoder: the llama of the record `families`, exported.

All losses are of the same held-out tenth of the instructions, over the answers alone, in nats a token. The rows below
"adapted" load what was exported in one step at a learning rate of 1e-12: the merged model, and both adapter formats.
"""

from pathlib import Path
from typing import Any

from tools.records import families
from tools.records.lab import Lab, merged, table


def config(lab: Lab, base: Path, steps: int, rate: float, **training: Any) -> dict[str, Any]:
    """LoRA of rank 16 on a base."""
    return {
        "extends": "language/lora_instruct",
        "model": {"llm_id": str(base)},
        "dataset": {
            "path": lab.data("instruct/instruction-data.json"),
            "splits": {"fraction": {"validation": 0.1, "test": None}},
            "max_length": families.CONTEXT,
        },
        "training": {"max_steps": steps, "learning_rate": rate, **training},
        "evaluation": {"every_steps": min(steps, 50), "metrics": ["loss"], "save_predictions": False},
        "checkpoint": {"every_steps": min(steps, 50)},
    }


def make(lab: Lab) -> list[str]:
    """Pretrain, export, adapt, and read every export back."""
    pretrained = Lab("families").train("llama", families.config(lab, "llama"))
    base = exported(lab, pretrained, "base", "hf")

    def loss(run: Path) -> float:
        return float(lab.curve(run, "eval/loss")[1][-1])

    def one_step(name: str, base: Path, **training: Any) -> float:
        off = {"model": {"lora": {"dropout": 0.0}}}
        return loss(lab.train(name, merged(config(lab, base, 1, 1e-12, **training), off)))

    rows: list[tuple[str, float]] = [("the base", one_step("at_base", base))]
    run = lab.train("adapted", config(lab, base, 300, 2e-3))
    rows.append(("adapted, 300 steps", loss(run)))
    rows.append(("merged, Hugging Face format", one_step("at_merged", exported(lab, run, "merged", "hf"))))
    for format in ("peft", "mlx-lm"):
        adapters = exported(lab, run, format, format)
        rows.append((f"adapters read from {format} files", one_step(f"at_{format}", base, init_from=str(adapters))))
    curves = {"training": lab.curve(run), "validation": lab.curve(run, "eval/loss")}
    lab.draw(curves, "steps", "loss (nats a token of the answer)")
    return table(("", "validation loss"), [(name, f"{value:.6f}") for name, value in rows])


def exported(lab: Lab, run: Path, name: str, format: str) -> Path:
    """The directory of an export, made once."""
    path = lab.folder / f"export_{name}"
    if not path.exists():
        lab.folder.mkdir(parents=True, exist_ok=True)
        lab.command("checkpoint", "export", run, "--to", path, "--format", format)
    return path
