"""X-Meshmax-Route and X-Request-ID stand in every answer to a prompt, also where it failed, and cannot be abused."""

from typing import Any

import httpx
import msgspec
import pytest

from meshmax.base.errors import Draining, NoProviders
from meshmax.base.route import Route
from tests.api.fake_node import DIGEST, THEIRS

PROMPTS: dict[str, dict[str, Any]] = {
    "/api/generate": {"prompt": "x"},
    "/api/chat": {"messages": [{"role": "user", "content": "x"}]},
    "/api/embed": {"input": "x"},
    "/api/embeddings": {"prompt": "x"},
    "/api/v1/generate": {"prompt": "x"},
    "/api/v1/chat": {"messages": [{"role": "user", "content": "x"}]},
    "/api/v1/embeddings": {"input": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/embeddings": {"input": "x"},
}


async def post(client: httpx.AsyncClient, path: str, model: str = "echo", **headers: str) -> httpx.Response:
    return await client.post(path, json={"model": model, **PROMPTS[path]}, headers=headers)


@pytest.mark.parametrize("path", PROMPTS)
async def test_an_answer_says_where_it_went(client: httpx.AsyncClient, path: str) -> None:
    reply = await post(client, path)
    assert reply.status_code == 200
    assert reply.headers["x-meshmax-route"] == "only candidate??"
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("path", PROMPTS)
async def test_a_model_that_nobody_has_is_said_not_to_have_been_routed(client: httpx.AsyncClient, path: str) -> None:
    reply = await post(client, path, "nobody-has-it")
    assert reply.status_code == 404
    assert reply.headers["x-meshmax-route"] == "nobody was asked: not_found"
    assert "x-meshmax-peer" not in reply.headers


async def test_a_prompt_that_failed_says_what_came_of_it(
    client: httpx.AsyncClient, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.router.refuse = NoProviders("nobody")
    failed = Route("mine", DIGEST, THEIRS, "nobody answered; attic failed before (peer_gone)", state="failed")
    asked: list[str] = []

    def route(request_id: str) -> Route | None:
        asked.append(request_id)
        return failed

    monkeypatch.setattr(node.router, "route", route)
    reply = await post(client, "/api/generate", **{"x-request-id": "mine"})
    assert reply.headers["x-meshmax-route"] == failed.line
    assert (reply.headers["x-meshmax-peer"], reply.headers["x-request-id"]) == (THEIRS, "mine")
    failed = msgspec.structs.replace(failed, peer_id="")
    assert "x-meshmax-peer" not in (await post(client, "/api/generate")).headers
    assert asked[0] == "mine"


async def test_a_drained_peer_says_so_and_not_that_a_queue_is_full(client: httpx.AsyncClient, node: Any) -> None:
    node.router.refuse = Draining("every peer that could answer is being drained: desk")
    reply = await post(client, "/api/chat")
    assert (reply.status_code, reply.json()["error"]) == (503, node.router.refuse.message)
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("given", ["with blank", "x" * 129, "caf\u00e9", ""])
async def test_an_id_that_could_do_harm_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    reply = await client.post(
        "/api/generate", json={"model": "echo", "prompt": "x"}, headers=[(b"x-request-id", given.encode("latin-1"))]
    )
    kept = reply.headers["x-request-id"]
    assert kept != given
    assert kept.isascii()
    assert 0 < len(kept) <= 128
