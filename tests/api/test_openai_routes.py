"""OpenAI's interface over HTTP."""

import base64
import json
import struct
from typing import Any

import httpx
import pytest

from meshmax.base.errors import EngineCrashed
from meshmax.base.inference import Moved
from tests.api.fake_node import OURS, THEIRS

MESSAGES = [{"role": "user", "content": "a b"}]


def events(reply: httpx.Response) -> list[Any]:
    assert reply.headers["content-type"] == "text/event-stream"
    parts = reply.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


async def test_models_are_listed_with_their_namespace(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert listed["data"][0] == {"id": "echo:latest", "object": "model", "created": 1761498924, "owned_by": "library"}
    assert listed["data"][1]["remote_host"] == "attic"
    assert (await client.get("/v1/models/echo")).json()["id"] == "echo"
    reply = await client.get("/v1/models/me/nope:q4")
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "not_found_error"


async def test_a_chat_streams_chunks_and_ends_with_done(client: httpx.AsyncClient) -> None:
    body = {"model": "echo", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.headers["x-meshmax-peer"] == OURS
    *chunks, done = events(reply)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:3]] == [
        {"role": "assistant", "content": "a"},
        {"content": " b"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:3]] == [None, None, "stop"]
    assert chunks[3]["choices"] == []
    assert chunks[3]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("usage", [False, True])
async def test_a_chat_that_moved_says_so_in_the_next_chunk_and_the_last(
    client: httpx.AsyncClient, node: Any, usage: bool
) -> None:
    node.router.moves = {1: Moved(THEIRS, exact=False)}
    body = {"model": "echo", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": usage}}
    *chunks, _ = events(await client.post("/v1/chat/completions", json=body))
    mark = {"peer": THEIRS, "continued": True, "exact": False}
    assert [chunk.get("meshmax") for chunk in chunks] == [None, mark, *[None] * usage, mark]
    whole = (await client.post("/v1/chat/completions", json={"model": "echo", "messages": MESSAGES})).json()
    assert whole["meshmax"] == mark


async def test_a_chat_without_stream_is_one_object(client: httpx.AsyncClient) -> None:
    whole = (await client.post("/v1/chat/completions", json={"model": "echo", "messages": MESSAGES})).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "a b"}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["object"] == "chat.completion"


async def test_a_completion_answers_streamed_and_not(client: httpx.AsyncClient) -> None:
    whole = (await client.post("/v1/completions", json={"model": "echo", "prompt": "a b", "max_tokens": 1})).json()
    assert whole["choices"] == [{"text": "a", "index": 0, "finish_reason": "length"}]
    *chunks, _ = events(await client.post("/v1/completions", json={"model": "echo", "prompt": "a b", "stream": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", " b", ""]


async def test_an_empty_prompt_is_streamed_too(client: httpx.AsyncClient) -> None:
    chunk, done = events(await client.post("/v1/completions", json={"model": "echo", "prompt": "", "stream": True}))
    assert (chunk["choices"], done) == ([{"text": "", "index": 0, "finish_reason": "stop"}], "[DONE]")


async def test_vectors_come_as_numbers_or_packed(client: httpx.AsyncClient) -> None:
    plain = (await client.post("/v1/embeddings", json={"model": "echo", "input": ["a", "b"]})).json()
    assert [row["index"] for row in plain["data"]] == [0, 1]
    assert plain["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    packed = (
        await client.post("/v1/embeddings", json={"model": "echo", "input": "a", "encoding_format": "base64"})
    ).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == plain["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("chat/completions", {"model": "echo"}, 400, "invalid_request_error", "[] is too short - 'messages'"),
        ("chat/completions", {"messages": MESSAGES}, 400, "invalid_request_error", "model is required"),
        ("chat/completions", {"model": "nope", "messages": MESSAGES}, 404, "not_found_error", "model 'nope' not found"),
        ("chat/completions", {"model": 5}, 400, "invalid_request_error", "Expected `str`, got `int`"),
        ("completions", {"model": "echo", "prompt": ["a"]}, 400, "invalid_request_error", "prompt must be a string"),
        ("embeddings", {"model": "echo", "input": [1]}, 400, "invalid_request_error", "invalid input"),
        (
            "chat/completions",
            {"model": "echo", "messages": MESSAGES, "tools": [{"type": "function"}]},
            400,
            "invalid_request_error",
            "registry.ollama.ai/library/echo:latest does not support tools",
        ),
    ],
)
async def test_errors_have_openais_shape(
    client: httpx.AsyncClient, path: str, body: Any, status: int, kind: str, message: str
) -> None:
    reply = await client.post(f"/v1/{path}", json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == kind
    assert message in error["message"]


async def test_a_failure_in_mid_stream_is_an_event(client: httpx.AsyncClient, node: Any) -> None:
    node.router.break_after = (1, EngineCrashed("it fell over"))
    found = events(await client.post("/v1/completions", json={"model": "echo", "prompt": "a b", "stream": True}))
    assert found[-1] == {"error": {"message": "it fell over", "type": "api_error", "param": None, "code": None}}
