"""The lines of one streamed reply on their way to its client: joined where they come faster than they leave.

Rules: the first line leaves at once, and so does what `flush` follows. What comes while a write is under way leaves with the
next one; a node with many streams open writes to each of them less often (core.write_pace). A client that does not read holds
the answer up at MAX_WAITING_BYTES. Status and headers leave when `begin` says so, which may be long before the first line.
Not here: what lines look like.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio
from starlette.types import Message, Send

from meshmax.core.write_pace import pause_s

MAX_WAITING_BYTES: Final = 65536  # that wait for a slow client, and so of one write


class Lines:
    """Made by `open_lines`."""

    def __init__(self, send: Send, streams: Callable[[], int]) -> None:
        self._send = send
        self._streams = streams
        self._waiting = bytearray()
        self._news = trio.Event()  # there is something to write, or nothing more will be
        self._room = trio.Event()
        self._hurry = trio.Event()
        self._ended = False
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

    def end(self) -> None:
        """Nothing follows."""
        self._ended = True
        self._news.set()
        self._hurry.set()

    async def write(self) -> None:
        """Write until the end."""
        while True:
            await self._news.wait()
            if self._head is not None:
                head, self._head = self._head, None
                await self._send(head)
            if not self._waiting:
                if self._ended:
                    return
                self._news = trio.Event()
                continue
            self._writes += 1
            chunk, self._waiting = bytes(self._waiting), bytearray()
            self._news = trio.Event()
            self._room.set()
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
            if self._ended:
                self._news.set()
            elif pause := pause_s(self._streams()):
                await self._pause(pause)

    async def _pause(self, pause: float) -> None:
        with trio.move_on_after(pause):
            await self._hurry.wait()
        if not self._ended:
            self._hurry = trio.Event()


@asynccontextmanager
async def open_lines(
    send: Send, media_type: str, headers: Mapping[str, str], streams: Callable[[], int] = lambda: 1
) -> AsyncIterator[Lines]:
    """A streamed reply that has begun; leaving the block in order ends it. ``streams``: how many the node has open."""
    async with open_unbegun_lines(send, streams) as lines:
        lines.begin(media_type, headers)
        yield lines


@asynccontextmanager
async def open_unbegun_lines(send: Send, streams: Callable[[], int] = lambda: 1) -> AsyncIterator[Lines]:
    """A streamed reply that `Lines.begin` begins; where nothing did, leaving the block in order sends nothing."""
    lines = Lines(send, streams)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lines.write)
        yield lines
        lines.end()
    if lines.begun:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
