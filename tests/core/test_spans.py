"""Which bytes are there."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.spans import Spans

PLACES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=20)


def bytes_of(spans: Spans) -> set[int]:
    return {at for start, end in spans for at in range(start, end)}


@given(PLACES)
def test_spans_hold_exactly_what_was_added(places: list[tuple[int, int]]) -> None:
    spans, model = Spans(), set[int]()
    for start, end in places:
        new = set(range(start, end)) - model
        assert spans.add(start, end) == len(new)
        model |= new
    assert bytes_of(spans) == model
    assert spans.total == len(model)
    ends = list(spans)
    assert all(one[1] < other[0] for one, other in pairwise(ends))  # joined, in order


@given(PLACES, st.integers(0, 60), st.integers(0, 60))
def test_gaps_are_what_is_missing(places: list[tuple[int, int]], start: int, end: int) -> None:
    spans = Spans(places)
    missing = set(range(start, end)) - bytes_of(spans)
    assert {at for a, b in spans.gaps(start, end) for at in range(a, b)} == missing
    assert spans.covers(start, end) == (not missing)


@given(PLACES)
def test_the_prefix_ends_at_the_first_gap(places: list[tuple[int, int]]) -> None:
    spans = Spans(places)
    have = bytes_of(spans)
    assert spans.prefix == next(at for at in range(62) if at not in have)


def test_a_copy_is_apart() -> None:
    spans = Spans([(0, 5)])
    other = spans.copy()
    other.add(5, 9)
    assert list(spans) == [(0, 5)]
    assert list(other) == [(0, 9)]
    assert spans != other
