"""Learning-rate schedules against their closed forms."""

import math

import pytest

from mlx_training.schedule import Schedule


def factors(schedule: Schedule, total: int) -> list[float]:
    return [schedule.factor(step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_fall_to_an_end(kind: str) -> None:
    """Warm-up reaches the peak at its last step; decay ends above zero at the last step and is symmetric."""
    schedule = Schedule(kind, warmup=4)
    values = factors(schedule, 19)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values == sorted(values[:4]) + sorted(values[4:], reverse=True) and values[4] < 1
    assert values[3 + 8] == pytest.approx(0.5) and 0 < values[-1] == pytest.approx(1 - values[4])
    assert Schedule(kind, warmup=4, min_lr_fraction=0.1).factor(20, 19) == pytest.approx(0.1)


def test_cosine_and_linear_where_they_differ() -> None:
    assert Schedule("cosine").factor(5, 19) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert Schedule("linear").factor(5, 19) == pytest.approx(0.75)


def test_constant() -> None:
    assert factors(Schedule("constant", warmup=2), 5) == [0.5, 1, 1, 1, 1]


def test_step() -> None:
    schedule = Schedule("step", warmup=0.2, milestones=(0.5, 0.7), gamma=0.1)
    assert factors(schedule, 10) == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(("shape", "fall"), [("linear", lambda x: 1 - x), ("sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd(shape: str, fall) -> None:
    """Up in two steps, level for twelve, down in six."""
    schedule = Schedule("wsd", warmup=0.1, decay_fraction=0.3, decay_shape=shape, min_lr_fraction=0.2)
    down = [0.2 + 0.8 * fall(i / 7) for i in range(1, 7)]
    assert factors(schedule, 20) == pytest.approx([0.5, *[1] * 13, *down])
    assert schedule.factor(21, 20) == pytest.approx(0.2)


def test_wsd_whose_decay_would_begin_in_the_warmup() -> None:
    values = factors(Schedule("wsd", warmup=6, decay_fraction=0.9), 10)
    assert values == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 0.8, 0.6, 0.4, 0.2])


def test_inverse_sqrt() -> None:
    assert factors(Schedule("inverse_sqrt", warmup=4), 16)[3::4] == pytest.approx([1, 0.5**0.5, (1 / 3) ** 0.5, 0.5])
    assert Schedule("inverse_sqrt").factor(4, 9) == 0.5


def test_warmup_as_a_share_or_a_number_of_steps() -> None:
    for kind in ("cosine", "linear", "constant", "step", "wsd", "inverse_sqrt"):
        assert factors(Schedule(kind, warmup=0.25), 16) == factors(Schedule(kind, warmup=4), 16)
        assert factors(Schedule(kind, warmup=4), 16)[:4] == [0.25, 0.5, 0.75, 1.0], kind
