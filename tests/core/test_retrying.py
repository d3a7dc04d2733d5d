"""What an error of one peer means for the request."""

import pytest

from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ConnectError,
    ContextTooLong,
    Draining,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    MeshmaxError,
    ModelNotFound,
    NotAMember,
    PeerGone,
    RemoteProtocolError,
    StoreCorrupt,
    StoreError,
)
from meshmax.core.retrying import is_final, most_telling, passes


@pytest.mark.parametrize(
    ("error", "ours", "final", "passing"),
    [
        (PeerGone(), False, False, True),
        (ConnectError(), False, False, True),
        (EngineCrashed(), False, False, True),
        (Busy(), False, False, True),
        (Draining(), False, False, False),
        (EngineUnavailable(), False, False, False),
        (EngineError(), False, False, False),
        (ModelNotFound(), False, False, False),
        (NotAMember(), False, False, False),
        (RemoteProtocolError(), False, False, False),
        (StoreError(), True, False, False),
        (StoreCorrupt(), True, False, False),
        (ContextTooLong(), False, True, False),
        (CapabilityMissing(), False, True, False),
        (InvalidRequest(), False, True, False),
        (MeshmaxError("a newer peer's word"), False, False, False),
        (MeshmaxError("our own"), True, True, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_may_be_asked_again(error: MeshmaxError, ours: bool, final: bool, passing: bool) -> None:
    assert is_final(error, ours) == final
    assert passes(error) == passing


def test_what_broke_is_told_before_who_was_busy_and_of_the_busy_the_shortest_wait() -> None:
    crash, soon, late = EngineCrashed(), Busy("soon", 1.0), Busy("late", 9.0)
    assert most_telling([late, soon]) is soon
    assert most_telling([crash, late]) is crash
    assert isinstance(most_telling([]), PeerGone)


def test_in_the_middle_of_an_answer_what_broke_it_off_is_told() -> None:
    gone, unreachable, contradiction = PeerGone("it went away"), ConnectError(), EngineError("differently")
    told = most_telling([gone, unreachable, Busy()], middle=True)
    assert (type(told), told.message) == (PeerGone, "it went away, and no other peer could carry it on")
    assert most_telling([gone, contradiction, unreachable], middle=True) is contradiction
    told = most_telling([EngineCrashed("x broke off"), CapabilityMissing("x cannot go on")], middle=True)
    assert (type(told), told.message) == (EngineCrashed, "x broke off; x cannot go on")
