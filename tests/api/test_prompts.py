"""A name that no neighbour has is looked for farther away before anybody is told that there is none."""

from typing import Any

import httpx
import msgspec
import pytest
import trio

from meshmax.api.app import make_app
from meshmax.api.prompts import SEEK_S
from meshmax.core.absence import WentAway
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.testing.asgi_transport import AsgiTransport
from tests.api.fake_node import DIGEST, entry


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
    body = [{"type": "http.request", "body": msgspec.json.encode(PROMPT), "more_body": False}]
    began = trio.current_time()

    async def receive() -> Any:
        await trio.lowlevel.checkpoint()
        if body:
            return body.pop()
        await trio.sleep(1)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await trio.lowlevel.checkpoint()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/generate", "query_string": b"", "headers": headers}
    await make_app(node)(scope, receive, send)
    assert 1 <= trio.current_time() - began < 2


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
        app.state.end_answers()
    assert trio.current_time() - began < 2
    assert (replies[0].status_code, "shutting down" in replies[0].text) == (503, True)


async def test_a_prompt_whose_peer_went_away_before_it_answered_is_told_when_to_come_again(
    node: Any, client: httpx.AsyncClient
) -> None:
    node.router.refuse = WentAway("attic went away before it answered")
    reply = await client.post("/api/generate", json=PROMPT)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert reply.json() == {"error": "attic went away before it answered", "code": "peer_gone"}
