"""How long a peer may be silent: learnt from its own gaps, within bounds, longer after false alarms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, Sha256
from meshmax.core import pace
from meshmax.core.pace import (
    CALM_AFTER_S,
    CALM_FRAME_SILENCE_S,
    CALM_KEEP_ALIVE_S,
    CEILING_S,
    FIRST_GAP_S,
    FLOOR_S,
    FRAME_CEILING_S,
    FRAME_SILENCE_S,
    KEEP_ALIVE_S,
    MAX_PATIENCE,
    Alarms,
    Gaps,
    Paces,
    frame_gaps,
    frame_silence_s,
    keep_alive_s,
)

MODEL = Sha256("ab" * 32)


def gaps_of(*seconds: float) -> Gaps:
    gaps, now = Gaps(), 0.0
    for gap_s in seconds:
        now += gap_s
        gaps.add(gap_s, now)
    return gaps


@pytest.mark.parametrize(
    ("seconds", "least", "most"),
    [
        ([], FIRST_GAP_S, FIRST_GAP_S),
        ([0.01] * 2, FIRST_GAP_S, FIRST_GAP_S),
        ([0.01] * 50, FLOOR_S, FLOOR_S),
        ([0.5] * 50, 1.0, 1.1),
        ([2.0] * 50, 4.0, 5.0),
        ([0.01] * 50 + [1.5], 3.0, 3.5),
        ([30.0] * 10, CEILING_S, CEILING_S),
    ],
)
def test_a_deadline_follows_the_usual_and_the_longest_gap(seconds: list[float], least: float, most: float) -> None:
    assert least <= gaps_of(*seconds).deadline_s() <= most


def test_a_long_gap_is_forgotten_in_minutes_and_not_in_tokens() -> None:
    gaps = gaps_of(*[0.01] * 10, 5.0)
    for n in range(1000):
        gaps.add(0.01, 5.1 + n * 0.01)
    assert gaps.deadline_s() > 9
    for n in range(3000):
        gaps.add(0.5 if n % 2 else 0.1, 20 + n * 0.3)
    assert gaps.deadline_s() < 3


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_deadlines_stay_within_their_bounds_whatever_was_measured(seconds: list[float]) -> None:
    assert FLOOR_S <= gaps_of(*seconds).deadline_s() <= CEILING_S
    frames, now = frame_gaps(), 0.0
    for gap_s in seconds:
        now += gap_s
        frames.add(gap_s, now)
    assert FRAME_SILENCE_S <= frames.deadline_s() <= FRAME_CEILING_S


@given(st.floats(0, 1000))
def test_two_keep_alives_may_be_missed_before_a_peer_is_suspected(silent_s: float) -> None:
    """As the server sends them, from any moment of silence on."""
    next_s = silent_s + keep_alive_s(silent_s)
    assert frame_silence_s(silent_s) >= 2 * (next_s - silent_s)
    assert KEEP_ALIVE_S <= keep_alive_s(silent_s) <= CALM_KEEP_ALIVE_S


def test_a_long_silence_costs_fewer_keep_alives() -> None:
    assert keep_alive_s(CALM_AFTER_S - 0.1) == KEEP_ALIVE_S
    assert keep_alive_s(CALM_AFTER_S) == CALM_KEEP_ALIVE_S
    assert frame_silence_s(0.0) == FRAME_SILENCE_S
    assert frame_silence_s(CALM_AFTER_S) == CALM_FRAME_SILENCE_S


def test_false_alarms_make_patient_true_ones_and_time_do_not() -> None:
    alarms = Alarms()
    for _ in range(20):
        alarms.on_alarm(0.0, false=True)
    assert alarms.factor(0.0) == MAX_PATIENCE
    assert alarms.factor(60.0) == pytest.approx(2.5)
    assert alarms.factor(1e4) == pytest.approx(1.0)
    for _ in range(20):
        alarms.on_alarm(0.0, false=False)
    assert alarms.factor(0.0) == 1.0


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MAX_PACES", 2)
    paces = Paces()
    first, second, third = map(PeerId, "abc")
    gaps = paces.of(first, MODEL, "cpu")
    frames = paces.frames(first)
    paces.of(second, MODEL, "cpu")
    paces.frames(second)
    assert paces.of(first, MODEL, "cpu") is gaps
    assert paces.frames(first) is frames
    paces.of(third, MODEL, "cpu")
    paces.frames(third)
    assert paces.of(first, MODEL, "cpu") is gaps
    assert paces.frames(first) is frames
