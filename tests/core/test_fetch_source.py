"""One source's window and patience, by its own measured rate."""

from __future__ import annotations

import pytest

from meshmax.base.ids import PeerId
from meshmax.core.fetch_source import (
    FIRST_PATIENCE_S,
    FIRST_WINDOW,
    MAX_CHUNK_S,
    MAX_PATIENCE_S,
    MAX_WINDOW,
    MIN_PATIENCE_S,
    PATIENCE_CHUNKS,
    Source,
)


def measured(chunk_s: float, chunks: int = 10) -> Source:
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
    now = 10 * chunk_s
    source.ask(99, now)
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


def test_the_window_holds_at_most_two_seconds_of_the_rate() -> None:
    assert measured(0.01).room(1e6) == MAX_WINDOW
    assert measured(0.5).room(1e6) == 4
    assert measured(5.0).room(1e6) == FIRST_WINDOW


def test_the_window_halves_with_each_silence_but_one_chunk_is_always_asked_for() -> None:
    source = measured(0.01)
    rooms = []
    for _ in range(4):
        source.silent(1.0)
        rooms.append(source.room(2.0))
    assert rooms == [4, 2, 1, 1]


def test_what_was_cancelled_fills_the_window_until_it_is_confirmed() -> None:
    source = measured(0.01)
    source.haves = 0b11 << 20
    source.ask(20, 1.0)
    source.leave(20)
    assert source.room(1.0) == MAX_WINDOW - 1
    assert source.askable == 0b10 << 20
    assert source.silence_ends_s() is not None
    assert source.settled(20, 2.0)
    assert not source.settled(20, 2.0)
    assert source.room(2.0) == MAX_WINDOW


def test_a_source_that_comes_back_keeps_its_strikes_and_owes_nothing() -> None:
    source = measured(0.01)
    source.ask(50, 1.0)
    source.strikes, source.bad = 1, 1 << 7
    source.begin()
    assert (source.strikes, source.bad, source.bytes) == (1, 1 << 7, 10)
    assert (source.asked, source.haves) == ({}, 0)
    assert source.room(1.0) == 1
