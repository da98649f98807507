"""Two processes that share out a model take the steps of one that has it whole (FSDP2, torch)."""

import shutil
import signal
from pathlib import Path

import pytest

from mlx_training import backend as backends
from mlx_training.backend import Runtime
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.errors import BackendError, ConfigError
from mlx_training.spec import DecoderSpec
from tests.e2e.processes import TORCHRUN, expect_equal, launch, run
from tests.e2e.workbench import Workbench

SHARDED = "performance.shard=true"
# batches of 5 windows: shares of 3 and 2; of the last batch of an epoch the second process has nothing
STEPS = ("training.max_steps=6", "training.batch_size=5", "evaluation.every_steps=3", "checkpoint.keep=9")
VARIANTS: dict[str, tuple[str, ...]] = {
    "decoder": (
        *("training.gradient_checkpointing=true", "training.grad_accumulation_steps=2", "training.grad_clip_norm=0.5"),
        *("model.decoder.num_layers=3", "diagnostics.probe_every_steps=5"),
        "evaluation.samples={prompts: [The series], every_steps: 6, max_new_tokens: 8}",
    ),
    "untied": ("model.decoder.tie_word_embeddings=false", "model.decoder.positions=learned", "training.optimizer=lion"),
    "experts": (
        "model.decoder.experts={num_experts: 3, balance: 0}",
        "training.optimizer=sgd",
        "training.momentum=0.9",
    ),
    "sinks": ("model.decoder.num_sinks=3", "model.decoder.mixers=[local, causal]", "model.decoder.window=4"),
    "unet": ("model.decoder.num_layers=3", "model.decoder.widths=[16, 8, 16]", "training.ema_decay=0.8"),
    "recurrent": ("model.recurrent.tie_word_embeddings=true",),
    "ssm": (),
    "kgram": (),
}


@pytest.fixture
def decoder(bench: Workbench, backends: list[str]) -> Workbench:
    """A workbench whose configuration is a decoder's, on torch."""
    if "torch" not in backends:
        pytest.skip("backend torch is not installed")
    bench.backend = "torch"
    bench.use_decoder()
    return bench


def test_one_process_then_two_sharded_then_one(decoder: Workbench) -> None:
    """What one has saved is shared out, and what two have saved is whole again."""
    settings = (*STEPS, "model.decoder.num_layers=2", "dataset.num_samples_train=11")
    whole = decoder.train(*settings, "output_dir=whole")
    shutil.copytree("whole", decoder.run)
    begin = decoder.run / "checkpoints/step_00000003"
    _, said = launch(decoder, *settings, SHARDED, "--resume", begin, moment="1 5", number=signal.SIGTERM)
    assert "2 processes, resumed from step 3" in said and said.count("interrupted: saved at step 5") == 2, said
    assert decoder.json("checkpoint", "verify", decoder.run)["ok"]
    result = decoder.train(*settings, SHARDED, "--resume", "auto")  # one process has nothing to share
    assert expect_equal(decoder.run, Path("whole")) <= 1e-5
    assert result["eval"]["loss"] == pytest.approx(whole["eval"]["loss"], rel=1e-5)


@pytest.mark.proof
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps(decoder: Workbench, variant: str) -> None:
    """Two sharded, then one, then two sharded again."""
    if variant in ("recurrent", "ssm", "kgram"):
        decoder.use_language(variant)
    settings = (*STEPS, "training.max_steps=20", "dataset.num_samples_train=11", *VARIANTS[variant])
    whole = decoder.train(*settings, "output_dir=whole")
    _, said = launch(decoder, *settings, SHARDED, moment="0 7", number=signal.SIGTERM)
    assert said.count("interrupted: saved at step 7") == 2, said
    stopped = (*settings, "training.early_stopping_patience=1", "training.early_stopping_min_delta=99")
    decoder.train(*stopped, "--resume", "auto")
    between = CheckpointStore(decoder.run).load("latest").step
    assert 7 < between < 20
    code, said = launch(decoder, *settings, SHARDED, "--resume", "auto")
    assert code == 0 and f"2 processes, resumed from step {between}" in said, said
    difference = expect_equal(decoder.run, Path("whole"))
    assert difference <= 1e-5
    result = decoder.json("train", decoder.config, *settings, "--resume", "auto")  # finished: says what two have found
    assert result["eval"]["loss"] == pytest.approx(whole["eval"]["loss"], rel=1e-5)
    if variant == "decoder":
        assert (decoder.run / "samples.jsonl").read_text() == Path("whole/samples.jsonl").read_text()
    print(f"{variant}: largest relative difference of loss, gradient norm and eval/loss: {difference:.1e}")


@pytest.mark.proof
def test_a_process_that_is_killed(decoder: Workbench) -> None:
    """The other one says so, and the last checkpoint is whole."""
    code, said = launch(decoder, *STEPS, SHARDED, moment="1 5", number=signal.SIGKILL)
    assert code and "process 0 has lost another process of this job" in said, said
    assert CheckpointStore(decoder.run).load("latest").step == 4
    assert decoder.json("checkpoint", "verify", decoder.run)["ok"]


@pytest.mark.proof
def test_all_diverge_together(decoder: Workbench) -> None:
    wild = ("training.learning_rate=1e38", "training.schedule=constant", "diagnostics.max_skipped_steps=2")
    code, said = launch(decoder, *STEPS, *wild, SHARDED)
    assert code and "exitcode  : 4" in said, said
    assert "2 updates in a row were skipped. First not finite: the output of" in said, said


def test_each_process_holds_half(decoder: Workbench) -> None:
    """Steps, figures of a probe, gradients, generation and what is saved are those of one process."""
    code, said = run([*TORCHRUN, Path(__file__).with_name("sharding_worker.py")])
    assert code == 0, said
    for rank in "01":
        shares = said.partition(f"held by {rank}: ")[2].split()[:2]
        assert [float(share) for share in shares] == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimizer=muon", "muon needs whole matrices"),
        ("training.optimizer=adafactor", "adafactor needs whole matrices"),
    ],
)
def test_what_cannot_be_sharded_is_refused(decoder: Workbench, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(decoder.config, [SHARDED, override])


def test_a_frozen_model_is_not_sharded(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match=r"performance.shard: .* it is for decoder, recurrent, ssm, kgram"):
        load_config(bench.config, [SHARDED])


def test_mlx_refuses_several_processes() -> None:
    pytest.importorskip("mlx.core")
    backend = backends.get("mlx", Runtime(device="cpu", shard=True))
    spec = DecoderSpec(8, 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, context_length=8)
    backend.build(spec)
    backend.group.size = 2
    with pytest.raises(BackendError, match="2 processes of MLX, which cannot share out a model"):
        backend.build(spec)
