"""Waiting longer after each failure, never longer than the cap."""

import random

from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.backoff import backoff_s


@given(st.integers(1, 10_000), st.integers())
def test_the_wait_is_between_half_and_all_of_the_doubled_capped_time(failures: int, seed: int) -> None:
    wait = backoff_s(failures, 1.0, 60.0, random.Random(seed))
    ceiling = min(2.0 ** (failures - 1), 60.0) if failures < 100 else 60.0
    assert ceiling / 2 <= wait <= ceiling
