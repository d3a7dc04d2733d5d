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
from meshmax.core.refusal import WentAway
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
    assert passes(error, middle=True) == (passing or isinstance(error, Draining))


@pytest.mark.parametrize("stopping", [False, True])
def test_of_an_answer_that_was_handed_over_it_is_told_that_nobody_took_it(stopping: bool) -> None:
    told = most_telling(
        [Draining("desk was drained", 2.0, stopping=stopping), PeerGone("attic went away")], middle=True
    )
    assert isinstance(told, Draining)
    assert (told.message, told.retry_after_s, told.stopping) == (
        "desk was drained, and no other peer could carry it on",
        2.0,
        stopping,
    )


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


def test_where_peers_only_went_away_it_is_told_who_did_and_that_another_try_may_help() -> None:
    gone = PeerGone("desktop went away before it answered")
    told = most_telling([gone, ConnectError("attic could not be reached"), gone])
    assert isinstance(told, WentAway)
    assert (told.code, told.http_status) == ("peer_gone", 503)
    assert told.message == (
        "desktop went away before it answered; attic could not be reached, and no other peer has the model ready: "
        "try again in a moment, and see with `meshmax peers` who is there"
    )
    assert "and no other peer could answer: try again" in most_telling([gone, Busy()]).message


def test_what_failed_last_is_told() -> None:
    gone, wrong = PeerGone("desktop went away before it answered"), RemoteProtocolError("nonsense")
    assert most_telling([gone, wrong]) is wrong
    told = most_telling([wrong, gone])
    assert isinstance(told, WentAway)
    assert told.message.startswith("desktop went away before it answered, and no other peer could answer: try again")
