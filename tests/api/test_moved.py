"""The marker of an answer that moved, and that the clients of both interfaces take it."""

import json
from typing import Any

import httpx
import pytest

from meshmax.api.moved import Marker
from meshmax.base.ids import PeerId
from meshmax.base.inference import Moved
from tests.api.fake_node import THEIRS

FIRST, SECOND = PeerId("peer-one"), PeerId("peer-two")


def marks(marker: Marker) -> tuple[Any, Any]:
    following: dict[str, Any] = {}
    last: dict[str, Any] = {}
    marker.mark_next(following)
    marker.mark_last(last)
    return following.get("meshmax"), last.get("meshmax")


def test_an_answer_that_did_not_move_has_no_mark() -> None:
    assert marks(Marker()) == (None, None)


def test_the_next_line_is_marked_once_and_the_last_always() -> None:
    marker = Marker()
    marker.on_moved(Moved(FIRST))
    mark = {"peer": "peer-one", "continued": True}
    assert marks(marker) == (mark, mark)
    assert marks(marker) == (None, mark)


def test_two_moves_before_the_next_line_are_told_as_the_second() -> None:
    marker = Marker()
    marker.on_moved(Moved(FIRST, exact=False))
    marker.on_moved(Moved(SECOND))
    mark = {"peer": "peer-two", "continued": True, "exact": False}
    assert marks(marker) == (mark, mark)


async def test_ollamas_own_client_takes_lines_that_are_marked(client: httpx.AsyncClient, node: Any) -> None:
    ollama = pytest.importorskip("ollama")
    node.router.moves = {1: Moved(THEIRS, exact=False)}
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}]}
    reply = await client.post("/api/chat", json=body)
    parsed = [ollama.ChatResponse.model_validate(json.loads(line)) for line in reply.text.splitlines()]
    assert "".join(part.message.content for part in parsed) == "a b c"
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "a b c", "stream": False})
    assert ollama.GenerateResponse.model_validate(reply.json()).response == "a b c"


async def test_openais_own_client_takes_chunks_that_are_marked(client: httpx.AsyncClient, node: Any) -> None:
    types = pytest.importorskip("openai.types.chat")
    node.router.moves = {1: Moved(THEIRS)}
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}]}
    reply = await client.post("/v1/chat/completions", json={**body, "stream": True})
    data = [part[6:] for part in reply.text.split("\n\n") if part.startswith("data: {")]
    chunks = [types.ChatCompletionChunk.model_validate(json.loads(part)) for part in data]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a b c"
    assert chunks[1].model_extra["meshmax"]["peer"] == THEIRS
    whole = types.ChatCompletion.model_validate((await client.post("/v1/chat/completions", json=body)).json())
    assert whole.choices[0].message.content == "a b c"
