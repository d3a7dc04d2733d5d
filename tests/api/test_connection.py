"""A connection of the API: what leaves together, what an application leaves unread, when it is idle and when it only looks so.

On real sockets: tests.loopback.test_clients_raw.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState
from starlette.requests import Request
from trio.testing import MockClock, memory_stream_one_way_pair

from meshmax.api.bodies import BODY_TIMEOUT_S, read_body
from meshmax.api.connection import IDLE_S, LINGER_S, Connection, IdleTimer, Tasks
from meshmax.api.lines import BODY_FOLLOWS, Lines, open_lines
from meshmax.api.replies import RequestTimeout
from meshmax.api.server import hypercorn_config

App = Callable[[Any, Any, Any], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Client:
    """The other side of a connection; notes each write, and when."""

    socket = SimpleNamespace(
        family=socket.AF_INET, getpeername=lambda: ("127.0.0.1", 1), getsockname=lambda: ("127.0.0.1", 2)
    )

    def __init__(self) -> None:
        self.writes: list[tuple[float, bytes]] = []
        self.ended = trio.Event()  # the server's side
        self.says, self._hears = memory_stream_one_way_pair()
        self.receive_some = self._hears.receive_some

    def send_some(self, _data: bytes) -> int:
        return 0

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.writes.append((trio.current_time(), data))

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self._hears.aclose()

    @property
    def heard(self) -> list[bytes]:
        return [data for _, data in self.writes]


@asynccontextmanager
async def connected(app: App) -> AsyncIterator[Client]:
    """A client of ``app``; the connection ends after it."""
    client = Client()

    async def serve() -> None:
        wrapped, context = ASGIWrapper(app), WorkerContext(None)
        await Connection(wrapped, hypercorn_config(), context, ConnectionState({}), client).run()
        client.ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113  the pipe keeps what comes before it runs
        yield client
        client.says.close()


class Idle:
    """What the timer sees of one."""

    def __init__(self, tasks: Tasks) -> None:
        self.ending, self.closed_s = EventWrapper(), list[float]()
        self.timer = IdleTimer(self.ending, self._close)
        self._tasks, self._began_s = tasks, trio.current_time()

    async def _close(self) -> None:
        self.closed_s.append(trio.current_time() - self._began_s)

    async def idle(self) -> None:
        await self.timer.restart(self._tasks, None)

    async def busy(self) -> None:
        await self.timer.stop()


@pytest.fixture
async def idle_one(autojump_clock: MockClock) -> AsyncIterator[Idle]:
    async with Tasks() as tasks:  # leaving it shows that the timer's task has ended
        made = Idle(tasks)
        await made.idle()
        yield made


async def test_it_is_closed_once_it_was_idle_for_so_long(autojump_clock: Any, idle_one: Idle) -> None:
    await trio.sleep(10 * IDLE_S)
    assert idle_one.closed_s == [IDLE_S]


async def test_a_request_under_way_keeps_it_open_and_the_time_counts_from_its_end(
    autojump_clock: Any, idle_one: Idle
) -> None:
    for _ in range(3):
        await trio.sleep(IDLE_S - 1)
        await idle_one.busy()
        await trio.sleep(10 * IDLE_S)
        await idle_one.idle()
    assert not idle_one.closed_s
    await trio.sleep(2 * IDLE_S)
    assert idle_one.closed_s == [3 * (11 * IDLE_S - 1) + IDLE_S]


async def test_of_many_requests_at_once_only_the_last_end_counts(autojump_clock: Any, idle_one: Idle) -> None:
    for _ in range(100):
        await idle_one.busy()
        await idle_one.idle()
    await trio.sleep(IDLE_S / 2)
    await idle_one.busy()
    await idle_one.idle()
    await trio.sleep(2 * IDLE_S)
    assert idle_one.closed_s == [1.5 * IDLE_S]


async def test_when_the_api_ends_it_is_closed_at_once(autojump_clock: Any, idle_one: Idle) -> None:
    await trio.sleep(1)
    await idle_one.ending.set()
    await trio.sleep(1)
    assert idle_one.closed_s == [1]


async def test_a_request_under_way_when_the_api_ends_closes_it_itself(autojump_clock: Any, idle_one: Idle) -> None:
    await trio.sleep(1)
    await idle_one.ending.set()
    await idle_one.busy()  # it came in the same moment
    await trio.sleep(10 * IDLE_S)
    assert not idle_one.closed_s


@pytest.mark.parametrize("after_s", [0.0, 1.0])
async def test_after_its_client_has_gone_nothing_is_timed(after_s: float, autojump_clock: Any, idle_one: Idle) -> None:
    if after_s:
        await trio.sleep(after_s)
    idle_one.timer.end()
    await idle_one.idle()  # the end of a reply that nobody reads
    await trio.sleep(10 * IDLE_S)
    assert not idle_one.closed_s


async def stream_of(send: Any, lines_of: Callable[[Lines], Awaitable[None]]) -> None:
    async with open_lines(send, "text/plain", {"x-one": "1"}) as lines:
        await lines_of(lines)


async def test_a_short_stream_leaves_in_as_many_writes_as_it_has_lines(autojump_clock: MockClock) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        async def say(lines: Lines) -> None:
            for word in (b"one", b"two"):
                await lines.send(word)
                await trio.sleep(0.1)
            await lines.send(b"three")

        await stream_of(send, say)

    async with connected(app) as client:
        for _ in range(2):  # the second one as the first
            client.writes.clear()
            await client.says.send_all(GET)
            await trio.sleep(1)
            first, second, last = client.heard
            assert first.startswith(b"HTTP/1.1 200")
            assert b"x-one: 1\r\n" in first
            assert first.endswith(b"\r\n\r\n3\r\none\r\n")
            assert (second, last) == (b"3\r\ntwo\r\n", b"5\r\nthree\r\n0\r\n\r\n")


async def test_the_head_of_a_stream_leaves_alone_when_its_first_line_is_late(autojump_clock: MockClock) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        async def say(lines: Lines) -> None:
            await trio.sleep(10)
            await lines.send(b"late")
            await trio.sleep(10)

        await stream_of(send, say)

    async with connected(app) as client:
        began_s = trio.current_time()
        await client.says.send_all(GET)
        await trio.sleep(30)
    (at_s, head), (line_at_s, line), (end_at_s, end) = client.writes
    assert at_s == began_s
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    assert (line_at_s, line) == (began_s + 10, b"4\r\nlate\r\n")
    assert (end_at_s, end) == (began_s + 20, b"0\r\n\r\n")


async def test_a_reply_to_head_has_no_body_and_the_connection_goes_on(autojump_clock: MockClock) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], BODY_FOLLOWS: True})
        await send({"type": "http.response.body", "body": b"some", "more_body": False})

    async with connected(app) as client:
        await client.says.send_all(GET.replace(b"GET", b"HEAD"))
        await trio.sleep(1)
        await client.says.send_all(GET)
        await trio.sleep(1)
    head, whole = client.heard
    assert head.endswith(b"\r\n\r\n")
    assert whole.endswith(b"\r\n\r\n4\r\nsome\r\n0\r\n\r\n")


async def test_headers_reach_the_client_as_they_are_and_what_would_begin_another_line_does_not(
    autojump_clock: MockClock,
) -> None:
    given = [(b"x-a", b"1"), (b"x-a", b"2 \xc3\xa9"), (b"content-length", b"2"), (b"X-B", b"b")]
    bad: list[tuple[bytes, bytes]] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": [*given, *bad]})
        await send({"type": "http.response.body", "body": b"no"})

    async def reply() -> bytes:
        async with connected(app) as client:
            await client.says.send_all(GET)
            await trio.sleep(1)
        return b"".join(client.heard)

    head, _, body = (await reply()).partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].split()[:2] == [b"http/1.1", b"404"]
    assert [line for line in lines if line[:2] == b"x-"] == [b"x-a: 1", b"x-a: 2 \xc3\xa9", b"x-b: b"]
    assert lines.count(b"content-length: 2") == 1
    assert body == b"no"
    for name, value in ((b"x-c", b"1\r\nset-cookie: a"), (b"x-c\r\nset-cookie", b"a"), (b"x-c", b"1\nset-cookie: a")):
        bad[:] = [(name, value)]
        assert b"set-cookie" not in await reply()


@pytest.mark.parametrize("read", [0, 1])
async def test_what_an_application_leaves_unread_holds_neither_its_reply_nor_the_connection_up(
    autojump_clock: MockClock, read: int
) -> None:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        for _ in range(read):
            await receive()
        await trio.sleep(1)
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with connected(app) as client:
        await client.says.send_all(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        await client.says.send_all(b"1\r\nx\r\n" * 100)
        with trio.fail_after(10):
            await client.ended.wait()
    assert b"".join(client.heard).startswith(b"HTTP/1.1 413")


async def refuse_unread(_scope: Any, receive: Any, send: Any) -> None:
    """Answers before the body is here, and takes that in meanwhile."""

    async def drain() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})
        nursery.cancel_scope.cancel()


POST_HALF = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n" + bytes(1_000_000)


async def test_a_body_may_go_on_arriving_after_its_reply_and_the_connection_goes_on(autojump_clock: MockClock) -> None:
    async with connected(refuse_unread) as client:
        await client.says.send_all(POST_HALF)
        await trio.sleep(1)
        assert b"".join(client.heard).endswith(b"no")
        await client.says.send_all(bytes(1_000_000) + GET)
        await trio.sleep(1)
        assert b"".join(client.heard).count(b"HTTP/1.1 404") == 2
        assert not client.ended.is_set()


@pytest.mark.parametrize(("leaves", "ends_s"), [(True, 1), (False, LINGER_S)])
async def test_a_body_that_does_not_go_on_arriving_is_not_waited_for(
    autojump_clock: MockClock, leaves: bool, ends_s: float
) -> None:
    async with connected(refuse_unread) as client:
        began_s = trio.current_time()
        await client.says.send_all(POST_HALF)
        await trio.sleep(1)
        if leaves:
            client.says.close()
        await client.ended.wait()
        assert trio.current_time() - began_s == pytest.approx(ends_s)


POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"


async def tell_body(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request's body, or that it did not come in time."""
    try:
        body = await read_body(Request(scope, receive), 100)
    except RequestTimeout:
        body = b"too late"
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("pause_s", [0.0, BODY_TIMEOUT_S / 2 - 1])
@pytest.mark.parametrize("cuts", [(), (20,), (len(POST) - 5,), (len(POST) - 1,), (20, len(POST) - 4)])
async def test_a_body_is_read_whole_however_it_comes(
    autojump_clock: MockClock, cuts: tuple[int, ...], pause_s: float
) -> None:
    async with connected(tell_body) as client:
        for start, end in pairwise((0, *cuts, len(POST))):
            await client.says.send_all(POST[start:end])
            await trio.sleep(pause_s)
        await trio.sleep(1)
        assert b"".join(client.heard).endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("sent", [b"", b"hell"])
async def test_a_body_that_does_not_come_whole_is_waited_for_so_long(autojump_clock: MockClock, sent: bytes) -> None:
    async with connected(tell_body) as client:
        began_s = trio.current_time()
        await client.says.send_all(POST.removesuffix(b"hello") + sent)
        await trio.sleep(BODY_TIMEOUT_S + 1)
        assert b"".join(client.heard).endswith(b"\r\n\r\ntoo late")
        assert client.writes[0][0] - began_s == pytest.approx(BODY_TIMEOUT_S)
