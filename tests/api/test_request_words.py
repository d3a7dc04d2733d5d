"""A request as the mesh's interface tells it: moments and lengths of time that programs read, and sentences."""

from typing import Any

import httpx
import msgspec

from meshmax.api.request_words import request_json
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.route import Attempt, Candidate, Figures, Route, Wait

DESK, ATTIC = PeerId("desk-id"), PeerId("attic-id")
CANDIDATE = Candidate(
    DESK, "desk", "gpu", True, 0.0012345, 2, 2.0, "chosen", "near", Figures(0.001, 0.2, 0.0, 0.3, 1.5), 1.2
)
ROUTE = Route(
    "r1",
    Sha256("ab" * 32),
    DESK,
    "desk: near",
    (CANDIDATE,),
    (
        Attempt(DESK, "peer_gone", 0.05, "first", 0.0, 1.0, 7, "gone"),
        Attempt(ATTIC, kind="continuation", at_s=1.001, load_s=0.5),
    ),
    model="m",
    started_at_s=1_761_498_924.5,
    first_token_s=0.05,
    waits=(Wait(0.01, None, "attic is busy"),),
)


def test_moments_are_rfc_3339_and_lengths_are_milliseconds() -> None:
    shown = request_json(ROUTE)
    assert shown["started_at"] == "2025-10-26T17:15:24.5Z"
    assert (shown["first_token_ms"], shown["total_ms"]) == (50.0, None)
    assert shown["candidates"][0]["figures"] == {
        "rtt_ms": 1.0, "queue_ms": 200.0, "load_ms": 0.0, "prompt_ms": 300.0, "output_ms": 1500.0,
    }  # fmt: skip
    assert shown["candidates"][0]["rtt_ms"] == 1.234
    assert shown["candidates"][0]["told_wait_ms"] == 1200.0
    assert shown["waits"] == [{"at_ms": 10.0, "took_ms": None, "why": "attic is busy"}]
    first, second = shown["attempts"]
    assert (first["name"], first["at_ms"], first["ended_ms"], first["tokens"]) == ("desk", 0.0, 1000.0, 7)
    assert (second["name"], second["at_ms"], second["ended_ms"]) == ("...attic-id", 1001.0, None)
    assert (first["load_ms"], second["load_ms"]) == (0.0, 500.0)
    assert not any(key.endswith("_s") for key in msgspec.json.decode(msgspec.json.encode(shown)))


def test_it_says_the_same_in_sentences_and_who_and_by_which_rule() -> None:
    shown = request_json(ROUTE)
    assert (shown["id"], shown["peer_name"], shown["policy"], shown["state"]) == ("r1", "desk", "latency", "running")
    assert any("it went away" in line for line in shown["story"])


async def test_a_request_is_found_by_any_id_that_a_client_may_choose(client: httpx.AsyncClient, node: Any) -> None:
    node.router.route = lambda request_id: ROUTE if request_id == "a/b?c" else None
    assert (await client.get("/api/v1/requests/a%2Fb%3Fc")).json()["model"] == "m"
    reply = await client.get("/api/v1/requests/other")
    assert (reply.status_code, reply.json()["code"]) == (404, "not_found")
    assert "Only the peer that a prompt came to knows" in reply.json()["error"]
