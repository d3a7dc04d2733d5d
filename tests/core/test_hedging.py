"""When a second peer is asked, and how often at most."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.core import hedging
from meshmax.core.hedging import (
    FLOOR_S,
    LEFT_OVER,
    MAX_CREDIT,
    MAX_RATIO,
    MIN_EXPECTED_S,
    MIN_RATIO,
    MIN_SAMPLES,
    SHARE,
    USUAL_RATIO,
    Budget,
    FirstTokens,
)

A, B = PeerId("a"), PeerId("b")


def test_without_measurements_a_peer_is_late_after_three_times_what_was_expected() -> None:
    assert FirstTokens().late_s(A, 2.0) == USUAL_RATIO * 2.0
    assert FirstTokens().late_s(A, 0.0) == FLOOR_S


def test_then_after_the_95th_percentile_of_its_own() -> None:
    first_tokens = FirstTokens()
    for n in range(100):
        first_tokens.add(A, 1.0, 1.0 + n / 100)
    assert 1.9 <= first_tokens.late_s(A, 1.0) <= 2.0
    assert first_tokens.late_s(A, 10.0) == pytest.approx(10 * first_tokens.late_s(A, 1.0))


def test_or_of_everybodys_as_long_as_it_has_answered_little() -> None:
    first_tokens = FirstTokens()
    for _ in range(MIN_SAMPLES):
        first_tokens.add(A, 1.0, 5.0)
    assert first_tokens.late_s(B, 1.0) == 5.0
    for _ in range(MIN_SAMPLES):
        first_tokens.add(B, 1.0, 2.0)
    assert first_tokens.late_s(B, 1.0) == 2.0
    assert first_tokens.late_s(A, 1.0) == 5.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=100), st.floats(0, 100))
def test_lateness_stays_within_its_bounds(samples: list[tuple[float, float]], expected_s: float) -> None:
    first_tokens = FirstTokens()
    for expected, waited in samples:
        first_tokens.add(A, expected, waited)
    expected_s = max(expected_s, MIN_EXPECTED_S)
    assert max(MIN_RATIO * expected_s, FLOOR_S) <= first_tokens.late_s(A, expected_s)
    assert first_tokens.late_s(A, expected_s) <= max(MAX_RATIO * expected_s, FLOOR_S)


def test_peers_that_answered_longest_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedging, "MAX_PEERS", 2)
    first_tokens = FirstTokens()
    for _ in range(MIN_SAMPLES):
        first_tokens.add(A, 1.0, 5.0)
    assert first_tokens.late_s(A, 1.0) == 5.0
    first_tokens.add(B, 1.0, 1.0)
    first_tokens.add(PeerId("c"), 1.0, 1.0)
    for _ in range(300):
        first_tokens.add(B, 1.0, 1.0)
    assert first_tokens.late_s(A, 1.0) == MIN_RATIO


@given(st.integers(0, 3000), st.integers(0, 2**32))
def test_no_more_than_the_share_is_sent_twice_however_late_all_are(requests: int, seed: int) -> None:
    budget, spent, chance = Budget(), 0, random.Random(seed)
    for _ in range(requests):
        budget.on_request()
        spent += budget.try_spend(chance.randrange(4))
    assert spent <= SHARE * requests + 1 - LEFT_OVER[-1]


def test_little_is_saved_up() -> None:
    budget = Budget()
    for _ in range(10_000):
        budget.on_request()
    assert sum(budget.try_spend(9) for _ in range(100)) == MAX_CREDIT + 1


def test_what_is_just_late_leaves_some_for_what_is_very_late() -> None:
    budget = Budget()
    assert not budget.try_spend(0)
    assert budget.try_spend(1)
    assert not budget.try_spend(1)
    assert budget.try_spend(2)
    assert not budget.try_spend(2)
