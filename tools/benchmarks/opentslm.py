"""The reference's side: OpenTSLM's own classes, batches, optimiser groups and loop, from a checkout."""

import importlib
from pathlib import Path
from typing import Any

from mlx_training.init import initialise
from mlx_training.opentslm import write_opentslm
from tools.benchmarks import material
from tools.benchmarks.ours import RATES, timeseries_spec
from tools.benchmarks.worker import Absent, Run
from tools.compare_opentslm import load_reference


def timeseries(llm: str, rows: dict[str, Any], checkout: str, precision: str, batch_size: int = 4) -> Run:
    """Steps as `curriculum_learning.py` takes them; bfloat16 is the default of its loader, for the LM alone."""
    import torch

    if not checkout:
        raise Absent("no checkout of OpenTSLM; give one with --opentslm PATH")
    model = load_reference(Path(checkout), Path(llm), precision)
    start = Path(llm) / "start.pt"
    write_opentslm(start, initialise(timeseries_spec(Path(llm)), 0), epoch=0)
    model.load_from_file(str(start))
    prompt: Any = importlib.import_module("opentslm.prompt")
    util: Any = importlib.import_module("opentslm.time_series_datasets.util")

    def sample(row: Any) -> dict[str, Any]:
        series = []
        for text, values in zip(row.series_text, row.series, strict=True):
            raw = torch.tensor(values)
            series.append(prompt.TextTimeSeriesPrompt(text, ((raw - raw.mean()) / (raw.std() + 1e-8)).tolist()))
        before, after = prompt.TextPrompt(row.pre_prompt), prompt.TextPrompt(row.post_prompt)
        return prompt.PromptWithAnswer(before, series, after, row.answer + model.get_eos_token()).to_dict()

    data = [sample(row) for row in material.rows(**rows)]
    lengths = [len(model.tokenizer(text).input_ids) for row in material.rows(**rows) for text in texts_of(row)]
    tokens_a_row = (sum(lengths) + sum(v.size // 4 for row in material.rows(**rows) for v in row.series)) / len(data)
    loader: Any = torch.utils.data.DataLoader(
        data, batch_size, shuffle=True, collate_fn=util.extend_time_series_to_match_patch_size_and_aggregate
    )
    parts = ((model.encoder, RATES["encoder"]), (model.projector.projector, RATES["projector"]))
    optimizer = torch.optim.AdamW([{"params": list(p.parameters()), "lr": lr, "weight_decay": 1e-2} for p, lr in parts])

    def forever() -> Any:
        while True:
            yield from loader

    stream = forever()

    def run(steps: int) -> dict[str, float]:
        last = 0.0
        for _ in range(steps):
            batch = next(stream)
            optimizer.zero_grad()
            loss = model.compute_loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            last = loss.item()
        return {"tokens": tokens_a_row * batch_size, "loss": last}

    return run


def texts_of(row: Any) -> list[str]:
    """What of a row becomes tokens."""
    return [row.pre_prompt, *row.series_text, row.post_prompt, row.answer]
