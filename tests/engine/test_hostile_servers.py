"""Servers that are broken, busy, slow or mean: each ends in an error that says so, and none costs more than its request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ContextTooLong,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    MeshmaxError,
)
from meshmax.base.inference import EmbedRequest
from meshmax.engine import server_http
from meshmax.engine.ollama import OllamaEngine
from meshmax.engine.server_words import MeshmaxPeer
from meshmax.ports import LoadedModel
from meshmax.testing.asgi_front import answer
from tests.engine.server_site import (
    HELLO,
    KEY,
    Server,
    answered,
    http,
    json,
    open_ollama,
    open_openai,
    open_server,
    stream,
)

Clock = trio.testing.MockClock
PATHS = {"ollama": "/api/chat", "openai": "/v1/chat/completions"}
EMBEDS = {"ollama": "/api/embed", "openai": "/v1/embeddings"}
DONE = {
    "ollama": ('{"message":{"content":"hi"},"done":false}', '{"message":{},"done":true,"done_reason":"stop"}'),
    "openai": ('data: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}', "data: [DONE]"),
}


class Place:
    def __init__(self, kind: str, server: Server, model: LoadedModel) -> None:
        self.kind, self.server, self.model = kind, server, model

    def says(self, reply: Any) -> None:
        self.server.replies[PATHS[self.kind]] = self.server.replies[EMBEDS[self.kind]] = reply


@pytest.fixture(params=["ollama", "openai"])
async def place(request: pytest.FixtureRequest, autojump_clock: Clock) -> AsyncIterator[Place]:
    opened = open_ollama if request.param == "ollama" else open_openai
    async with open_server() as server, opened(server) as model:
        yield Place(request.param, server, model)


async def error_of(place: Place, reply: Any) -> MeshmaxError:
    place.says(reply)
    with pytest.raises(MeshmaxError) as caught:
        await answered(place.model)
    assert KEY not in str(caught.value)
    assert len(str(caught.value)) < 700
    return caught.value


async def test_a_good_answer_is_taken(place: Place, autojump_clock: Clock) -> None:
    place.says(stream(*DONE[place.kind]))
    assert len(await answered(place.model)) == 2


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, {"error": "that is wrong"}, InvalidRequest, "that is wrong"),
        (400, {"error": {"message": "This model's maximum context length is 8 tokens"}}, ContextTooLong, "8 tokens"),
        (400, {"error": '"m" does not support tools'}, CapabilityMissing, "does not support tools"),
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, EngineUnavailable, "check its key"),
        (403, {"message": "no"}, EngineUnavailable, "HTTP 403"),
        (404, {"error": "model not found"}, EngineUnavailable, "model not found"),
        (413, {"detail": "too much"}, ContextTooLong, "too much"),
        (422, {"detail": [{"msg": "field required"}]}, InvalidRequest, "HTTP status 422"),
        (500, {"error": "it broke"}, EngineError, "it broke"),
        (501, {"error": "no embeddings"}, CapabilityMissing, "no embeddings"),
        (508, {"error": "loop"}, MeshmaxPeer, "is a meshmax peer"),
    ],
)
async def test_an_error_of_the_server_keeps_its_meaning(
    place: Place, autojump_clock: Clock, status: int, body: dict[str, Any], kind: type[MeshmaxError], words: str
) -> None:
    error = await error_of(place, json(body, status))
    assert type(error) is kind
    assert words in error.message


@pytest.mark.parametrize(
    ("header", "wait_s"), [("7", 7.0), ("99999999", 2.0), ("86400", 3600.0), ("soon", 2.0), ("", 2.0)]
)
@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_server_says_when_to_come_again(
    place: Place, autojump_clock: Clock, status: int, header: str, wait_s: float
) -> None:
    error = await error_of(place, json({"error": "slow down"}, status, f"Retry-After: {header}"))
    assert isinstance(error, Busy)
    assert error.retry_after_s == wait_s


async def test_a_page_is_no_message(place: Place, autojump_clock: Clock) -> None:
    error = await error_of(place, answer(502, b"<html><script>alert(1)</script></html>"))
    assert "<" not in error.message
    assert "502" in error.message


async def test_a_redirect_is_not_followed(place: Place, autojump_clock: Clock) -> None:
    before = len(place.server.scripted.requests)
    error = await error_of(place, answer(307, b"", "Location: http://elsewhere.example/v1/chat/completions"))
    assert isinstance(error, EngineUnavailable)
    assert "not followed" in error.message
    assert len(place.server.scripted.requests) == before + 1


@pytest.mark.parametrize(
    "line",
    [
        "\x00\xff garbage",
        "[]",
        '"text"',
        '{"message":7,"choices":7}',
        "{" * 5000,
        '{"message":{"content":{}},"choices":[[]]}',
    ],
)
async def test_what_is_not_the_interface_is_an_error(place: Place, autojump_clock: Clock, line: str) -> None:
    error = await error_of(place, stream(line if place.kind == "ollama" else f"data: {line}"))
    assert type(error) is EngineError
    assert "not what its interface says" in error.message


async def test_an_error_in_the_middle_is_the_answers_error(place: Place, autojump_clock: Clock) -> None:
    line = json({"error": f"out of memory {KEY}"}).partition(b"\r\n\r\n")[2].decode()
    error = await error_of(place, stream(line if place.kind == "ollama" else f"data: {line}"))
    assert "out of memory" in error.message


async def test_an_answer_that_breaks_off_is_no_whole_one(place: Place, autojump_clock: Clock) -> None:
    whole = stream(*DONE[place.kind])
    head, _, body = whole.partition(b"\r\n\r\n")
    assert isinstance(await error_of(place, head + b"\r\n\r\n" + body[:-10]), EngineCrashed)
    begun = DONE[place.kind][0].replace('"stop"', "null")
    error = await error_of(place, stream(begun))
    assert isinstance(error, EngineCrashed)
    assert "ended before it was finished" in error.message
    assert " at http://" in error.message


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.1 200 OK\r\n", b"\x16\x03\x01garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000]
)
async def test_what_is_not_http_is_an_error(place: Place, autojump_clock: Clock, reply: bytes) -> None:
    assert isinstance(await error_of(place, reply), EngineCrashed)


@pytest.mark.parametrize(
    "reply",
    [f"{KEY} is what you sent\r\n\r\n", f"HTTP/1.1 200 OK\r\n{KEY} is no header\r\n\r\n"],
    ids=["status", "header"],
)
async def test_a_key_in_what_is_no_http_is_not_told(place: Place, autojump_clock: Clock, reply: str) -> None:
    assert isinstance(await error_of(place, reply.encode()), EngineCrashed)  # and error_of looks for the key


async def test_an_endless_line_ends_at_its_bound(
    place: Place, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshmax.engine.loopback_http.MAX_LINE_BYTES", 1 << 18)

    async def endless(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            await stream.send_all(b"x" * 65536)

    error = await error_of(place, endless)
    assert "too long" in error.message
    await trio.testing.wait_all_tasks_blocked()
    assert place.server.scripted.left == 1


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"])
async def test_a_server_that_hangs_is_given_up(place: Place, autojump_clock: Clock, head: bytes) -> None:
    async def hang(stream: trio.abc.Stream) -> None:
        if head:
            await stream.send_all(head)
        await trio.sleep_forever()

    began = trio.current_time()
    error = await error_of(place, hang)
    assert isinstance(error, EngineCrashed)
    assert "said nothing for 600 s" in error.message
    assert trio.current_time() - began == pytest.approx(server_http.SILENCE_S)


@pytest.mark.parametrize(
    "vectors",
    [
        [],
        [[0.5, 0.5]],
        [[0.5], [0.5], [0.5]],
        [[], []],
        [["a"], ["b"]],
        [[1e39], [0.5]],
        [[0.1] * 70000, [0.1]],
        "no list",
    ],
)
async def test_vectors_that_are_none_are_an_error(place: Place, autojump_clock: Clock, vectors: Any) -> None:
    told: Any = {"embeddings": vectors}
    if place.kind == "openai":
        rows = vectors if isinstance(vectors, list) else []
        told = {"data": [{"index": index, "embedding": row} for index, row in enumerate(rows)]}
    place.says(json(told))
    with pytest.raises(EngineError):
        await answered(place.model, EmbedRequest(("one", "two")))


async def test_leaving_an_answer_closes_its_connection(place: Place, autojump_clock: Clock) -> None:
    async def slow(stream: trio.abc.Stream) -> None:
        line = DONE[place.kind][0].replace('"stop"', "null").encode() + b"\n"
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            await stream.send_all(line)
            await trio.sleep(0.1)

    place.says(slow)
    async with place.model.answer(HELLO) as events:
        await anext(events)
    await trio.sleep(0.2)
    assert place.server.scripted.left == 1


async def test_a_server_gets_as_many_prompts_at_once_as_it_takes(place: Place, autojump_clock: Clock) -> None:
    open_now = most = 0

    async def slow(stream: trio.abc.Stream) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await trio.sleep(1)
        open_now -= 1
        await stream.send_all(good)

    good = stream(*DONE[place.kind])
    place.says(slow)
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(answered, place.model)
    assert most == place.model.facts.parallel == 16


async def test_a_look_at_what_hangs_ends_soon(autojump_clock: Clock) -> None:
    async with open_server() as server:

        async def hang(_stream: trio.abc.Stream) -> None:
            await trio.sleep_forever()

        server.replies["/api/version"] = hang
        with pytest.raises(Busy, match="did not answer within 10 s"):
            await OllamaEngine(http(server)).look()


async def test_an_endless_list_ends_at_its_bound(autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "MAX_CALL_BYTES", 1 << 18)
    async with open_server() as server:

        async def endless(stream: trio.abc.Stream) -> None:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            while True:
                await stream.send_all(b"[" * 65536)

        server.replies["/api/version"] = endless
        with pytest.raises(EngineUnavailable, match="longer than"):
            await OllamaEngine(http(server)).look()


async def test_a_connection_that_is_not_made_is_no_server(autojump_clock: Clock) -> None:
    async def nobody(_host: str, _port: int) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        raise ConnectionRefusedError(111, "Connection refused")

    async def silence(_host: str, _port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    for connect, words in ((nobody, "cannot be reached"), (silence, "took no connection within 5 s")):
        with pytest.raises(EngineUnavailable, match=words):
            await server_http.ServerHttp("http://127.0.0.1:9", connect=connect).call("GET", "/")
