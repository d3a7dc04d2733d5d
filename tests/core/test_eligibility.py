"""Who may be asked at all."""

import math
from typing import Any

import pytest

from meshmax.base.route import Verdict
from meshmax.core.breaker import Standing
from meshmax.core.eligibility import MAX_ROOM_S, MIN_ROOM_S, is_resting, kept_out, rest_of
from tests.core.contenders import BUSY, FAILED, GPU, HALF_OPEN, peer

PROBED = Standing("open", 30.0, "peer_gone", 2, probing=True)
QUOTA = Standing("open", 30.0, "quota_exceeded")
DRAINS = Standing("open", 30.0, "draining")

CASES: list[tuple[str, dict[str, Any], tuple[Verdict, str] | None]] = [
    ("a sound peer may be asked", {}, None),
    ("ourselves, too", {"peer_state": "self"}, None),
    ("one that is not connected is not", {"peer_state": "offline"}, ("excluded", "not connected")),
    ("nor one of which nothing is known", {"silent": True}, ("excluded", "not connected")),
    ("nor one that drains by its state", {"peer_state": "draining"}, ("draining", "draining")),
    ("nor by its status", {"draining": True}, ("draining", "draining")),
    ("nor one with a part of the model", {"state": "partial"}, ("excluded", "has only a part of it")),
    ("nor one that failed", {"standing": FAILED}, ("broken", "failed lately (engine_crashed)")),
    ("the first one after its time is up may be", {"standing": HALF_OPEN}, None),
    (
        "the next is not, until that one is back",
        {"standing": PROBED},
        ("broken", "failed lately (peer_gone), and one request is finding out whether it works again"),
    ),
    ("nor one that said it is busy", {"standing": BUSY}, ("busy", "said it is busy")),
    ("nor one that turned a request away as it drains", {"standing": DRAINS}, ("busy", "takes nothing now (draining)")),
    ("nor one whose queue is full", {"running": 4, "queued": 8, "limit": 8}, ("full", "its queue is full")),
    ("a queue that is not full is one", {"running": 4, "queued": 7, "limit": 8}, None),
    ("those who wait for another model do not count", {"running": 3, "queued": 8, "limit": 8}, None),
    ("nor is one whose quota is used up", {"standing": QUOTA}, ("busy", "takes nothing now (quota_exceeded)")),
    ("a limit that is not told is none", {"running": 4, "queued": 900}, None),
    ("one that drains and failed drains", {"draining": True, "standing": FAILED}, ("draining", "draining")),
]  # fmt: skip


@pytest.mark.parametrize(("how", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_who_may_be_asked(how: dict[str, Any], expected: tuple[Verdict, str] | None) -> None:
    assert kept_out(peer("a", **{**GPU, **how})) == expected


def test_what_passes_with_time_is_told_from_what_does_not() -> None:
    assert [verdict for verdict in ("busy", "broken", "draining", "excluded") if is_resting(verdict)] == [
        "busy",
        "broken",
    ]


RESTS: list[tuple[dict[str, Any], tuple[str, float]]] = [
    ({"standing": FAILED}, ("broken", 10.0)),
    ({"standing": PROBED}, ("probed", 30.0)),
    ({"standing": BUSY}, ("busy", 5.0)),
    ({"running": 4, "queued": 8, "limit": 8}, ("full", 100.0 + MIN_ROOM_S)),
    ({"running": 4, "queued": 8, "limit": 8, "turn_s": 4.0}, ("full", 104.0)),
    ({"running": 4, "queued": 8000, "limit": 8, "turn_s": 4.0}, ("full", 100.0 + MAX_ROOM_S)),
    ({"peer_state": "offline"}, ("gone", math.inf)),
    ({"state": "partial"}, ("", 0.0)),
    ({"draining": True}, ("", 0.0)),
]


@pytest.mark.parametrize(("how", "expected"), RESTS)
def test_until_when_one_rests_that_may_be_asked_later(how: dict[str, Any], expected: tuple[str, float]) -> None:
    contender = peer("a", **{**GPU, **how})
    kept = kept_out(contender)
    assert kept is not None
    assert rest_of(contender, kept[0], 100.0) == expected
