"""Pins: a name goes on meaning one model, and that model stays."""

import pytest

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.names import parse_name
from meshmax.core.pins import MAX_PINS, Pins

NAME = parse_name("llama3")
OLD, NEW = Sha256("a" * 64), Sha256("b" * 64)


def test_a_pinned_name_is_not_to_mean_another_model_or_none() -> None:
    pins = Pins()
    pins.pin(NAME, OLD)
    pins.require_free(NAME, OLD)
    for digest in (NEW, None):
        with pytest.raises(InvalidRequest, match="meshmax unpin LLAMA3:latest"):
            pins.require_free(parse_name("LLAMA3"), digest)
    with pytest.raises(InvalidRequest):
        pins.pin(NAME, NEW)


def test_a_model_is_kept_while_any_name_is_tied_to_it() -> None:
    pins = Pins()
    other = parse_name("other")
    pins.pin(NAME, OLD)
    pins.pin(other, OLD)
    assert pins.unpin(NAME)
    assert pins.keeps(OLD)
    assert pins.unpin(other)
    assert not pins.unpin(other)
    assert not pins.keeps(OLD)


def test_pins_are_bounded() -> None:
    pins = Pins({f"k{number}": OLD for number in range(MAX_PINS)})
    with pytest.raises(InvalidRequest, match="unpin one first"):
        pins.pin(NAME, OLD)


def test_what_is_pinned_can_be_kept() -> None:
    pins = Pins()
    pins.pin(NAME, OLD)
    assert Pins(pins.items()).of(NAME.key) == OLD
