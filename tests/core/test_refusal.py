"""The words of a refusal: how many, what keeps them, and when to come again."""

import msgspec
import pytest

from meshmax.base.ids import PeerId
from meshmax.base.status import PeerStatus, PeerView
from meshmax.core.delivery_words import Choice, Rest
from meshmax.core.pace import Gaps, frame_gaps
from meshmax.core.refusal import (
    AGAIN_S,
    AWAY_S,
    MAX_NAMED,
    MAX_SAID,
    LostJustNow,
    NobodyNow,
    all_lost,
    lost_just_now,
    refusal,
    why_nobody,
)


def choice(name: str, from_s: float, rests: Rest, code: str = "", reason: str = "", *, ours: bool = False) -> Choice:
    return Choice(
        PeerId(name), Gaps(), frame_gaps(), ours=ours, from_s=from_s, rests=rests, name=name, code=code, reason=reason
    )


CASES: list[tuple[list[Choice], str, float, bool]] = [
    (
        [choice("tower", 14.0, "full")],
        "tower, the only one that has model 'm' ready, has no room in its queue; there is room in about 4 s",
        4.0,
        True,
    ),
    (
        [choice("tower", 14.0, "full"), choice("attic", 13.2, "full"), choice("van", 19.0, "full")],
        "all 3 peers that have model 'm' ready are full; the first has room in about 4 s",
        3.2,
        True,
    ),
    (
        [choice("tower", 14.0, "busy", "busy"), choice("attic", 30.0, "full")],
        "none of the 2 peers that have model 'm' ready can be asked now: 1 busy, 1 full; the first has room in about 4 s",
        4.0,
        True,
    ),
    (
        [choice("tower", 22.5, "broken", "peer_gone", "the peer went away.")],
        "tower, the only one that has model 'm' ready, failed lately (peer_gone: the peer went away); "
        "it is tried again in about 13 s",
        12.5,
        False,
    ),
    (
        [choice("", 10.2, "broken", "engine_unavailable", "no memory", ours=True)],
        "this peer, the only one that has model 'm' ready, failed lately (engine_unavailable: no memory); "
        "it is tried again in about 1 s",
        1.0,
        False,
    ),
    (
        [choice("tower", 40.0, "probed", "connect"), choice("attic", 60.0, "busy", "draining")],
        "none of the 2 peers that have model 'm' ready can be asked now: 1 busy, 1 out of order (tower failed lately (connect)); "
        "one request is finding out whether it works again",
        30.0,
        False,
    ),
    (
        [choice("tower", 14.0, "busy", "draining"), choice("attic", 99.0, "gone")],
        "tower, the only one that has model 'm' ready, takes nothing now (draining); there is room in about 4 s",
        4.0,
        True,
    ),
]


@pytest.mark.parametrize(("choices", "words", "after_s", "full"), CASES)
def test_the_words_tell_the_kind_and_the_time(choices: list[Choice], words: str, after_s: float, full: bool) -> None:
    error = refusal("m", choices, 10.0)
    assert isinstance(error, NobodyNow)
    assert error.message == words
    assert error.retry_after_s == pytest.approx(after_s)
    assert error.full is full
    assert (error.code, error.http_status) == ("busy", 503)


def test_where_all_were_lost_just_now_they_may_be_back_soon() -> None:
    error = refusal("m", [choice("tower", 0.0, "gone"), choice("attic", 0.0, "gone")], 10.0)
    assert isinstance(error, LostJustNow)
    assert (error.http_status, error.retry_after_s) == (503, AGAIN_S)
    assert error.message == "tower, attic, which have model 'm', were lost just now and are looked for: try again"


def test_what_a_peer_said_is_bounded_and_can_stand_in_a_header() -> None:
    words = why_nobody("m", [choice("tower", 0.0, "broken", "engine", "\r\nX-Evil: 1 \x1b[31m\u00fc" + "x" * 1000)])
    assert words.isascii()
    assert words.isprintable()
    assert len(words) < MAX_SAID + 100


def test_a_wait_without_a_model_s_name_is_told_of_too() -> None:
    assert why_nobody("", [choice("tower", 0.0, "")]) == (
        "tower, the only one that has the model ready, failed a moment ago"
    )


# --- a model whose holder was lost just now ---------------------------------------------------------------------------

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
