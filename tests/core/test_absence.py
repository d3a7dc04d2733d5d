"""What is told of a model whose holder was lost."""

import msgspec
import pytest

from meshmax.base.ids import PeerId
from meshmax.base.status import PeerStatus, PeerView
from meshmax.core.absence import AGAIN_S, AWAY_S, MAX_NAMED, all_lost, lost_just_now

STATUS = PeerStatus(PeerId("p"), 1, 0, "attic", "0")
LOST = PeerView(PeerId("p"), "offline", "direct", STATUS, last_seen_s=1000.0)


def test_who_was_lost_a_moment_ago_may_be_back_soon() -> None:
    error = lost_just_now("far", "attic", LOST, 1007.0)
    assert error is not None
    assert error.message == "attic, which has model 'far', was lost 7 s ago and is looked for: try again"
    assert (error.http_status, error.retry_after_s, error.code) == (503, AGAIN_S, "busy")


def test_a_clock_that_was_set_back_makes_no_time_below_zero() -> None:
    error = lost_just_now("far", "attic", LOST, 900.0)
    assert error is not None
    assert "lost 0 s ago" in error.message


@pytest.mark.parametrize(
    "view",
    [
        None,
        msgspec.structs.replace(LOST, last_seen_s=1000.0 - AWAY_S),
        msgspec.structs.replace(LOST, status=msgspec.structs.replace(STATUS, leaving=True)),
        msgspec.structs.replace(LOST, status=None),
        msgspec.structs.replace(LOST, state="online"),
    ],
    ids=["nobody", "long ago", "took its leave", "never told", "is there"],
)
def test_who_is_gone_for_good_is_not_waited_for(view: PeerView | None) -> None:
    assert lost_just_now("far", "attic", view, 1001.0) is None


@pytest.mark.parametrize(
    ("model", "names", "words"),
    [
        ("m", ["a"], "a, which has model 'm', was lost just now and is looked for: try again"),
        ("", ["a", "b"], "a, b, which have the model, were lost just now and are looked for: try again"),
        ("m", ["a"] * (MAX_NAMED + 2), "a, a, a, a and 2 more, which have model 'm', were lost"),
    ],
)
def test_those_who_were_waited_for_are_named_as_far_as_there_is_room(model: str, names: list[str], words: str) -> None:
    error = all_lost(model, names)
    assert error.message.startswith(words)
    assert (error.http_status, error.retry_after_s) == (503, AGAIN_S)
