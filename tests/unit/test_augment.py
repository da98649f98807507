"""Augmented training rows: a function of seed, epoch and row, which evaluation never sees."""

from pathlib import Path

import numpy as np
import pytest

from mlx_training.assemble import Assembly, assemble
from mlx_training.config import load_config
from mlx_training.data.augment import Augmentation, rotation
from mlx_training.data.prompt import PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import ConfigError, DataError

AUGMENT = "dataset.augment={rotation_degrees: 20, roll_fraction: 0.5, scale: 0.1, jitter: 0.1}"


def row(*series: np.ndarray, text: str = "an axis") -> Row:
    arrays = tuple(values.astype(np.float32) for values in series)
    return Row("", arrays, (text,) * len(series), "Which?", "up", id="r1")


def axes(length: int = 50) -> Row:
    return row(*np.random.default_rng(0).normal(1, 2, (3, length)))


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).normal(size=(20, 12, 3))
    np.savez(tmp_path / "windows.npz", X=values, y=np.arange(20) % 2)
    return tmp_path / "windows.npz"


def assembly(windows: Path, *overrides: str) -> Assembly:
    given = ["dataset={splits: {fraction: {validation: 0.2, test: 0.2}}, num_samples_train: null}"]
    given += [f"dataset.num_samples_{split}=null" for split in ("validation", "test")]
    given += ["dataset.format=npz", f"dataset.path={windows}", "training.batch_size=5", *overrides]
    return assemble(load_config("quick_test", given))


@pytest.mark.parametrize("degrees", [(20.0, 20.0, 20.0), (180.0, 0.0, 0.0), (5.0, 0.0, 90.0)])
def test_a_rotation_keeps_the_norm_over_the_axes(degrees: tuple[float, float, float]) -> None:
    before = axes()
    after = Augmentation(degrees).row(before, np.random.default_rng(1))
    x, y, z = (np.array(each.series) for each in (before, after, before))
    np.testing.assert_allclose(np.linalg.norm(y, axis=0), np.linalg.norm(x, axis=0), rtol=1e-5)
    assert np.abs(y - z).max() > 0.01
    if degrees[1:] == (0.0, 0.0):
        np.testing.assert_array_equal(after.series[0], before.series[0], "the axis that it turns about stays")


def test_a_share_of_the_rows_rolls_by_any_angle() -> None:
    """Uniform over the circle about x, where its fraction says so; the others stay as they are."""
    before, rng = axes(1), np.random.default_rng(2)
    turned = np.array([Augmentation(roll_fraction=0.25).row(before, rng).series for _ in range(4000)])[:, :, 0]
    x, y, z = turned.T
    np.testing.assert_allclose(x, before.series[0][0], rtol=1e-6)
    stay = np.isclose(y, before.series[1][0]) & np.isclose(z, before.series[2][0])
    assert 0.73 < stay.mean() < 0.77
    quarters = np.histogram(np.arctan2(z, y)[~stay], 4, (-np.pi, np.pi))[0] / (~stay).sum()
    np.testing.assert_allclose(quarters, 0.25, atol=0.04)
    with pytest.raises(
        DataError, match=r"2 series of 4, 4 samples, but turning by dataset.augment.roll_fraction takes the"
    ):
        Augmentation(roll_fraction=0.1).check(row(np.ones(4), np.ones(4)))


def test_a_rotation_turns_by_its_length() -> None:
    np.testing.assert_allclose(rotation(np.array([0, 0, np.pi / 2])) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_array_equal(rotation(np.zeros(3)), np.eye(3))
    turn = rotation(np.array([0.3, -1.0, 2.0]))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    assert np.trace(turn) == pytest.approx(1 + 2 * np.cos(np.sqrt(0.09 + 1 + 4)))


def test_angles_factors_and_noise_have_the_configured_size() -> None:
    before, rng = axes(20), np.random.default_rng(0)

    def drawn(augmentation: Augmentation) -> np.ndarray:
        return np.array([augmentation.row(before, rng).series for _ in range(2000)])

    y, z = drawn(Augmentation((30.0, 0.0, 0.0)))[:, 1:, 0].T
    turned = np.degrees(np.angle((y + 1j * z) / complex(before.series[1][0], before.series[2][0])))
    assert abs(turned.mean()) < 2 and 28 < turned.std() < 32
    factors = np.log(drawn(Augmentation(scale=0.2)) / np.array(before.series))
    assert np.ptp(factors, axis=2).max() < 1e-4, "one factor a series"
    assert abs(np.corrcoef(factors[:, 0, 0], factors[:, 1, 0])[0, 1]) < 0.1
    assert 0.19 < factors[:, :, 0].std() < 0.21
    noise = drawn(Augmentation(jitter=0.5)) - np.array(before.series)
    np.testing.assert_allclose(noise.std((0, 2)), 0.5 * np.std(before.series, axis=1, ddof=1), rtol=0.05)
    constant = row(np.full(9, 3.0))
    np.testing.assert_array_equal(Augmentation(jitter=0.5).row(constant, rng).series[0], constant.series[0])


def test_the_prompt_states_the_augmented_series(tiny_tokenizer: Tokenizer) -> None:
    before = row(np.arange(8), text="x, it has mean 3.5000 and std 2.4495:")
    after = Augmentation(scale=1.0).row(before, np.random.default_rng(0))
    encoder = PromptEncoder(tiny_tokenizer, 4)
    encoded = encoder.encode(after)
    values = after.series[0].astype(np.float64)
    stated = f"x, it has mean {values.mean():.4f} and std {values.std(ddof=1):.4f}:"
    assert stated in tiny_tokenizer.decode(encoded.tokens[encoded.patch_place == 0].tolist())
    np.testing.assert_allclose(encoded.scale[0], [np.arcsinh(values.mean()), np.log(values.std(ddof=1))], rtol=1e-5)
    np.testing.assert_allclose(encoded.series[0], encoder.encode(before).series[0], atol=1e-5, err_msg="z-scored")


def test_batches_are_a_function_of_seed_epoch_and_row(windows: Path) -> None:
    batches, again = (assembly(windows, AUGMENT).data.train_batches() for _ in range(2))
    n = batches.num_batches
    shown = [batches.batch(index) for index in range(2 * n)]
    for index in reversed(range(2 * n)):
        resumed = again.batch(index)
        assert resumed.rows == shown[index].rows
        for name, array in shown[index].arrays().items():
            np.testing.assert_array_equal(resumed.arrays()[name], array)

    epochs = [{r: b.series[3 * i] for b in shown[e * n : e * n + n] for i, r in enumerate(b.rows)} for e in (0, 1)]
    assert epochs[0].keys() == epochs[1].keys()
    assert all(not np.array_equal(epochs[0][r], epochs[1][r]) for r in epochs[0])
    other = assembly(windows, AUGMENT, "experiment.seed=2").data.train_batches()
    found = {r: b.series[3 * i] for b in map(other.batch, range(n)) for i, r in enumerate(b.rows)}
    assert all(not np.array_equal(found[r], epochs[0][r]) for r in found)


def test_shares_of_several_processes_are_the_batch(windows: Path) -> None:
    whole = assembly(windows, AUGMENT).data.train_batches().batch(3)
    for rank in range(2):
        batches = assembly(windows, AUGMENT).data.train_batches()
        batches.share = rank, 2
        part = batches.batch(3)
        assert part.rows == whole.rows[rank::2]
        by_row = whole.series.reshape(len(whole.rows), 3, -1)
        np.testing.assert_array_equal(part.series.reshape(len(part.rows), 3, -1), by_row[rank::2])


def test_evaluation_reads_rows_as_they_are(windows: Path) -> None:
    plain, augmented = (assembly(windows, *given).data for given in ((), (AUGMENT,)))
    for split in ("validation", "train"):
        for one, other in zip(plain.eval_batches(split, 4, None), augmented.eval_batches(split, 4, None), strict=True):
            np.testing.assert_array_equal(one.series, other.series)
            np.testing.assert_array_equal(one.tokens, other.tokens)
    assert not np.array_equal(plain.train_batches().batch(0).series, augmented.train_batches().batch(0).series)


@pytest.mark.parametrize(
    ("series", "given"),
    [([8, 8], "series of 8, 8 samples"), ([8, 8, 7], "series of 8, 8, 7 samples"), ([], "series of no samples")],
)
def test_only_three_equal_axes_are_turned(series: list[int], given: str) -> None:
    wrong, rng = row(*map(np.ones, series)), np.random.default_rng(0)
    with pytest.raises(DataError, match=rf"row 'r1': {len(series)} {given}, but .*rotation_degrees .*exactly 3 series"):
        Augmentation((1.0, 0.0, 0.0)).row(wrong, rng)
    assert len(Augmentation(scale=0.1, jitter=0.1).row(wrong, rng).series) == len(series)


def test_training_rows_are_checked_before_the_first_step(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", X=np.ones((20, 12, 2)), y=np.arange(20) % 2)
    with pytest.raises(
        DataError, match=r"2 series of 12, 12 samples, but turning by dataset.augment.rotation_degrees and "
    ):
        assembly(tmp_path / "two.npz", AUGMENT).data.rows("validation")
    with pytest.raises(DataError, match=r"1 series of .* dataset.augment.roll_fraction takes the three"):
        assemble(load_config("quick_test", ["dataset.augment.roll_fraction=0.1"])).data.rows("train")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("quick_test", "dataset.augment.rotation_degrees=[90, 5]", r"rotation_degrees.2: missing; allowed: a number"),
        ("quick_test", "dataset.augment.scale=2", r"dataset.augment.scale: given 2; allowed: a number >= 0 and <= 1"),
        ("tiny_llama", "dataset.augment.jitter=0.1", r"dataset.augment: model.family: decoder does not read it"),
    ],
)
def test_configurations_that_cannot_be(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name, [override])
