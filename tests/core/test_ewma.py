"""The running mean: between its samples, led by the newer ones, deaf to nonsense."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.ewma import ALPHA, HALF_LIFE_S, Ewma


def test_the_first_sample_is_the_mean() -> None:
    assert Ewma().value is None
    assert Ewma().age_s(5.0) == math.inf
    mean = Ewma()
    mean.add(4.0, 1.0)
    assert mean.value == 4.0
    assert mean.age_s(5.0) == 4.0


def test_a_sample_right_after_another_weighs_alpha() -> None:
    mean = Ewma()
    mean.add(0.0, 1.0)
    mean.add(1.0, 1.0)
    assert mean.value == pytest.approx(ALPHA)


def test_an_old_mean_gives_way_to_a_new_sample() -> None:
    mean = Ewma()
    mean.add(100.0, 0.0)
    mean.add(1.0, 20 * HALF_LIFE_S)
    assert mean.value == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_what_is_no_measurement_is_ignored(bad: float) -> None:
    mean = Ewma()
    mean.add(2.0, 0.0)
    mean.add(bad, 1.0)
    assert mean.value == 2.0
    assert mean.at_s == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=50))
def test_the_mean_lies_between_its_samples_whatever_the_clock_does(samples: list[tuple[float, float]]) -> None:
    mean = Ewma()
    for value, now in samples:
        mean.add(value, now)
    values = [value for value, _ in samples]
    assert mean.value is not None
    assert min(values) - 1e-6 <= mean.value <= max(values) * (1 + 1e-9) + 1e-6
