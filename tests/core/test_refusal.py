"""The words of a refusal: how many, what keeps them, and when to come again."""

import pytest

from meshmax.base.ids import PeerId
from meshmax.core.absence import AGAIN_S, LostJustNow
from meshmax.core.delivery_words import Choice, Rest
from meshmax.core.pace import Gaps, frame_gaps
from meshmax.core.refusal import MAX_SAID, NobodyNow, refusal, why_nobody


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
