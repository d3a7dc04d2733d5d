"""A name that no neighbour has is looked for farther away before anybody is told that there is none."""

from typing import Any

import httpx
import pytest
import trio

from meshmax.api.prompts import SEEK_S
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
