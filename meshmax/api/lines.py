"""The lines of one streamed reply on their way to its client: joined where they come faster than they leave.

Rules: the first line leaves at once, with status and headers where these have not left, and so does what `flush` follows. What
comes while a write is under way leaves with the next one; a node with many streams open writes to each of them less often
(core.write_pace). A client that does not read holds the answer up at MAX_WAITING_BYTES. Status and headers leave when `begin`
says so, which may be long before the first line.
Not here: what lines look like.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio
from starlette.types import Message, Send

from meshmax.api.pauses import Pauses
from meshmax.core.write_pace import pause_s

BODY_FOLLOWS: Final = "meshmax.body_follows"  # key in the start of an ASGI reply: some of its body is sent at once
MAX_WAITING_BYTES: Final = 65536  # that wait for a slow client, and so of one write


class Lines:
    """``streams``: how many the node has open; ``pauses``: what keeps the time for all of them. Begun by `begin`, ended by
    `end`, and meanwhile `write` runs in a task.
    """

    def __init__(self, send: Send, streams: Callable[[], int], pauses: Pauses) -> None:
        self._send = send
        self._streams, self._pauses = streams, pauses
        self._waiting = bytearray()
        self._news = trio.Event()  # there is something to write, or nothing more will be
        self._room = trio.Event()
        self._hurry = trio.Event()
        self._ended = False
        self._written = trio.Event()  # to the end
        self._head: Message | None = None  # until it is sent
        self.begun = False
        self._writes, self._writes_seen = 0, -1

    def begin(self, media_type: str, headers: Mapping[str, str]) -> None:
        """The reply begins: 200, with these headers. Say so once, before a line."""
        named = {"content-type": media_type, "cache-control": "no-cache", **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        self._head = {"type": "http.response.start", "status": 200, "headers": raw}
        self.begun = True
        self._news.set()

    def is_silent(self) -> bool:
        """Whether nothing has left, nor is about to, since this was asked last."""
        silent = self._writes == self._writes_seen and not (self._waiting or self._ended)
        self._writes_seen = self._writes
        return silent

    def keep_alive(self, nothing: bytes) -> None:
        """Write ``nothing``, which means nothing to the client, and hold nothing up by it."""
        self._waiting += nothing
        self._news.set()
        self._hurry.set()

    async def send(self, line: bytes) -> None:
        """Add a line. Waits for a slow client, and only then."""
        if not line:
            return
        self._waiting += line
        self._news.set()
        while len(self._waiting) >= MAX_WAITING_BYTES:
            self._hurry.set()
            self._room = trio.Event()
            await self._room.wait()

    def flush(self) -> None:
        """What was sent so far is not to wait for what may follow."""
        self._hurry.set()

    async def end(self) -> None:
        """Nothing follows. Returns when all has left, the end of the reply as well; nothing leaves of one that has not begun."""
        self._ended = True
        self._news.set()
        self._hurry.set()
        await self._written.wait()

    async def write(self) -> None:
        """Write until the end."""
        while not self._written.is_set():
            await self._news.wait()
            self._news = trio.Event()
            chunk, self._waiting = bytes(self._waiting), bytearray()
            self._room.set()
            await self._write(chunk, last=self._ended)
            if chunk and (pause := pause_s(self._streams())):
                await self._pause(pause)

    async def _write(self, chunk: bytes, last: bool) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            await self._send({**head, BODY_FOLLOWS: bool(chunk) or last})
        if self.begun and (chunk or last):
            self._writes += bool(chunk)
            await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})
        if last:
            self._written.set()

    async def _pause(self, pause: float) -> None:
        await self._pauses.wait(pause, self._hurry)
        if not self._ended:
            self._hurry = trio.Event()


@asynccontextmanager
async def open_lines(
    send: Send,
    media_type: str,
    headers: Mapping[str, str],
    streams: Callable[[], int] = lambda: 1,
    pauses: Pauses | None = None,
) -> AsyncIterator[Lines]:
    """A streamed reply that has begun; leaving the block in order ends it."""
    lines = Lines(send, streams, pauses or Pauses())
    lines.begin(media_type, headers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lines.write)
        yield lines
        await lines.end()
