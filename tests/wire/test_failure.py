"""Errors on their way between peers."""

import math

import msgspec
import pytest

from meshmax.base.errors import Busy, Draining, ModelNotFound
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


@pytest.mark.parametrize("stopping", [False, True])
def test_that_a_peer_ends_crosses_as_a_field_whatever_it_says(stopping: bool) -> None:
    again = error_of(failure_of(Draining("no more", stopping=stopping)))
    assert isinstance(again, Draining)
    assert again.stopping is stopping


def test_peers_from_before_the_field_understand_and_are_understood() -> None:
    class Before(msgspec.Struct, frozen=True, omit_defaults=True, tag="failure"):
        code: str
        message: str
        retry_after_s: float | None = None

    told = msgspec.msgpack.encode(failure_of(Draining("The peer takes no new work.", stopping=True)))
    assert msgspec.msgpack.decode(told, type=Before).code == "draining"
    again = error_of(msgspec.msgpack.decode(msgspec.msgpack.encode(Before("draining", "no more")), type=Failure))
    assert isinstance(again, Draining)
    assert not again.stopping


def test_what_is_not_ending_says_nothing_of_it() -> None:
    assert b"stopping" not in msgspec.msgpack.encode(failure_of(ModelNotFound()))
    assert not hasattr(error_of(Failure("busy", "full", stopping=True)), "stopping")
