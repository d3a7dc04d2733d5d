"""A name that no neighbour has is looked for farther away before anybody is told that there is none."""

from typing import Any

import httpx
import msgspec
import pytest
import trio

from meshmax.api.app import make_app
from meshmax.api.prompts import SEEK_S
from meshmax.base.errors import Busy, NoProviders
from meshmax.base.events import Transfer
from meshmax.base.route import Attempt, Route, Wait
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.core.refusal import WentAway
from meshmax.services.early_records import EARLY_KEPT
from meshmax.testing.asgi_transport import AsgiTransport
from meshmax.testing.garbage import collector_off
from tests.api.fake_node import DIGEST, THEIRS, entry


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"prompt": "x", "stream": False}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}], "stream": False}),
        ("/api/show", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_a_model_that_is_farther_away_answers(
    node: Any, client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    node.farther["remote"] = entry("remote:latest", DIGEST)
    reply = await client.post(path, json=body | {"model": "remote"})
    assert reply.status_code == 200, reply.text
    assert node.sought == ["remote"]


async def test_what_is_known_or_is_no_name_is_not_looked_for(node: Any, client: httpx.AsyncClient) -> None:
    assert (await client.post("/api/show", json={"model": "echo"})).status_code == 200
    assert (await client.post("/api/show", json={"model": "../etc"})).status_code == 404
    assert not node.sought


async def test_a_search_that_takes_long_is_given_up(node: Any, client: httpx.AsyncClient) -> None:
    async def seek(_name: str, _found: object) -> bool:
        await trio.sleep_forever()

    node.seek = seek
    began = trio.current_time()
    assert (await client.post("/api/show", json={"model": "nope"})).status_code == 404
    assert trio.current_time() - began <= SEEK_S + 0.1


# --- a holder that was lost just now ---------------------------------------------------------------------------------

PROMPT = {"model": "far", "prompt": "x", "stream": False}


def lose(node: Any) -> None:
    """The only holder of 'far' is lost."""
    node.presence.known[1] = msgspec.structs.replace(
        node.presence.known[1], state="offline", last_seen_s=node.now() - 1
    )
    node.left = node.catalog.known.pop(1)
    node.presence.on_news()


async def leaving(node: Any, path: str, asked: dict[str, Any]) -> Any:
    """Ask as a client that leaves after a second; the application."""
    body = [{"type": "http.request", "body": msgspec.json.encode(asked), "more_body": False}]

    async def receive() -> Any:
        await trio.lowlevel.checkpoint()
        if body:
            return body.pop()
        await trio.sleep(1)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await trio.lowlevel.checkpoint()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    app = make_app(node)
    await app(scope, receive, send)
    return app


def come_back(node: Any) -> None:
    node.presence.known[1] = msgspec.structs.replace(node.presence.known[1], state="online")
    node.catalog.known.append(node.left)
    node.presence.on_news()


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/v1/completions"])
async def test_a_prompt_waits_for_the_holder_that_was_lost_just_now_to_be_back(
    node: Any, client: httpx.AsyncClient, path: str
) -> None:
    lose(node)
    began = trio.current_time()
    replies: list[httpx.Response] = []

    async def ask() -> None:
        body = PROMPT | {"messages": [{"role": "user", "content": "x"}], "input": "x"}
        replies.append(await client.post(path, json=body))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        node.presence.on_news()  # of somebody else
        await trio.sleep(1)
        assert not replies
        come_back(node)
    assert trio.current_time() - began < 3
    assert len(node.router.asks) == 1, replies[0].text  # whatever the model is good for, its peer is asked


async def test_a_prompt_whose_holder_does_not_come_back_is_told_to_come_again_when_its_patience_is_over(
    node: Any, client: httpx.AsyncClient
) -> None:
    lose(node)
    began = trio.current_time()
    reply = await client.post("/api/generate", json=PROMPT)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert "attic, which has model 'far', was lost" in reply.json()["error"]
    assert PATIENCE_S - 0.1 <= trio.current_time() - began < PATIENCE_S + 0.5


async def test_the_time_that_a_search_took_counts(node: Any, client: httpx.AsyncClient) -> None:
    async def seek(_name: str, _found: object) -> bool:
        await trio.sleep_forever()

    node.seek = seek
    lose(node)
    began = trio.current_time()
    assert (await client.post("/api/generate", json=PROMPT)).status_code == 503
    assert trio.current_time() - began < PATIENCE_S + 0.5


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_whose_fetch_lost_its_last_source_is_told_who_had_it_and_how_much_is_here(
    node: Any, client: httpx.AsyncClient, stream: bool
) -> None:
    def fetch(ask: object, wishes: object) -> None:
        lose(node)
        raise NoProviders("'far' could not be fetched")

    node.router.open_answer = fetch
    pull = Transfer("t", "far:latest", "in", "cancelled", bytes_total=98_000_000, bytes_done=55_000_000)
    node.pulls.transfers = lambda: (pull,)
    reply = await client.post("/api/generate", json={**PROMPT, "stream": stream})
    assert "'far' could not be fetched: attic had it, and has been gone for" in reply.text
    assert "; 55 MB of its 98 MB are here" in reply.text
    node.presence.known = node.presence.known[:1]
    node.presence.gone = []
    reply = await client.post("/api/generate", json=PROMPT)
    assert ": 55 MB of its 98 MB are here, and `meshmax pull far" in reply.text
    node.pulls.transfers = lambda: (msgspec.structs.replace(pull, state="done"), pull)
    assert "are here" not in (await client.post("/api/generate", json=PROMPT)).text


async def test_what_only_shows_a_model_does_not_wait(node: Any, client: httpx.AsyncClient) -> None:
    lose(node)
    began = trio.current_time()
    assert (await client.post("/api/show", json={"model": "far"})).status_code == 503
    assert trio.current_time() - began < 1


@pytest.mark.parametrize("given", ["header", "configuration"])
async def test_a_prompt_for_this_peer_alone_waits_for_nobody_and_hears_what_would_help(
    node: Any, client: httpx.AsyncClient, given: str
) -> None:
    headers = {"X-Meshmax-Policy": "local-only"} if given == "header" else {}
    if given == "configuration":
        routing = msgspec.structs.replace(node.config.routing, policy="local-only")
        node.config = msgspec.structs.replace(node.config, routing=routing)
    lose(node)
    began = trio.current_time()
    reply = await client.post("/api/generate", json=PROMPT, headers=headers)
    assert trio.current_time() - began < 1
    assert reply.status_code == 404
    assert "retry-after" not in reply.headers
    assert reply.json()["error"].startswith(
        "the prompt was for this peer alone (policy local-only), which has no copy of 'far': attic had it"
    )


async def test_a_client_that_leaves_while_its_prompt_waits_ends_the_wait(node: Any) -> None:
    lose(node)
    began = trio.current_time()
    app = await leaving(node, "/api/generate", PROMPT)
    assert 1 <= trio.current_time() - began < 2
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://localhost") as client:
        told = (await client.get("/api/v1/requests")).json()["requests"][0]
    assert (told["state"], told["error"]) == ("cancelled", "")
    assert told["story"][1].startswith("The client went away after")


async def test_a_node_that_ends_ends_the_wait(node: Any) -> None:
    lose(node)
    app = make_app(node)
    replies: list[httpx.Response] = []

    async def ask() -> None:
        async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://localhost") as made:
            replies.append(await made.post("/api/generate", content=msgspec.json.encode(PROMPT)))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        app.end_answers()
    assert trio.current_time() - began < 2
    assert (replies[0].status_code, "shutting down" in replies[0].text) == (503, True)


async def test_a_prompt_whose_peer_went_away_before_it_answered_is_told_when_to_come_again(
    node: Any, client: httpx.AsyncClient
) -> None:
    node.router.refuse = WentAway("attic went away before it answered")
    reply = await client.post("/api/generate", json=PROMPT)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert reply.json() == {"error": "attic went away before it answered", "code": "peer_gone"}


# --- a node that has just started ------------------------------------------------------------------------------------


def begin(node: Any, left_s: float = 3.0) -> None:
    """The node has just started: for ``left_s`` from now on it may meet others."""
    ends = trio.current_time() + left_s
    node.first_moments.left_s = lambda: max(0.0, ends - trio.current_time())


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/v1/completions", "/api/show"])
async def test_a_node_that_has_just_started_knows_a_model_the_moment_that_it_meets_who_has_it(
    node: Any, client: httpx.AsyncClient, path: str
) -> None:
    lose(node)
    node.presence.known.pop()  # and was never there
    begin(node)
    replies: list[httpx.Response] = []

    async def ask() -> None:
        body = PROMPT | {"messages": [{"role": "user", "content": "x"}], "input": "x"}
        replies.append(await client.post(path, json=body))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.2)
        node.presence.on_news()  # of somebody else
        await trio.sleep(0.2)
        assert not replies
        node.catalog.known.append(node.left)
        node.presence.on_news()
    assert trio.current_time() - began < 1
    assert replies[0].status_code == 200 or node.router.asks, replies[0].text
    assert not node.sought


@pytest.mark.parametrize(
    ("verb", "path", "body"),
    [
        ("POST", "/api/generate", {"model": "nope", "prompt": "x"}),
        ("POST", "/api/show", {"model": "nope"}),
        ("GET", "/v1/models/nope", None),
        ("GET", "/api/v1/models/nope", None),
    ],
)
async def test_what_nobody_turns_out_to_have_is_not_found_when_the_first_moments_are_over(
    node: Any, client: httpx.AsyncClient, verb: str, path: str, body: Any
) -> None:
    begin(node)
    began = trio.current_time()
    assert (await client.request(verb, path, json=body)).status_code == 404
    assert 3 <= trio.current_time() - began < 4
    assert (await client.request(verb, path, json=body)).status_code == 404
    assert trio.current_time() - began < 5


async def test_in_the_first_moments_too_nobody_waits_for_what_is_no_name_or_what_is_for_this_peer_alone(
    node: Any, client: httpx.AsyncClient
) -> None:
    begin(node)
    began = trio.current_time()
    assert (await client.post("/api/show", json={"model": "../etc"})).status_code == 404
    assert (await client.post("/api/generate", json={"model": "../etc", "prompt": "x"})).status_code == 404
    alone = {"X-Meshmax-Policy": "local-only"}
    nobody = {"model": "nope", "prompt": "x"}
    assert (await client.post("/api/generate", json=nobody, headers=alone)).status_code == 404
    assert trio.current_time() - began < 1


@pytest.mark.parametrize("path", ["/api/generate", "/api/show"])
async def test_a_client_that_leaves_in_the_first_moments_ends_the_wait(node: Any, path: str) -> None:
    begin(node)
    began = trio.current_time()
    await leaving(node, path, {"model": "nope", "prompt": "x"})
    assert 1 <= trio.current_time() - began < 2
    assert not node.sought


@pytest.mark.parametrize("path", ["/api/generate", "/api/show"])
async def test_one_more_than_may_wait_in_the_first_moments_is_told_at_once(
    node: Any, client: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshmax.services.peer_news.MAX_WAITING", 0)
    begin(node)
    began = trio.current_time()
    assert (await client.post(path, json={"model": "nope", "prompt": "x"})).status_code == 404
    assert trio.current_time() - began < 1


async def test_a_prompt_that_waited_in_the_first_moments_tells_of_it(node: Any, client: httpx.AsyncClient) -> None:
    begin(node)
    nobody = {"model": "nope", "prompt": "x"}
    assert (await client.post("/api/generate", json=nobody, headers={"X-Request-ID": "r9"})).status_code == 404
    assert [wait["why"] for wait in (await why(client, "r9"))["waits"]] == [
        "this peer has just started, and has not met the others yet",
        "no peer near has the model, and it is looked for farther away",
    ]


# --- what is told of those that the router did not have at once ------------------------------------------------------


async def why(client: httpx.AsyncClient, request_id: str) -> Any:
    reply = await client.get(f"/api/v1/requests/{request_id}")
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_a_prompt_that_was_refused_before_anybody_was_asked_is_told_with_what_it_waited_for(
    node: Any, client: httpx.AsyncClient
) -> None:
    lose(node)
    assert (await client.post("/api/generate", json=PROMPT, headers={"X-Request-ID": "r9"})).status_code == 503
    told = await why(client, "r9")
    assert (told["model"], told["state"], told["error"], told["candidates"]) == ("far", "failed", "busy", [])
    assert told["total_ms"] == pytest.approx(PATIENCE_S * 1000, abs=200)
    assert [wait["why"] for wait in told["waits"]] == [
        "no peer near has the model, and it is looked for farther away",
        "attic, which has model 'far', was lost 1 s ago and is looked for",
    ]
    assert told["story"][1].startswith("It was refused after 8.00 s: attic, which has model 'far', was lost")
    assert told["story"][3].startswith("At 0.50 s it waited for 7.50 s: attic, which has model 'far', was lost 1 s ago")
    assert (await client.get("/api/v1/requests")).json()["requests"][0]["id"] == "r9"


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("/api/generate", {"model": "nope", "prompt": "secret"}, "not_found", "model 'nope' not found"),
        ("/api/embed", {"model": "../etc", "input": "secret"}, "not_found", "not found"),
        ("/v1/completions", {"model": "nope", "prompt": "secret"}, "not_found", "model 'nope' not found"),
        ("/api/chat", {"model": "echo", "messages": [{"role": "user", "content": "secret"}], "tools": [{}]}, "", ""),
    ],
)
async def test_every_refusal_is_told_by_its_code_and_words_and_without_the_prompt(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], code: str, words: str
) -> None:
    reply = await client.post(path, json=body, headers={"X-Request-ID": "r9", "Authorization": "Bearer hush"})
    assert reply.status_code >= 400, reply.text
    found = await client.get("/api/v1/requests/r9")
    assert found.status_code == (200 if code else 404) or found.json()["error"] == "capability_missing"
    if code:
        told = found.json()
        assert (told["error"], told["kind"]) == (code, "vectors" if "embed" in path else "text")
        assert words in told["story"][1]
    assert "secret" not in found.text
    assert "hush" not in found.text


async def test_a_prompt_that_was_turned_away_at_the_entry_is_told(
    node: Any, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshmax.core.entry.Entry.join", refuse_all)
    headers = {"X-Request-ID": "r9", "X-Meshmax-Policy": "least-loaded"}
    assert (await client.post("/api/generate", json=PROMPT, headers=headers)).status_code == 503
    told = await why(client, "r9")
    assert (told["error"], told["policy"]) == ("busy", "least-loaded")
    assert told["story"][1] == "It was refused after 0 ms: 768 are under way from this peer."


def refuse_all(_self: object, _priority: str) -> None:
    raise Busy("768 are under way from this peer")


async def test_what_the_router_tells_of_a_prompt_that_waited_begins_when_it_came(
    node: Any, client: httpx.AsyncClient
) -> None:
    lose(node)
    attempt, wait = Attempt(THEIRS, first_token_s=0.5, ended_s=1.0), Wait(0.25, 0.5, "attic is busy")

    def route(request_id: str) -> Route:
        began = node.now()
        return Route(
            request_id, DIGEST, THEIRS, "attic", attempts=(attempt,), waits=(wait,), state="done",
            started_at_s=began, first_token_s=0.5, total_s=1.0,
        )  # fmt: skip

    async def ask() -> None:
        await client.post("/api/generate", json=PROMPT, headers={"X-Request-ID": "r9"})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        waiting = await why(client, "r9")
        assert (waiting["state"], waiting["waits"][1]["took_ms"]) == ("running", None)
        assert waiting["story"][-1].startswith(
            "At 0.50 s it began to wait, and still does: attic, which has model 'far'"
        )
        await trio.sleep(1)
        come_back(node)
    node.router.route = route
    told = await why(client, "r9")
    assert [wait["at_ms"] for wait in told["waits"]] == [0.0, 500.0, 2250.0]
    assert (told["attempts"][0]["at_ms"], told["first_token_ms"], told["total_ms"]) == (2000.0, 2500.0, 3000.0)
    # Another try under the same id, that does not wait, has no part in it.
    await client.post("/api/generate", json=PROMPT, headers={"X-Request-ID": "r9"})
    assert [wait["at_ms"] for wait in (await why(client, "r9"))["waits"]] == [250.0]


async def test_a_crowd_of_refusals_is_kept_in_bounds(client: httpx.AsyncClient) -> None:
    for number in range(EARLY_KEPT + 5):
        await client.post("/api/generate", json={"model": "nope"}, headers={"X-Request-ID": f"n{number}"})
    told = [each["id"] for each in (await client.get("/api/v1/requests")).json()["requests"]]
    assert len([each for each in told if each.startswith("n")]) == EARLY_KEPT
    assert (await client.get("/api/v1/requests/n4")).status_code == 404


async def test_a_prompt_for_a_model_that_nobody_has_leaves_no_ring_of_references(node: Any) -> None:
    app = make_app(node)
    body = msgspec.json.encode({"model": "nope", "prompt": "x" * 1000})
    replies: list[int] = []

    async def ask() -> None:
        came = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            await trio.lowlevel.checkpoint()
            return next(came)

        async def send(message: Any) -> None:
            await trio.lowlevel.checkpoint()
            replies.extend([message["status"]] if "status" in message else [])

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/api/generate", "headers": headers, "query_string": b""}
        await app(scope, receive, send)

    await ask()  # what the first of its kind makes for all
    with collector_off() as left:
        for _ in range(3):
            await ask()
    assert replies == [404] * 4
    assert not left.rings


AHEAD = {"X-Request-ID": "r8", "X-Meshmax-Ahead": "prompt", "X-Meshmax-Policy": "affinity"}


async def test_a_prompt_that_is_not_sent_since_its_model_was_refused_is_told_as_refused(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.post("/api/generate", json={"model": "echo", "prompt": "x"})).status_code == 200
    assert (await client.post("/api/show", json={"model": "nope"}, headers=AHEAD)).status_code == 404
    told = (await client.get("/api/v1/requests")).json()["requests"][0]
    assert (told["id"], told["model"], told["policy"], told["state"]) == ("r8", "nope", "affinity", "failed")
    assert told["story"][1].startswith("It was refused after 0.50 s: model 'nope' not found")


@pytest.mark.parametrize("model", ["echo", "far"])
async def test_a_look_at_a_model_that_a_prompt_may_get_is_told_by_the_prompt_alone(
    node: Any, client: httpx.AsyncClient, model: str
) -> None:
    if model == "far":
        lose(node)  # and it is left to the prompt to wait
    await client.post("/api/show", json={"model": model}, headers=AHEAD)
    assert (await client.get("/api/v1/requests/r8")).status_code == 404


async def test_a_look_at_a_model_that_nobody_sends_a_prompt_after_is_no_request(client: httpx.AsyncClient) -> None:
    headers = {"X-Request-ID": "r8"}
    assert (await client.post("/api/show", json={"model": "nope"}, headers=headers)).status_code == 404
    assert (await client.get("/api/v1/requests/r8")).status_code == 404
