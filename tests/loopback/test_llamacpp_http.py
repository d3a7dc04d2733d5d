"""The engine's HTTP client against servers that behave badly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest
import trio

from meshmax.base.errors import EngineCrashed
from meshmax.engine import loopback_http
from meshmax.engine.loopback_http import LoopbackHttp

pytestmark = pytest.mark.loopback


@asynccontextmanager
async def server(
    answer: bytes, seen: Callable[[bytes], object] = len, hang: bool = False
) -> AsyncIterator[LoopbackHttp]:
    async def serve(stream: trio.SocketStream) -> None:
        seen(await stream.receive_some(65536))
        await stream.send_all(answer)
        if hang:
            seen(b"end" if await stream.receive_some(1) == b"" else b"more")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), serve, 0)
        yield LoopbackHttp(f"http://127.0.0.1:{listener.socket.getsockname()[1]}", "secret")
        nursery.cancel_scope.cancel()


async def fetch(http: LoopbackHttp, body: object = None) -> tuple[int, bytes]:
    async with http.open_response("POST", "/x", body) as response:
        return response.status, await response.read()


async def test_a_request_carries_key_and_json_and_asks_for_no_second() -> None:
    seen: list[bytes] = []
    async with server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", seen.append) as http:
        assert await fetch(http, {"a": 1}) == (200, b"ok")
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert b"authorization: bearer secret" in head.lower()
    assert b"connection: close" in head.lower()
    assert body == b'{"a":1}'


async def test_lines_come_one_by_one_without_empty_ones_however_they_were_cut() -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"data: 1\n\nda", b"ta: 2\r\n", b"rest"))
    async with server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n") as http:
        async with http.open_response("GET", "/") as response, aclosing(response.lines()) as lines:
            assert [line async for line in lines] == [b"data: 1", b"data: 2", b"rest"]


@pytest.mark.parametrize(
    "answer",
    [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", b"HTTP/1.1 200 OK\r\nContent-"],
    ids=["nothing", "garbage", "half a body", "half a head"],
)
async def test_an_answer_that_breaks_off_is_a_crash(answer: bytes) -> None:
    async with server(answer) as http:
        with pytest.raises(EngineCrashed):
            await fetch(http)


async def test_a_server_that_is_not_there_is_a_crash() -> None:
    async with server(b"") as http:
        pass
    with pytest.raises(EngineCrashed, match="cannot be reached"):
        await fetch(http)


async def test_leaving_a_response_closes_its_connection_at_once() -> None:
    ended = trio.Event()
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n"

    def seen(data: bytes) -> None:
        if data == b"end":
            ended.set()

    async with server(head, seen, hang=True) as http:
        async with http.open_response("GET", "/") as response, aclosing(response.lines()) as lines:
            assert await anext(lines) == b"a"
        with trio.fail_after(60):
            await ended.wait()


async def test_what_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback_http, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(loopback_http, "MAX_BODY_BYTES", 100)
    async with server(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000) as http:
        with pytest.raises(EngineCrashed, match="too large"):
            await fetch(http)
        with pytest.raises(EngineCrashed, match="too long"):
            await read_lines(http)


async def read_lines(http: LoopbackHttp) -> None:
    async with http.open_response("GET", "/") as response, aclosing(response.lines()) as lines:
        async for _line in lines:
            pass
