"""A language model of a run: generation, evaluation and samples, through the command line, on both backends."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.assemble import LoadedRun, load_run
from mlx_training.data.batch import Batch
from mlx_training.data.token_cache import encode_documents
from mlx_training.generate import generator_of
from mlx_training.json_lines import read_metrics
from mlx_training.sampling import Sampling
from tests.e2e.tiny import decoder_config
from tests.e2e.workbench import CONFIG, DATA, Workbench

PROMPTS = ["The series", "What", "It goes up, and then"]
SHORT = "evaluation={samples: {prompts: [The], every_steps: 1, max_new_tokens: 5, temperature: 1}}"


@pytest.fixture(scope="module", params=["mlx", "torch"])
def trained(request: pytest.FixtureRequest, backends: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, and its evaluation."""
    from mlx_training.config import load_config
    from mlx_training.trainer import train

    if request.param not in backends:
        pytest.skip(f"backend {request.param} is not installed")
    folder = tmp_path_factory.mktemp("lm")
    (folder / "config.yaml").write_text(decoder_config(folder / "run"))
    train(load_config(folder / "config.yaml", [f"backend={request.param}", "model.decoder.init_std=0.3"]))
    return folder / "run"


@pytest.fixture
def lm(trained: Path) -> LoadedRun:
    return load_run(trained)


def logits(lm: LoadedRun, ids: list[int]) -> np.ndarray:
    """Of every place (L, V), by the whole forward pass."""
    tokens = np.array([ids], np.int32)
    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32), np.array([len(ids)], np.int32))
    found = lm.model.logits(lm.backend.to_device(batch))[0]
    return np.array(found.tolist())


def logprobs(lm: LoadedRun, ids: list[int]) -> np.ndarray:
    """log p of every token but the first, each from those before it in `ids`."""
    x = logits(lm, ids[:-1])
    return (x - np.log(np.exp(x).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]


def test_greedy_text_is_that_of_the_whole_forward_pass(lm: LoadedRun) -> None:
    """Prompts of different lengths side by side; the texts go beyond the training context of 16."""
    tokenizer, found = lm.data.tokenizer, generator_of(lm, Sampling(max_new_tokens=20)).texts(PROMPTS)
    for prompt, item in zip(PROMPTS, found, strict=True):
        ids = tokenizer.encode(prompt, bos=True)
        for token in item.tokens:
            assert token == logits(lm, ids)[-1].argmax()
            ids.append(token)
        assert item.finish == ("eos" if item.tokens[-1] == tokenizer.eos_id else "length")
        assert prompt + item.text == tokenizer.decode(ids)


def test_a_text_does_not_depend_on_its_neighbours(lm: LoadedRun) -> None:
    """Rows end at different times; those that go on are not disturbed."""
    sampling = Sampling(1.5, top_p=0.95, repetition_penalty=1.1, seed=3, max_new_tokens=12, stop=("a", "o"))
    generator = generator_of(lm, sampling)
    together = generator.texts(PROMPTS, samples=2)
    assert generator.batch_size == 4 and len({len(item.tokens) for item in together}) > 2
    small = generator_of(lm, sampling)
    object.__setattr__(small, "batch_size", 1)
    assert [item.tokens for item in small.texts(PROMPTS, samples=2)] == [item.tokens for item in together]


def test_generate(bench: Workbench, trained: Path) -> None:
    sampled = ["--temperature", "1.2", "--top-k", 50, "--min-p", "0.01", "--seed", 5, "--max-new-tokens", 9]
    result = bench.json("generate", trained, "--prompt", "The", "--prompt", "A", "--samples", 2, *sampled)
    assert [sample["prompt"] for sample in result["samples"]] == ["The", "The", "A", "A"]
    for sample in result["samples"]:
        assert set(sample) == {"prompt", "text", "tokens", "finish"}
        assert 1 <= sample["tokens"] <= 9 and (sample["finish"] == "eos" or sample["tokens"] == 9)
    Path("prompts.txt").write_text("The\n\nA\n")
    again = bench.json("generate", trained, "--prompts", "prompts.txt", "--samples", 2, *sampled)
    assert again["samples"] == result["samples"]

    code, out, _ = bench.main("generate", trained, "--prompt", "The", *sampled)
    text, tokens = result["samples"][0]["text"], result["samples"][0]["tokens"]
    assert code == 0 and out.startswith(f"The{text}\n({tokens} tokens; ended by: ")
    code, out, _ = bench.main("generate", trained, "--prompts", "prompts.txt", *sampled)
    assert code == 0 and f"--- 'The'\nThe{text}\n" in out and "--- 'A'\nA" in out

    stop = text[2:4]
    cut = bench.json("generate", trained, "--prompt", "The", "--stop", "nowhere!", "--stop", stop, *sampled)
    (sample,) = cut["samples"]
    assert sample["text"] == text[: text.index(stop)] and sample["finish"] == "stop" and sample["tokens"] < tokens


def test_a_single_text_appears_as_it_grows(lm: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_training.generate import on_terminal

    seen = []
    show = on_terminal(["The"], 1)

    def watch(item: Any, text: str) -> None:
        show(item, text)
        seen.append(capsys.readouterr().out)

    (item,) = generator_of(lm, Sampling(1.0, max_new_tokens=10), watch).texts(["The"])
    assert len(seen) == len(item.tokens) > 5 and "".join(seen) == f"The{item.text}\n"
    assert seen[0].startswith("The") and all(len(piece) < 12 for piece in seen)


def test_which_checkpoint(bench: Workbench, trained: Path) -> None:
    ask = ("generate", trained, "--prompt", "The", "--max-new-tokens", 6)
    result = bench.json(*ask, "--every-checkpoint")
    assert [checkpoint["step"] for checkpoint in result["checkpoints"]] == [2, 4]
    for name, index in (("step_00000002", 0), (trained / "checkpoints/step_00000004", 1), ("latest", 1)):
        assert bench.json(*ask, "--checkpoint", name)["samples"] == result["checkpoints"][index]["samples"]
    first, second = (checkpoint["samples"][0]["text"] for checkpoint in result["checkpoints"])
    code, out, _ = bench.main(*ask, "--every-checkpoint")
    assert (code, out) == (0, f"'The'\n  2  {first!r}\n  4  {second!r}\n")
    message = bench.refused(DATA, *ask, "--checkpoint", "step_9")
    assert "--checkpoint step_9: no such checkpoint" in message and "step_00000002, step_00000004" in message


def test_what_cannot_be_generated(bench: Workbench, trained: Path) -> None:
    ask = ("generate", trained, "--prompt", "The")
    assert "top_p: temperature 0" in bench.refused(CONFIG, *ask, "--top-p", "0.9")
    assert "--samples 3: at temperature 0" in bench.refused(CONFIG, *ask, "--samples", 3)
    assert "--rows" in bench.refused(DATA, "generate", trained, "--rows", bench.data)
    assert "not a file" in bench.refused(DATA, "generate", trained, "--prompts", "absent.txt")
    Path("blank.txt").write_text(" \n\n")
    assert "no prompt" in bench.refused(DATA, "generate", trained, "--prompts", "blank.txt")


def test_learned_positions_end(tiny: Workbench) -> None:
    """A text ends with the positions, in any company, and that is said once; a prompt must leave room."""
    tiny.use_decoder()
    tiny.train("model.decoder.positions=learned", "training.max_steps=1", "evaluation.every_steps=1")
    code, out, err = tiny.main("generate", tiny.run, "--prompt", "The", "--prompt", "The level of", "--json")
    assert code == 0 and err.count("note: a text ends at 16 tokens, prompt included") == 1
    tokenizer = load_run(tiny.run).data.tokenizer
    for sample in json.loads(out)["samples"]:
        size = len(tokenizer.encode(sample["prompt"], bos=True)) + sample["tokens"]
        assert sample["finish"] == "eos" or size == 16
    message = tiny.refused(DATA, "generate", tiny.run, "--prompt", "The series " * 9)
    assert "positions for 16 in all" in message and "at most 15" in message
    message = tiny.refused(CONFIG, "evaluate", tiny.run, "--protocol", "position", "--context-length", 48)
    assert "positions for 16 tokens" in message
    assert tiny.json("evaluate", tiny.run, "--protocol", "sliding", "--stride", 3)["tokens"] > 99


def test_evaluate(bench: Workbench, trained: Path, lm: LoadedRun) -> None:
    """Every figure against log-probabilities of the whole forward pass, on a file of two documents."""
    tokenizer, text = lm.data.tokenizer, "The level is 3.\n\nIt fällt.\n" + "What then? " * 9
    Path("text.txt").write_text(text)
    stream = encode_documents([text], tokenizer).tolist()
    assert len(stream) > 70

    windows = [stream[i : i + 17] for i in range(0, len(stream) - 1, 16)]
    found = [-logprobs(lm, window) for window in windows]
    nats, count = sum(x.sum() for x in found), len(stream) - 1
    result = bench.json("evaluate", trained, "--data", "text.txt")
    assert result["tokens"] == count and result["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-5)
    assert result["bits_per_character"] == pytest.approx(nats / np.log(2) / len(text), rel=1e-5)
    hits = sum((logits(lm, w[:-1]).argmax(-1) == w[1:]).sum() for w in windows)
    assert result["accuracy"] == pytest.approx(hits / count)
    assert result["mainrun_compat"] == pytest.approx(sum(x.sum() for x in found[:4]) / (len(text) + 5), rel=1e-5)

    whole = -logprobs(lm, stream)
    sliding = bench.json("evaluate", trained, "--data", "text.txt", "--protocol", "sliding", "--stride", 1)
    alone = [*(-logprobs(lm, stream[:17])), *(-logprobs(lm, stream[i - 16 : i + 1])[-1] for i in range(17, count + 1))]
    assert sliding["loss"] == pytest.approx(np.mean(alone), rel=1e-5) and sliding["tokens"] == count
    long = ("--context-length", 500)
    assert bench.json("evaluate", trained, "--data", "text.txt", *long)["loss"] == pytest.approx(whole.mean(), rel=1e-5)

    lines = [tokenizer.encode(line)[:7] for line in text.splitlines() if line.strip()][:2]
    nats = sum(-logprobs(lm, line).sum() for line in lines)
    flags = ("--protocol", "lines", "--max-lines", 2, "--max-tokens", 7)
    result = bench.json("evaluate", trained, "--data", "text.txt", *flags)
    assert result["tokens"] == sum(len(line) - 1 for line in lines)
    assert result["loss"] == pytest.approx(nats / result["tokens"], rel=1e-5)

    flags = ("--protocol", "position", "--context-length", 48)
    result = bench.json("evaluate", trained, "--data", "text.txt", *flags)
    first, second = -logprobs(lm, stream[:49]), -logprobs(lm, stream[48:97])
    by_place = [(a + b) / 2 for a, b in zip(first, second, strict=False)] + first[len(second) :].tolist()
    table = list(csv.DictReader((trained / "loss_by_position.csv").open()))
    assert [float(row["loss"]) for row in table] == pytest.approx(by_place, rel=1e-4)
    assert [int(row["tokens"]) for row in table] == [2] * len(second) + [1] * (48 - len(second))
    assert list(result["by_position"])[:2] == ["0-2", "3-5"]
    assert result["by_position"]["3-5"] == pytest.approx(np.mean(by_place[3:6]), rel=1e-4)


def test_the_report_of_a_run_is_its_loss(bench: Workbench, trained: Path, lm: LoadedRun) -> None:
    """Of the test split; on the validation split the loss is the one that training logged."""
    report = json.loads((trained / "result.json").read_text())["eval"]
    found = bench.json("evaluate", trained)
    assert list(found) == list(report) and found["protocol"] == report["protocol"] == "windows"
    for name in ("loss", "perplexity", "bits_per_byte", "bits_per_character", "tokens", "accuracy", "mainrun_compat"):
        assert found[name] == pytest.approx(report[name], rel=1e-6)
    logged = [record for record in read_metrics(trained / "metrics.jsonl") if "eval/loss" in record]
    best = bench.json("evaluate", trained, "--split", "validation")["loss"]
    assert best == pytest.approx(min(record["eval/loss"] for record in logged), rel=1e-5)


def test_every_checkpoint(bench: Workbench, trained: Path) -> None:
    result = bench.json("evaluate", trained, "--every-checkpoint", "--split", "validation")
    rows = list(csv.DictReader((trained / "checkpoints.csv").open()))
    logged = [record for record in read_metrics(trained / "metrics.jsonl") if "eval/loss" in record]
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert [float(row["loss"]) for row in rows] == pytest.approx([record["eval/loss"] for record in logged], rel=1e-5)
    assert [record["loss"] for record in result["checkpoints"]] == [float(row["loss"]) for row in rows]
    assert {"perplexity", "bits_per_byte", "accuracy", "tokens"} <= set(rows[0])
    assert (trained / "checkpoints.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = bench.main("evaluate", trained, "--every-checkpoint")
    assert code == 0 and len(out.splitlines()) == 4 and out.split()[:2] == ["step", "loss"]


def test_a_time_series_run(bench: Workbench) -> None:
    """Sampling flags apply to --rows; every checkpoint has its accuracy; protocols and prompts are for text."""
    bench.train()
    ask = ("generate", bench.run, "--rows", bench.data)
    plain = bench.json(*ask)["rows"]
    assert [row["id"] for row in plain] == [f"r{i}" for i in range(32)]
    drawn = bench.json(*ask, "--temperature", 2, "--max-new-tokens", 2)["rows"]
    assert [row["prediction"] for row in drawn] != [row["prediction"] for row in plain]
    result = bench.json("evaluate", bench.run, "--every-checkpoint")
    assert [record["step"] for record in result["checkpoints"]] == [2, 4] and "accuracy" in result["checkpoints"][0]
    assert "--rows FILE" in bench.refused(DATA, "generate", bench.run, "--prompt", "The")
    assert "protocols are for text" in bench.refused(CONFIG, "evaluate", bench.run, "--protocol", "lines")


def test_samples_during_training(tiny: Workbench) -> None:
    """They are those of `generate` from the checkpoint of that step, and a resumed run goes on with them."""
    tiny.use_decoder()
    tiny.train(SHORT, "training.max_steps=4")
    path = tiny.run / "samples.jsonl"
    records = read_metrics(path)
    assert [(record["step"], record["prompt"]) for record in records] == [(step, "The") for step in range(1, 5)]
    flags = ("--temperature", 1, "--seed", 7, "--max-new-tokens", 5, "--checkpoint", "latest")
    assert tiny.json("generate", tiny.run, "--prompt", "The", *flags)["samples"][0]["text"] == records[3]["text"]

    whole = path.read_text()
    assert tiny.json(
        "train", tiny.config, SHORT, "training.max_steps=5", "--resume", tiny.run / "checkpoints/step_00000004"
    )
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5] and whole.splitlines() == lines[:4]


def test_samples_are_refused_before_the_first_step(tiny: Workbench) -> None:
    tiny.use_decoder()
    long = SHORT.replace("[The]", f"[{'The series ' * 9}]")
    assert "positions for 16" in tiny.refused(DATA, "train", tiny.config, long, "model.decoder.positions=learned")
    assert not (tiny.run / "checkpoints").exists()
    greedy = SHORT.replace("temperature: 1", "top_k: 3")
    message = tiny.refused(CONFIG, "train", tiny.config, greedy)
    assert "evaluation.samples.top_k: temperature 0" in message
