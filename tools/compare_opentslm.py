"""Run the reference OpenTSLM-SP beside this project: same weights, same row, B = 1; compare loss and gradients.

    git clone https://github.com/StanfordBDHG/OpenTSLM ../OpenTSLM
    python tools/compare_opentslm.py --checkout ../OpenTSLM [--backend torch|mlx] [--json]

The reference's own classes build the prompt, the batch, the model and the loss. Its frozen LM is a small random
Llama made here (weights rounded to bfloat16, which its loader insists on, then computed in float32), its encoder
has the published sizes, and its weights go through our import and export of `model_checkpoint.pt`. Its Flamingo
half and what only that needs are replaced by empty modules. Exit code 1 if any difference exceeds the tolerance.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training import backend as backends
from mlx_training.backend import Backend, Runtime
from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.data.prompt import PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.tokenizer import Tokenizer, train_bpe
from mlx_training.errors import ConfigError, UserError
from mlx_training.objectives.lm import lm
from mlx_training.opentslm import read_opentslm, write_opentslm
from mlx_training.spec import EncoderSpec, FrozenLM, TimeSeriesSpec

TOLERANCE = 1e-5
UNNEEDED = ("open_flamingo", "einops", "datasets")
Arrays = dict[str, np.ndarray]


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import packages that are not needed here as modules in which every name is an empty class."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] in UNNEEDED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def empty_class(name: str) -> type:
            if name.startswith("__"):  # `inspect` asks every module for its file
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = empty_class  # type: ignore[method-assign]


def make_rows() -> list[Row]:
    """One series; then two of unequal length, neither a patch multiple; then a constant one."""
    rng = np.random.default_rng(0)

    def series(length: int) -> np.ndarray:
        return (rng.normal(3, 2) + np.cumsum(rng.normal(size=length))).astype(np.float32)

    def row(answer: str, *values: np.ndarray) -> Row:
        texts = tuple(
            f"Series {i}, it has mean {v.mean():.4f} and std {v.std(ddof=1):.4f}:" for i, v in enumerate(values)
        )
        return Row("You are given time series.", values, texts, "What is the trend? Answer:", answer)

    return [
        row("rising", series(200)),
        row("the second one falls after a while", series(61), series(117)),
        row("flat", np.full(32, 2.5, np.float32)),
    ]


def make_llm(directory: Path, rows: Sequence[Row]) -> Tokenizer:
    """A random Llama with a tokenizer for these rows, in Hugging Face's format, exactly representable in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = train_bpe([f"{r.pre_prompt} {r.series_text} {r.post_prompt} {r.answer}" for r in rows], 320, directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # 0.02 would hide errors of the positions
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    LlamaForCausalLM(config).bfloat16().float().save_pretrained(directory)
    return tokenizer


def load_reference(checkout: Path, llm: Path, precision: str = "float32") -> Any:
    """The reference's OpenTSLMSP on the CPU; bfloat16 is what its loader makes of the LM."""
    source = checkout / "src"
    if not (source / "opentslm" / "model" / "llm" / "OpenTSLMSP.py").is_file():
        raise ConfigError(f"--checkout {checkout}: expected a checkout of OpenTSLM, with {source}/opentslm in it")
    sys.meta_path.insert(0, EmptyModules())
    sys.path.insert(0, str(source))
    import torch

    module: Any = importlib.import_module("opentslm.model.llm.OpenTSLMSP")

    class WithoutDeviceMap:
        """`device_map` needs accelerate, to do nothing on a CPU."""

        @staticmethod
        def from_pretrained(*args: Any, device_map: Any, **options: Any) -> Any:
            return auto_model.from_pretrained(*args, **options)

    auto_model, module.AutoModelForCausalLM = module.AutoModelForCausalLM, WithoutDeviceMap
    torch.manual_seed(1)
    model = module.OpenTSLMSP(llm_id=str(llm), device="cpu")
    return (model.float() if precision == "float32" else model).train()


def reference_gradients(model: Any, row: Row) -> tuple[float, Arrays]:
    """Loss and gradients of the reference at B = 1, under its own names: encoder.*, projector.*."""
    import torch

    prompt: Any = importlib.import_module("opentslm.prompt")
    util: Any = importlib.import_module("opentslm.time_series_datasets.util")
    prompts = []
    for text, values in zip(row.series_text, row.series, strict=True):
        raw = torch.tensor(values)
        prompts.append(prompt.TextTimeSeriesPrompt(text, ((raw - raw.mean()) / (raw.std() + 1e-8)).tolist()))
    before, after = prompt.TextPrompt(row.pre_prompt), prompt.TextPrompt(row.post_prompt)
    sample = prompt.PromptWithAnswer(before, prompts, after, row.answer + model.get_eos_token())
    batch = util.extend_time_series_to_match_patch_size_and_aggregate([sample.to_dict()])
    model.zero_grad()
    loss = model.compute_loss(batch)
    loss.backward()
    trained = {"encoder": model.encoder, "projector": model.projector}
    return float(loss.detach()), {
        f"{part}.{name}": p.grad.numpy().copy() for part, m in trained.items() for name, p in m.named_parameters()
    }


def canonical(gradients: Arrays, reference: Any, directory: Path) -> Arrays:
    """Gradients under canonical names, by way of the checkpoint reader, so that one table of names is tested."""
    import torch

    states = {
        f"{part}_state": {
            name.removeprefix(f"{part}."): torch.from_numpy(array)
            for name, array in gradients.items()
            if name.startswith(f"{part}.")
        }
        for part in ("encoder", "projector")
    }
    assert states["encoder_state"].keys() == reference.encoder.state_dict().keys()
    torch.save(states, directory / "gradients.pt")
    return read_opentslm(directory / "gradients.pt").arrays


def compare(backend: Backend, model: Any, batch: Batch, loss: float, gradients: Arrays) -> dict[str, Any]:
    """Relative differences of one row: of the loss, and ‖Δ‖ / ‖gradient‖ of every parameter."""
    sums = backend.score(model, lm, batch)
    ours = backend.gradients(model, lm, batch)
    assert ours.keys() == gradients.keys()
    differences = {}
    for name, theirs in gradients.items():
        size = float(np.linalg.norm(theirs)) or 1.0  # a constant series: the patch kernel's true gradient is zero
        differences[name] = float(np.linalg.norm(ours[name] - theirs)) / size
    return {
        "loss": loss,
        "loss_difference": abs(sums["loss"] / sums["weight"] - loss) / loss,
        "supervised_tokens": int(sums["weight"]),
        "gradient_difference": dict(sorted(differences.items(), key=lambda item: -item[1])),
    }


def run(checkout: Path, names: Sequence[str]) -> dict[str, Any]:
    """The report: for each backend, one comparison a row."""
    report: dict[str, Any] = {"tolerance": TOLERANCE, "backends": {}}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        directory, llm = Path(folder), Path(folder) / "llm"
        rows = make_rows()
        tokenizer = make_llm(llm, rows)
        reference = load_reference(checkout, llm)
        reference.store_to_file(str(directory / "model_checkpoint.pt"))
        weights = read_opentslm(directory / "model_checkpoint.pt")
        for module in (reference.encoder, reference.projector):
            module.load_state_dict({name: 0 * value for name, value in module.state_dict().items()})
        write_opentslm(directory / "export.pt", weights.arrays)
        reference.load_from_file(str(directory / "export.pt"))  # so that a wrong export shows as a difference
        expected = []
        for row in rows:
            loss, gradients = reference_gradients(reference, row)
            expected.append((loss, canonical(gradients, reference, directory)))
        encode = PromptEncoder(tokenizer, weights.sizes["patch_size"], layout="opentslm").encode
        batches = [collate([encode(row)]) for row in rows]
        lm_spec = FrozenLM(llm, hidden_size=weights.sizes["llm_hidden_size"], vocab_size=tokenizer.vocab_size)
        spec = TimeSeriesSpec(lm_spec, EncoderSpec(max_patches=weights.sizes["max_patches"]))
        report["parameters"] = spec.num_parameters
        for name in names:
            backend = backends.get(name, Runtime(device="cpu"))
            model = backend.build(spec)
            backend.load(model, weights.arrays)
            report["backends"][name] = [compare(backend, model, b, *e) for b, e in zip(batches, expected, strict=True)]
    results = [result for per_row in report["backends"].values() for result in per_row]
    found = [d for r in results for d in (r["loss_difference"], *r["gradient_difference"].values())]
    return report | {"worst": max(found), "passed": all(d <= TOLERANCE for d in found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of an OpenTSLM checkout")
    parser.add_argument("--backend", choices=sorted(backends.PACKAGES), help="only this one (default: both)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    arguments = parser.parse_args()
    try:
        report = run(arguments.checkout.resolve(), [arguments.backend] if arguments.backend else ["torch", "mlx"])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(report))
        return 0 if report["passed"] else 1
    for name, results in report["backends"].items():
        for i, result in enumerate(results):
            parameter, difference = next(iter(result["gradient_difference"].items()))
            print(
                f"{name:5} row {i}: loss {result['loss']:.6f} ({result['supervised_tokens']} tokens), relative "
                f"difference {result['loss_difference']:.1e}; worst gradient {difference:.1e} ({parameter})"
            )
    print(f"{'passed' if report['passed'] else 'FAILED'}: worst {report['worst']:.1e}, tolerance {TOLERANCE:.0e}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
