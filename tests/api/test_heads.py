"""Heads of requests over which programs on the way could disagree, and targets that name the whole URL."""

from typing import Any

import pytest
import trio
from starlette.responses import PlainTextResponse
from trio.testing import MockClock

from meshmax.api.access import Call, Policy, judge
from meshmax.api.heads import HeadBuffer, InvalidHead, needs_look, settled
from tests.api.test_connection import connected

POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


class Seen:
    """An application that answers everybody, and what it was asked."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.scopes.append(scope)
            await PlainTextResponse("there")(scope, receive, send)


async def reply_to(app: Seen, request: bytes, *, gone: bool = False) -> tuple[bytes, bool]:
    """What a client hears that sends ``request``, and whether its connection was closed. ``gone``: it sends nothing more."""
    async with connected(app) as client:
        await client.says.send_all(request)
        if gone:
            client.says.close()
        with trio.move_on_after(1):
            await client.ended.wait()
        return b"".join(client.heard), client.ended.is_set()


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nUpgrade: x\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
        POST + b"Content-Length: 5, 6\r\n\r\n123456",
        POST + b"Content-Length: +5\r\n\r\n12345",
        GET + b"X-A: b\r\n c\r\n\r\n",
        GET + b"X-A: b\r\n\tc\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
        GET + b"X-A : b\r\n\r\n",
        GET + b"X-A: b\rc\r\n\r\n",
        GET + b"X-A: b\r\r\n\r\n",
        GET + b"X-A: b\rX-B: c\r\n\r\n",
        b"GET /\r HTTP/1.1\r\nHost: localhost\r\n\r\n",
        GET + b"X-A: \0\r\n\r\n",
        GET + b"Host: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_a_head_that_may_be_read_in_two_ways_is_refused_and_its_connection_closed(
    autojump_clock: MockClock, request_bytes: bytes
) -> None:
    app = Seen()
    heard, closed = await reply_to(app, request_bytes)
    assert heard.startswith(b"HTTP/1.1 400 "), heard
    assert heard.count(b"HTTP/1.1") == 1
    assert closed
    assert not app.scopes


async def test_a_head_that_comes_in_pieces_is_refused_as_well(autojump_clock: MockClock) -> None:
    app = Seen()
    async with connected(app) as client:
        for byte in GET + b"X-A: b\r\n c\r\n\r\n":
            await client.says.send_all(bytes([byte]))
        await client.ended.wait()
    assert not app.scopes


async def test_a_length_that_is_said_twice_alike_and_a_body_in_chunks_are_taken(autojump_clock: MockClock) -> None:
    app = Seen()
    same = POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n12345"
    chunks = POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n"
    heard, closed = await reply_to(app, same + chunks + GET + b"\r\n")
    assert (heard.count(b"HTTP/1.1 200 "), closed, len(app.scopes)) == (3, False, 3)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://localhost:11434/api/tags?x=1", "/api/tags", b"x=1"),
        (b"HTTP://localhost:11434/a%20b", "/a b", b""),
        (b"http://localhost:11434", "/", b""),
        (b"http://localhost:11434?x=1", "/", b"x=1"),
    ],
)
async def test_a_target_that_names_the_whole_url_is_routed_and_its_host_counts(
    autojump_clock: MockClock, target: bytes, path: str, query: bytes
) -> None:
    app = Seen()
    heard, closed = await reply_to(app, b"GET " + target + b" HTTP/1.1\r\nHost: elsewhere\r\nX-A: b\r\n\r\n")
    assert (heard.startswith(b"HTTP/1.1 200 "), closed) == (True, False)
    (scope,) = app.scopes
    assert (scope["path"], scope["query_string"]) == (path, query)
    assert scope["headers"] == [(b"host", b"localhost:11434"), (b"x-a", b"b")]


def test_a_page_elsewhere_gains_nothing_by_naming_this_machine_in_the_other_place() -> None:
    _, headers = settled(b"http://evil.example/api/tags", [(b"host", b"localhost")], "1.1")
    host = dict(headers)[b"host"].decode()
    assert judge(Call("/api/tags", host, None, ""), Policy(True, "desk")) == "host"


@pytest.mark.parametrize(
    "target", [b"http://", b"http:///x", b"http://me@localhost/x", b"ftp://localhost/x", b"*", b"x:1"]
)
def test_what_is_no_url_of_this_server_stays_as_it_is_and_is_no_path(target: bytes) -> None:
    assert settled(target, [(b"host", b"localhost")], "1.1") == (target, [(b"host", b"localhost")])


def test_a_target_without_a_host_header_has_a_host_all_the_same() -> None:
    assert settled(b"http://localhost/x", [], "1.0") == (b"/x", [(b"host", b"localhost")])


def test_usual_requests_are_not_looked_at() -> None:
    assert not needs_look(b"/api/chat", {b"host", b"content-length"})
    assert needs_look(b"/api/chat", {b"host", b"transfer-encoding"})
    with pytest.raises(InvalidHead):
        settled(b"/", [(b"transfer-encoding", b"chunked"), (b"content-length", b"1")], "1.1")
    assert HeadBuffer().maybe_extract_lines() is None


async def test_who_only_shuts_its_writing_side_down_hears_what_is_answered_without_waiting(
    autojump_clock: MockClock,
) -> None:
    heard, closed = await reply_to(Seen(), GET + b"\r\n", gone=True)
    assert heard.startswith(b"HTTP/1.1 200 ")
    assert heard.endswith(b"there")
    assert closed
