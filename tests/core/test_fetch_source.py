"""One source's window and patience, by its own measured rate."""

from __future__ import annotations

import pytest

from meshmax.base.ids import PeerId
from meshmax.core.fetch_source import (
    FIRST_PATIENCE_S,
    FIRST_WINDOW,
    MAX_CHUNK_S,
    MAX_DEFER_S,
    MAX_PATIENCE_S,
    MAX_REFUSALS,
    MAX_WINDOW,
    MIN_DEFER_S,
    MIN_PATIENCE_S,
    PATIENCE_CHUNKS,
    SAMPLE_S,
    WINDOW_S,
    Source,
)


def measured(chunk_s: float, chunks: int = 100) -> Source:
    """A source that has delivered ``chunks``, one every ``chunk_s``, and ended at chunks * chunk_s."""
    source = Source(PeerId("a"))
    for index in range(chunks):
        source.ask(index, index * chunk_s)
        source.delivered(index, 1, (index + 1) * chunk_s)
    return source


def test_a_source_that_owes_nothing_is_never_silent() -> None:
    assert Source(PeerId("a")).silence_ends_s() is None
    assert measured(0.1).silence_ends_s() is None


@pytest.mark.parametrize(
    ("chunk_s", "patience_s"), [(0.01, MIN_PATIENCE_S), (1.0, PATIENCE_CHUNKS), (20.0, MAX_PATIENCE_S)]
)
def test_patience_follows_the_measured_rate_within_bounds(chunk_s: float, patience_s: float) -> None:
    source = measured(chunk_s)
    now = 100 * chunk_s
    source.ask(999, now)
    assert source.silence_ends_s() == pytest.approx(now + patience_s)


def test_patience_before_anything_is_measured_and_its_growth_with_each_silence() -> None:
    source = Source(PeerId("a"))
    source.ask(0, 0.0)
    assert source.silence_ends_s() == FIRST_PATIENCE_S
    source.silent(10.0)
    assert source.silence_ends_s() == 10.0 + 2 * FIRST_PATIENCE_S
    source.delivered(0, 1, 11.0)
    source.ask(1, 11.0)
    assert source.timeouts == 0


def test_one_chunk_may_not_take_for_ever() -> None:
    source = Source(PeerId("a"))
    source.ask(0, 0.0)
    source.heard_s = MAX_CHUNK_S - 1
    assert source.silence_ends_s() == MAX_CHUNK_S


def test_the_window_holds_as_much_of_the_rate_as_covers_a_round_trip_and_no_more() -> None:
    assert measured(0.001).room(1e6) == MAX_WINDOW
    assert measured(0.1).room(1e6) == pytest.approx(WINDOW_S / 0.1, abs=1)
    assert measured(5.0).room(1e6) == FIRST_WINDOW


def test_the_window_halves_with_each_silence_but_one_chunk_is_always_asked_for() -> None:
    source = measured(0.001)
    rooms = []
    for _ in range(7):
        source.silent(1.0)
        rooms.append(source.room(2.0))
    assert rooms == [32, 16, 8, 4, 2, 1, 1]


def test_chunks_that_are_told_of_in_batches_are_measured_as_if_they_had_come_evenly() -> None:
    source = Source(PeerId("a"))
    for index in range(640):
        source.ask(index, 0.0)
    for index in range(640):
        source.delivered(index, 1, 0.01 * (index // 8 + 1))  # eight at once every 10 ms
    assert source.pace_s() == pytest.approx(0.00125, rel=0.2)


def test_a_pause_in_which_nothing_was_asked_does_not_make_a_source_slow() -> None:
    source = measured(SAMPLE_S)
    source.ask(999, 1000.0)
    source.delivered(999, 1, 1000.0 + SAMPLE_S)
    assert source.pace_s() == pytest.approx(SAMPLE_S)


def test_a_chunk_that_was_put_off_may_be_asked_for_again_when_its_time_has_come() -> None:
    source = Source(PeerId("a"))
    source.haves = 0b11
    source.ask(0, 0.0)
    assert source.settled(0, 1.0)
    source.deferred(0, 5.0, 1.0)
    assert (source.askable, source.wakes_s()) == (0b10, 6.0)
    source.wake(5.9)
    assert source.askable == 0b10
    source.wake(6.0)
    assert (source.askable, source.wakes_s()) == (0b11, None)


@pytest.mark.parametrize(("says_s", "lasts_s"), [(0.0, MIN_DEFER_S), (1e9, MAX_DEFER_S)])
def test_how_long_a_chunk_is_put_off_is_bounded(says_s: float, lasts_s: float) -> None:
    source = Source(PeerId("a"))
    source.haves = 0b1
    source.deferred(0, says_s, 0.0)
    assert source.wakes_s() == lasts_s


def test_a_source_that_refuses_all_the_time_is_left_alone_and_what_is_remembered_is_bounded() -> None:
    source = Source(PeerId("a"))
    source.haves = (1 << 1000) - 1
    for index in range(MAX_REFUSALS):
        assert source.room(0.0) > 0
        source.deferred(index, 2.0, 0.0)
    assert source.room(0.0) == 0
    source.wake(2.0)
    assert source.room(2.0) > 0
    assert source.askable == source.haves


def test_a_chunk_that_it_sent_wrong_stays_barred_when_a_cancel_or_a_busy_is_over() -> None:
    source = Source(PeerId("a"))
    source.haves = 0b11
    for index in (0, 1):
        source.ask(index, 0.0)
        source.leave(index)
    source.settled(0, 1.0)
    source.struck(0)
    source.deferred(0, 1.0, 1.0)
    source.wake(100.0)
    assert (source.askable, source.strikes) == (0, 1)
    assert source.settled(1, 2.0)
    assert source.askable == 0b10


def test_what_was_cancelled_fills_the_window_until_it_is_confirmed() -> None:
    source = measured(0.001)
    source.haves = 0b11 << 120
    source.ask(120, 1.0)
    source.leave(120)
    assert source.room(1.0) == MAX_WINDOW - 1
    assert source.askable == 0b10 << 120
    assert source.silence_ends_s() is not None
    assert source.settled(120, 2.0)
    assert not source.settled(120, 2.0)
    assert source.room(2.0) == MAX_WINDOW


def test_a_source_that_comes_back_keeps_its_strikes_and_owes_nothing() -> None:
    source = measured(0.01)
    source.ask(500, 1.0)
    source.struck(7)
    source.begin()
    assert (source.strikes, source.bad, source.bytes) == (1, 1 << 7, 100)
    assert (source.asked, source.haves) == ({}, 0)
    assert source.room(1.0) == 1
