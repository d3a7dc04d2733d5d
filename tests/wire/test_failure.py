"""Errors on their way between peers."""

import math

import pytest

from meshmax.base.errors import Busy, ModelNotFound
from meshmax.wire.failure import MAX_MESSAGE, Failure, error_of, failure_of


def test_an_error_arrives_as_what_it_was() -> None:
    again = error_of(failure_of(ModelNotFound("model 'x' not found")))
    assert isinstance(again, ModelNotFound)
    assert again.message == "model 'x' not found"


@pytest.mark.parametrize(
    ("told_s", "taken_s"), [(1e12, 3600.0), (math.inf, 3600.0), (2.5, 2.5), (-1.0, 1.0), (math.nan, 1.0), (None, 1.0)]
)
def test_busy_arrives_with_a_sane_time_to_wait(told_s: float | None, taken_s: float) -> None:
    again = error_of(Failure("busy", "full", told_s))
    assert isinstance(again, Busy)
    assert again.retry_after_s == taken_s


def test_a_peers_text_is_cut_and_cannot_write_to_our_terminal() -> None:
    again = error_of(Failure("error", "\x1b[31m" + "x" * 10_000))
    assert "\x1b" not in again.message
    assert len(again.message) == MAX_MESSAGE
