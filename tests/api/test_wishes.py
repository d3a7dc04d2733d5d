"""Priority and policy of a prompt, by header, and room for so many prompts at once: the same in every interface."""

from typing import Any

import httpx
import pytest
import trio

from meshmax.api.app import make_app
from meshmax.base.route import Wishes
from meshmax.core.entry import Entry
from meshmax.testing.asgi_transport import AsgiTransport

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "stream": False}
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("/api/generate", {"model": "echo", "prompt": "x", "stream": False}),
    ("/api/chat", CHAT),
    ("/api/embed", {"model": "echo", "input": "x"}),
    ("/api/v1/chat", CHAT),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "echo", "prompt": "x"}),
    ("/v1/embeddings", {"model": "echo", "input": "x"}),
]


@pytest.mark.parametrize(("path", "body"), PROMPTS)
async def test_headers_say_how_urgent_a_prompt_is_and_how_it_is_routed(
    client: httpx.AsyncClient, node: Any, path: str, body: dict[str, Any]
) -> None:
    headers = {"x-meshmax-priority": "Batch", "x-meshmax-policy": "least-loaded", "x-meshmax-pull": "false"}
    assert (await client.post(path, json=body, headers=headers)).status_code == 200
    assert (await client.post(path, json=body)).status_code == 200
    assert [ask.priority for ask in node.router.asks] == ["batch", "interactive"]
    assert node.router.wishes == [Wishes("least-loaded", False), Wishes()]


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("x-meshmax-priority", "X-Meshmax-Priority is one of interactive, batch, not 'urgent'"),
        ("x-meshmax-policy", "X-Meshmax-Policy is one of latency, least-loaded, round-robin"),
        ("x-meshmax-pull", "X-Meshmax-Pull is one of true, false, not 'urgent'"),
    ],
)
@pytest.mark.parametrize(("path", "body"), PROMPTS[1:5])
async def test_a_header_that_is_not_valid_is_told_with_what_is(
    client: httpx.AsyncClient, node: Any, path: str, body: dict[str, Any], header: str, accepted: str
) -> None:
    reply = await client.post(path, json=body, headers={header: "urgent"})
    assert reply.status_code == 400
    assert accepted in reply.text
    assert node.router.asks == []


@pytest.mark.parametrize("second", ["latency", "affinity"])
async def test_a_header_that_comes_twice_is_told_what_is_accepted(
    client: httpx.AsyncClient, node: Any, second: str
) -> None:
    for path, body in PROMPTS:
        twice = [("x-meshmax-policy", "latency"), ("x-meshmax-policy", second)]
        reply = await client.post(path, json=body, headers=twice)
        assert reply.status_code == 400
        assert "X-Meshmax-Policy comes 2 times: send one of latency, least-loaded" in reply.text
    assert node.router.asks == []


async def test_pages_may_send_these_headers(client: httpx.AsyncClient) -> None:
    reply = await client.options("/api/chat", headers={"origin": "http://localhost:3000"})
    assert "X-Meshmax-Priority" in reply.headers["access-control-allow-headers"]


def client_of(node: Any, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    """A client of an application that has the places of ``entry``."""
    monkeypatch.setattr("meshmax.api.prompts.Entry", lambda: entry)
    transport = AsgiTransport(make_app(node), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:11434")


@pytest.mark.parametrize(("path", "body"), PROMPTS)
async def test_one_prompt_more_than_there_is_room_for_is_told_when_to_come_again(
    node: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    entry = Entry(4)
    for _ in range(3):
        entry.join("interactive")
    async with client_of(node, entry, monkeypatch) as client:
        reply = await client.post(path, json=body, headers={"x-meshmax-priority": "batch"})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert (await client.post(path, json=body)).status_code == 200
        entry.join("interactive")
        reply = await client.post(path, json=body)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "server busy, please try again.  maximum pending requests exceeded" in reply.text
    assert entry.under_way == 4


async def test_a_prompt_that_failed_or_was_given_up_gives_its_place_back(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry(1)
    async with client_of(node, entry, monkeypatch) as client:
        node.router.refuse = ZeroDivisionError()
        assert (await client.post("/api/chat", json=CHAT)).status_code == 500
        assert entry.under_way == 0
        node.router.refuse = None
        with trio.move_on_after(0.5):
            await client.post("/api/chat", json=CHAT | {"messages": [{"role": "user", "content": "w " * 2000}]})
        assert node.router.asks
        assert entry.under_way == 0
