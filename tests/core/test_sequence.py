"""The sequence of statuses: it grows whatever the clock does."""

from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.sequence import RESERVED, StatusSequence

NOW = 1_700_000_000_000


def test_it_follows_the_clock_and_never_stands_still() -> None:
    sequence = StatusSequence()
    assert [sequence.next(NOW), sequence.next(NOW), sequence.next(NOW + 5000)] == [NOW, NOW + 1, NOW + 5000]


def test_after_a_restart_with_an_earlier_clock_it_goes_on_above_what_was_kept() -> None:
    before = StatusSequence()
    bound = before.to_keep(NOW)
    assert bound is not None
    before.kept(bound)
    last = before.next(NOW)
    assert StatusSequence(bound).next(NOW - 86_400_000) > last


def test_the_bound_is_moved_seldom() -> None:
    sequence, writes = StatusSequence(), 0
    for second in range(3600):
        now = NOW + second * 1000
        if (bound := sequence.to_keep(now)) is not None:
            sequence.kept(bound)
            writes += 1
        sequence.next(now)
    assert writes <= 3600 * 1000 // (RESERVED // 2) + 1


@given(st.lists(st.tuples(st.integers(-(10**9), 10**9), st.booleans()), max_size=60))
def test_it_grows_over_restarts_whatever_the_clock_shows(steps: list[tuple[int, bool]]) -> None:
    file, last = 0, 0
    sequence = StatusSequence(file)
    for offset, restarts in steps:
        if restarts:
            sequence = StatusSequence(file)
        if (bound := sequence.to_keep(NOW + offset)) is not None:
            file = bound
            sequence.kept(bound)
        number = sequence.next(NOW + offset)
        assert last < number <= file
        last = number
