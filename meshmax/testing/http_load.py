"""Many HTTP requests at once from one thread, cheap enough not to be what is measured: who got which bytes, and when.

HTTP/1.1 over loopback, connections kept alive, replies by length or in chunks. Nothing of a body is decoded while the load
runs; `Reply.events` and `Reply.object` do it afterwards. Synchronous, since it watches from outside. Clients that begin
together, answered at one rate, end and ask again together for ever: `like_people` spreads them. Not here: what is asked.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

_READ_BYTES: Final = 1 << 18
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_END: Final = b"\r\n0\r\n\r\n"


class Reply:
    """What came of one request; times are those of time.perf_counter. ``failed``: '' where it is whole."""

    def __init__(self, asked_s: float) -> None:
        self.asked_s = asked_s
        self.reads: list[tuple[float, bytes]] = []  # as they came, the head's too
        self.failed = ""

    @property
    def took_s(self) -> float:
        """From the asking to the last byte."""
        return self.reads[-1][0] - self.asked_s

    @property
    def status(self) -> int:
        """0 where there was no reply."""
        head = self.head.split(b" ", 2)
        return int(head[1]) if len(head) > 1 and head[1].isdigit() else 0

    @property
    def head(self) -> bytes:
        """Status line and headers."""
        return b"".join(data for _, data in self.reads).partition(b"\r\n\r\n")[0]

    def header(self, name: str) -> str:
        """Of the reply; '' where it is not there."""
        found = re.search(rb"\r\n%s: *([^\r]*)" % name.encode(), self.head, re.IGNORECASE)
        return found[1].decode("latin-1") if found else ""

    def first_s(self, sign: re.Pattern[bytes]) -> float | None:
        """How long until ``sign`` stood in what had come; None: never."""
        seen = b""
        for at, data in self.reads:
            seen = seen[-256:] + data
            if sign.search(seen):
                return at - self.asked_s
        return None

    def body(self) -> bytes:
        """The whole body."""
        return b"".join(data for _, data in self._body_reads())

    def object(self) -> Any:
        """The body as JSON. Raises json.JSONDecodeError."""
        return json.loads(self.body())

    def events(self) -> Iterator[tuple[float, Any]]:
        """When each line of a stream was whole, and its JSON; of server-sent events what stands behind `data:`."""
        rest = b""
        for at, data in self._body_reads():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.removeprefix(b"data:").strip()
                if text and text != b"[DONE]" and not text.startswith(b":"):
                    yield at, json.loads(text)

    def _body_reads(self) -> Iterator[tuple[float, bytes]]:
        """What each read brought of the body, without the chunks' sizes."""
        raw, begun, chunked, left = b"", False, False, 0
        for at, data in self.reads:
            raw += data
            if not begun:
                head, found, rest = raw.partition(b"\r\n\r\n")
                if not found:
                    continue
                begun, chunked, raw = True, not _LENGTH.search(head), rest
            if not chunked:
                yield at, raw
                raw = b""
                continue
            plain = b""
            while raw:
                if left:
                    piece, raw = raw[:left], raw[left:]
                    plain, left = plain + piece, left - len(piece)
                    continue
                size, found, rest = raw.removeprefix(b"\r\n").partition(b"\r\n")
                if not found or size == b"0":
                    break
                left, raw = int(size, 16), rest
            if plain:
                yield at, plain


Take = Callable[[], bytes | None]  # the next request, whole with its head; None: there is no more
Pause = Callable[[bool], float]  # seconds before a connection asks, if it is its first time (True), or again


def at_once(_first: bool) -> float:
    """All begin together, and ask again at once."""
    return 0.0


def like_people(answer_s: float, seed: int) -> Pause:
    """Each begins at a moment of its own within an answer's time, and pauses for up to half of that after each answer."""
    chance = random.Random(seed)
    return lambda first: chance.uniform(0.0, answer_s if first else answer_s / 2)


def post(host: str, path: str, body: Any) -> bytes:
    """A request as it goes over the wire."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer sk-none\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class _Line:
    """One connection, with at most one request under way."""

    def __init__(self, address: tuple[str, int], take: Take, replies: list[Reply]) -> None:
        self._address = address
        self._take = take
        self._replies = replies
        self.sock: socket.socket | None = None
        self._reply: Reply | None = None
        self._request: bytes | None = None
        self._again = self._reused = False
        self.asking = False  # a reply is under way

    def ask(self) -> bool:
        """Send the next request; False: there is none."""
        again, self._again = self._again, False
        request = self._request if again else self._take()
        self._request, self._reused = request, self.sock is not None
        if request is None:
            return False
        if self.sock is None:
            self.sock = socket.create_connection(self._address, timeout=30)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if again and self._reply is not None:
            self._reply.failed = ""
        else:
            self._reply = Reply(time.perf_counter())
            self._replies.append(self._reply)
        self._tail, self._length, self._seen = b"", -1, 0
        self.asking = True
        self.sock.sendall(request)
        return True

    def read(self) -> bool:
        """What has come; True: the reply is at its end."""
        self.asking = not self._read()
        return not self.asking

    def drop(self) -> None:
        """Close it, between two requests."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def _read(self) -> bool:
        assert self._reply is not None and self.sock is not None
        try:
            data = self.sock.recv(_READ_BYTES)
        except OSError as error:
            return self._fail(str(error))
        if not data and self._reused and not self._reply.reads:
            # It was closed between two requests, as servers may (RFC 9110 9.2.2): asked again over a new one.
            self._again = True
        if not data:
            return self._fail("the connection ended in the middle of a reply")
        self._reply.reads.append((time.perf_counter(), data))
        self._seen += len(data)
        if self._length < 0:
            head = self._reply.head
            length = _LENGTH.search(head) if b"\r\n\r\n" in self._reply.reads[0][1] else None
            self._length = len(head) + 4 + int(length[1]) if length else 0
        if self._length:
            return self._seen >= self._length
        self._tail = (self._tail + data)[-len(_END) :]
        return self._tail == _END

    def fail(self, why: str) -> None:
        """The reply is not whole, and never will be."""
        if self.asking:
            self._fail(why)

    def _fail(self, why: str) -> bool:
        assert self._reply is not None and self.sock is not None
        self._reply.failed = why
        self.drop()
        return True


def run_load(
    api: str,
    take: Take,
    connections: int,
    deadline_s: float,
    meanwhile: Callable[[float], None] = lambda now_s: None,
    every_s: float = 0.5,
    pause: Pause = at_once,
) -> list[Reply]:
    """Every reply to what ``take`` gives, ``connections`` at once; those not whole after ``deadline_s`` have failed.

    ``meanwhile`` is called at least each ``every_s`` with the seconds since the start; ``pause`` before each request.
    """
    host, _, port = api.removeprefix("http://").rpartition(":")
    replies: list[Reply] = []
    began_s = time.perf_counter()
    order = itertools.count()
    with selectors.DefaultSelector() as selector:
        lines = [_Line((host, int(port)), take, replies) for _ in range(connections)]
        due = [(began_s + pause(True), next(order), line) for line in lines]
        heapq.heapify(due)
        busy = set(lines)
        while busy:
            now_s = time.perf_counter()
            while due and due[0][0] <= now_s:
                line = heapq.heappop(due)[2]
                if not _go_on(selector, line):
                    busy.discard(line)
            for key, _ in selector.select(max(0.0, min(every_s, due[0][0] - now_s)) if due else every_s):
                line = key.data
                if _is_over(selector, line):
                    # A request that was lost with its connection is asked again without a pause.
                    heapq.heappush(due, (time.perf_counter() + (pause(False) if line.sock else 0.0), next(order), line))
            now_s = time.perf_counter() - began_s
            meanwhile(now_s)
            if now_s > deadline_s:
                for line in busy:
                    line.fail(f"not whole after {deadline_s:g} s")
                break
        for line in lines:
            line.drop()
    return replies


def _is_over(selector: selectors.BaseSelector, line: _Line) -> bool:
    """Read what has come; whether that ended a reply."""
    sock, asking = line.sock, line.asking
    assert sock is not None
    over = line.read() if asking else False
    if not asking:
        line.drop()  # closed between two requests, as servers may
    if line.sock is None:
        selector.unregister(sock)
    return over


def _go_on(selector: selectors.BaseSelector, line: _Line) -> bool:
    fresh = line.sock is None
    if not line.ask():
        return False
    if fresh:
        assert line.sock is not None
        selector.register(line.sock, selectors.EVENT_READ, line)
    return True
