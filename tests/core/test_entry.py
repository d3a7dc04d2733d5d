"""Room for so many prompts of our own clients, the last quarter of it for those that somebody waits for."""

import pytest

from meshmax.base.errors import Busy
from meshmax.core.entry import Entry
from meshmax.core.fair_queue import MAX_RETRY_S


def test_one_prompt_too_many_is_busy_and_a_place_that_was_left_is_free() -> None:
    entry = Entry(4)
    for _ in range(4):
        entry.join("interactive")
    with pytest.raises(Busy, match="4 are under way") as refused:
        entry.join("interactive")
    assert refused.value.retry_after_s == 1.0
    entry.leave(0.0, 8.0)
    entry.join("interactive")
    assert entry.under_way == 4


def test_batch_prompts_leave_a_quarter_of_the_places() -> None:
    entry = Entry(4)
    for _ in range(3):
        entry.join("batch")
    with pytest.raises(Busy):
        entry.join("batch")
    entry.join("interactive")
    small = Entry(1)
    small.join("batch")


def test_when_to_come_again_is_half_of_what_prompts_take_and_bounded() -> None:
    entry = Entry(1)
    entry.join("interactive")
    entry.leave(0.0, 8.0)
    assert entry.retry_after_s() == 4.0
    entry.join("interactive")
    entry.leave(0.0, 1e6)
    assert entry.retry_after_s() == MAX_RETRY_S
