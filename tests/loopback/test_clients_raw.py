"""The API on a real socket against clients of every kind: ones that hang up, that do not read, that send too much."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from meshmax.api import connection, server
from meshmax.api.server import Bound, serve_api
from meshmax.base.config import Config
from meshmax.base.errors import ConfigError
from tests.api.fake_node import open_fake_node

pytestmark = pytest.mark.loopback
SLACK_S = 10.0  # the machine may be slow, and busy with other tests


class Running:
    def __init__(self, node: Any, bound: Bound, nursery: trio.Nursery) -> None:
        self.node = node
        self.bound = bound
        self.nursery = nursery

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(self.bound.host, self.bound.port)

    async def send(self, head: str, body: bytes = b"") -> trio.SocketStream:
        stream = await self.connect()
        await stream.send_all(f"{head}\r\nHost: localhost\r\n".encode() + length_of(body) + b"\r\n" + body)
        return stream

    async def ask(self, head: str, body: bytes = b"") -> bytes:
        async with await self.send(head, body) as stream:
            return await read_reply(stream)


def length_of(body: bytes) -> bytes:
    return f"Content-Length: {len(body)}\r\n".encode() if body else b""


async def read_reply(stream: trio.SocketStream) -> bytes:
    """Head and body of one reply, as far as its length or its last chunk tells."""
    data = bytearray()
    while True:
        piece = await stream.receive_some(65536)
        data += piece
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        if not piece or (lengths and len(body) >= int(lengths[0])) or body.endswith(b"0\r\n\r\n"):
            return bytes(data)


@asynccontextmanager
async def running(**config: Any) -> AsyncIterator[Running]:
    async with open_fake_node(**({"api": "127.0.0.1:0"} | config)) as node, trio.open_nursery() as nursery:
        bound = await nursery.start(partial(serve_api, node))
        made = Running(node, bound, nursery)
        yield made
        nursery.cancel_scope.cancel()


def prompt(words: int) -> bytes:
    return json.dumps({"model": "echo", "prompt": "word " * words}).encode()


async def until(what: Any) -> None:
    with trio.fail_after(60):
        while True:
            if what():
                return
            await trio.sleep(0.01)


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[Callable[[], Awaitable[trio.SocketStream]]]:
    """``app`` alone behind the server; gives what connects to it."""
    app.end_answers = lambda: None
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server._serve, app, listener)
        yield partial(trio.open_tcp_stream, "127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request's body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await reply_with(send, 200, body)


async def reply_with(send: Any, status: int, body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


async def test_the_address_is_known_before_anybody_is_told_and_two_requests_share_a_connection() -> None:
    async with running() as api:
        assert str(api.bound) == f"http://127.0.0.1:{api.bound.port}"
        async with await api.send("GET / HTTP/1.1") as stream:
            assert (await read_reply(stream)).endswith(b"Ollama is running")
            await stream.send_all(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await read_reply(stream)).endswith(b'{"version":"0.33.0"}')


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_connection_that_is_asked_to_close_closes_after_an_answer(stream: str) -> None:
    body = b'{"model":"echo","prompt":"one two","stream":%s}' % stream.encode()
    async with running() as api:
        async with await api.send("POST /api/generate HTTP/1.1\r\nConnection: close", body) as client:
            assert b'"done":true' in await read_reply(client)
            with trio.fail_after(60):
                assert await client.receive_some(1) == b""


async def test_a_connection_that_is_idle_after_an_answer_closes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.2)
    async with running() as api:
        async with await api.send("POST /api/generate HTTP/1.1", prompt(2)) as client:
            assert b'"done":true' in await read_reply(client)
            with trio.fail_after(60):
                assert await client.receive_some(1) == b""


async def test_tokens_arrive_while_the_answer_is_still_made() -> None:
    async with running(engine={"echo_tokens_per_s": 20.0}) as api:
        async with await api.send("POST /api/generate HTTP/1.1", prompt(1000)) as stream:
            seen = b""
            with trio.fail_after(60):
                while b'"response":"word"' not in seen:
                    seen += await stream.receive_some(65536)
            assert b'"done":true' not in seen


@pytest.mark.parametrize("read_first", [True, False])
async def test_a_client_that_hangs_up_stops_the_engine(read_first: bool) -> None:
    rate = 20.0 if read_first else 0.1  # the slow one is still before its first token
    async with running(engine={"echo_tokens_per_s": rate}) as api:
        stream = await api.send("POST /api/generate HTTP/1.1", prompt(1000))
        await until(lambda: api.node.router.open)
        if read_first:
            await stream.receive_some(65536)
        await stream.aclose()
        await until(lambda: not api.node.router.open)
        produced = api.node.engine.models[0].produced
        await trio.sleep(0.3)
        assert api.node.engine.models[0].produced == produced


async def test_a_client_that_hangs_up_leaves_the_pull() -> None:
    async with running() as api:
        stream = await api.send("POST /api/pull HTTP/1.1", b'{"model":"far"}')
        await stream.receive_some(65536)
        assert api.node.pulls.left == 0
        await stream.aclose()
        await until(lambda: api.node.pulls.left)
        assert api.node.pulls.watched < len(api.node.pulls.script)


async def test_a_client_that_does_not_read_holds_the_answer_up_and_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", 0.5)
    async with running(engine={"echo_tokens_per_s": 1e6}) as api:
        stream = await api.connect()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "echo", "prompt": ("x" * 50_000 + " ") * 200}).encode()
        await stream.send_all(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n" + length_of(body) + b"\r\n" + body)
        await until(lambda: api.node.router.open)
        await trio.sleep(0.2)
        produced = api.node.engine.models[0].produced
        assert produced < 200
        await until(lambda: not api.node.router.open)
        await stream.aclose()


async def test_the_end_takes_under_two_seconds_whatever_clients_do() -> None:
    before = trio.current_time()
    async with running(engine={"echo_tokens_per_s": 1e6}) as api:
        deaf = await api.connect()
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "echo", "prompt": ("x" * 50_000 + " ") * 200}).encode()
        await deaf.send_all(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n" + length_of(body) + b"\r\n" + body)
        idle = await api.connect()
        kept = await api.send("GET / HTTP/1.1")
        await read_reply(kept)
        half = await api.connect()
        await half.send_all(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        await trio.sleep(0.3)
        before = trio.current_time()
    assert trio.current_time() - before < 2 + SLACK_S
    for stream in (deaf, idle, kept, half):
        await stream.aclose()


@pytest.mark.parametrize("rate", [20.0, 0.1])  # in mid-stream, and before the first token
async def test_an_answer_that_outlasts_the_node_ends_with_an_error_that_says_so(rate: float) -> None:
    received: list[bytes] = []
    async with trio.open_nursery() as reading:
        async with running(engine={"echo_tokens_per_s": rate}) as api:
            stream = await api.send("POST /api/generate HTTP/1.1", prompt(1000))

            async def read() -> None:
                received.append(await read_reply(stream))

            reading.start_soon(read)
            await until(lambda: api.node.router.open)
            await trio.sleep(0.3)
    await stream.aclose()
    assert b"shutting down" in received[0] or b"503" in received[0][:20]


async def test_an_idle_server_ends_at_once() -> None:
    async with running() as api:
        await api.ask("GET / HTTP/1.1")
        before = trio.current_time()
    assert trio.current_time() - before < SLACK_S


async def test_a_body_that_is_too_large_is_refused_while_it_arrives() -> None:
    async with running() as api:
        async with await api.connect() as stream:
            await stream.send_all(b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")

            async def send() -> None:
                for _ in range(30):
                    try:
                        await stream.send_all(b"x" * 100_000)
                    except trio.BrokenResourceError:
                        return

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                with trio.fail_after(60):
                    assert b"413" in (await read_reply(stream)).split(b"\r\n")[0]
                nursery.cancel_scope.cancel()
        assert b"200" in await api.ask("GET / HTTP/1.1")


async def test_a_body_without_a_length_is_held_to_the_limit_too() -> None:
    async with running() as api:
        async with await api.connect() as stream:
            await stream.send_all(b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")

            async def send() -> None:
                for _ in range(30):
                    try:
                        await stream.send_all(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
                    except trio.BrokenResourceError:
                        return

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                with trio.fail_after(60):
                    assert b"413" in (await read_reply(stream)).split(b"\r\n")[0]
                nursery.cancel_scope.cancel()


async def test_garbage_and_endless_headers_are_refused_and_the_server_lives_on() -> None:
    async with running() as api:
        for sent in (b"\x16\x03\x01garbage\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, b"\0" * 1000):
            async with await api.connect() as stream:
                await stream.send_all(sent)
                with trio.fail_after(60):
                    reply = await read_reply(stream)
                assert reply == b"" or reply.startswith(b"HTTP/1.1 4")
        assert b"200" in await api.ask("GET / HTTP/1.1")


async def test_whoever_offers_http2_is_answered_in_http1() -> None:
    async with running() as api:
        async with await api.send("GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c") as stream:
            assert (await read_reply(stream)).startswith(b"HTTP/1.1 200")
        async with await api.connect() as stream:
            await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            with trio.fail_after(60):
                assert (await read_reply(stream)).startswith(b"HTTP/1.1 4")
        assert b"200" in await api.ask("GET / HTTP/1.1")


async def is_served(api: Running) -> bool:
    try:
        return b"200" in await api.ask("GET / HTTP/1.1")
    except trio.BrokenResourceError:
        return False


async def test_connections_above_the_limit_are_closed_and_those_below_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    async with running() as api:
        held = [await api.send("GET / HTTP/1.1") for _ in range(2)]
        for stream in held:
            await read_reply(stream)
        async with await api.connect() as third:
            assert await third.receive_some(10) == b""
        await held[0].aclose()
        with trio.fail_after(60):  # until the server has seen that it went
            while not await is_served(api):  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.01)
        await held[1].aclose()


async def test_an_address_that_was_asked_for_and_is_taken_is_an_error_that_says_so() -> None:
    async with running() as api:
        taken = f"127.0.0.1:{api.bound.port}"
        with pytest.raises(ConfigError, match=f"{taken}.*--api"):
            await server.bind_api(Config(api=taken))


async def test_the_default_address_moves_on_to_the_next_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as api:
        monkeypatch.setattr(server, "DEFAULT_API_PORT", api.bound.port)
        with await server.bind_api(Config()) as listening:
            bound = server.bound_address(listening)
    assert bound.host == "127.0.0.1"
    assert bound.port > api.bound.port


@pytest.mark.parametrize("address", ["192.0.2.1:1", "no-such-host.invalid:1"])
async def test_an_address_that_is_not_ours_is_an_error(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        await server.bind_api(Config(api=address))


async def test_beyond_this_machine_a_token_is_needed_to_start_and_to_ask() -> None:
    async with open_fake_node(api="0.0.0.0:0") as node:
        with pytest.raises(ConfigError, match="without a token"):
            await serve_api(node)
    async with running(api="0.0.0.0:0", token="secret") as api:
        assert not api.bound.loopback
        assert api.bound.url == f"http://127.0.0.1:{api.bound.port}"
        assert b" 401 " in await api.ask("GET /api/tags HTTP/1.1")
        assert b" 200 " in await api.ask("GET /health HTTP/1.1")
        assert b" 200 " in await api.ask("GET /api/tags HTTP/1.1\r\nAuthorization: Bearer secret")


async def test_requests_that_are_sent_ahead_are_answered_in_their_order() -> None:
    requests = [b"request %04d" % number for number in range(200)]
    sent = b"".join(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + length_of(each) + b"\r\n" + each for each in requests)
    async with serving(echo) as connect, await connect() as client, trio.open_nursery() as nursery:

        async def send_in_pieces() -> None:
            for start in range(0, len(sent), 777):
                await client.send_all(sent[start : start + 777])

        nursery.start_soon(send_in_pieces)
        came = b""
        with trio.fail_after(60):
            while not came.endswith(requests[-1]):
                came += await client.receive_some(65536)
    replies = came.split(b"HTTP/1.1 200")[1:]
    assert [each.partition(b"\r\n\r\n")[2] for each in replies] == requests


async def test_one_connection_takes_every_form_of_request_in_turn() -> None:
    async with serving(echo) as connect, await connect() as client:
        with trio.fail_after(60):
            head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
            await client.send_all(head)
            assert (await client.receive_some(1000)).startswith(b"HTTP/1.1 100")
            await client.send_all(b"5\r\nabcde\r\n" * 100 + b"0\r\n\r\n")
            assert (await read_reply(client)).endswith(b"\r\n\r\n" + b"abcde" * 100)
            await client.send_all(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await read_reply(client)).startswith(b"HTTP/1.1 200")
            await client.send_all(b"POST / HTTP/1.0\r\nContent-Length: 4\r\n\r\nlast")
            assert (await read_reply(client)).endswith(b"\r\n\r\nlast")
            assert await client.receive_some(1) == b""


async def test_a_client_that_reads_slowly_gets_every_byte() -> None:
    body = random.Random(1).randbytes(8 * 1024 * 1024)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        for start in range(0, len(body), 1_000_001):  # more than a socket takes at once
            piece = body[start : start + 1_000_001]
            await send({"type": "http.response.body", "body": piece, "more_body": start + len(piece) < len(body)})

    async with serving(app) as connect, await connect() as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        came = b""
        with trio.fail_after(60):
            while len(came) < len(body) or not came.endswith(body[-100:]):
                await trio.sleep(0.001)
                came += await client.receive_some(300_000)
    assert came.partition(b"\r\n\r\n")[2] == body


async def test_a_reply_that_was_cancelled_before_a_byte_of_it_left_gives_way_to_another() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await reply_with(send, 503, b"shutting down")

    async with serving(app) as connect, await connect() as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = await read_reply(client)
    assert reply.startswith(b"HTTP/1.1 503")
    assert reply.endswith(b"shutting down")
