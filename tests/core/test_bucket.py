"""core.bucket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.bucket import CREDIT_S, Bucket

SPAN_S = 10.0


def test_without_a_rate_nothing_waits() -> None:
    bucket = Bucket()
    assert [bucket.reserve(1 << 30, 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_each_reservation_waits_until_those_before_it_have_moved() -> None:
    bucket = Bucket(100)
    assert [bucket.reserve(50, 0.0), bucket.reserve(100, 0.0), bucket.reserve(1, 0.0)] == [0.0, 0.5, 1.5]


def test_no_more_than_the_credit_is_saved_up() -> None:
    bucket = Bucket(100)
    bucket.reserve(100, 0.0)
    assert bucket.reserve(100, 60.0) == 0.0
    assert bucket.reserve(100, 60.0) == pytest.approx(1.0 - CREDIT_S)


def test_a_new_rate_holds_for_what_is_owed_already() -> None:
    bucket = Bucket(100)
    bucket.reserve(1000, 0.0)  # ten seconds' worth
    bucket.set_rate(1000, 5.0)
    assert bucket.reserve(1, 5.0) == 0.5
    bucket.set_rate(0, 5.0)
    assert bucket.reserve(1000, 5.0) == 0.0


@given(
    rate=st.integers(10_000, 10**9),
    sizes=st.lists(st.integers(1, 1 << 18), min_size=1, max_size=200),
    gaps=st.lists(st.floats(0, 2), min_size=200, max_size=200),
)
def test_over_any_ten_seconds_no_more_than_the_rate_and_one_piece_moves(
    rate: int, sizes: list[int], gaps: list[float]
) -> None:
    bucket, now = Bucket(rate), 0.0
    moved: list[tuple[float, int]] = []
    for size, gap in zip(sizes, gaps, strict=False):
        now += gap
        now += bucket.reserve(size, now)
        moved.append((now, size))
    for first, (start_s, _) in enumerate(moved):
        within = [size for at_s, size in moved[first:] if at_s < start_s + SPAN_S]
        assert sum(within) <= rate * (SPAN_S + CREDIT_S) * 1.000001 + max(within)
