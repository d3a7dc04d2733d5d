"""One stream between two MemorySwarms: a bounded pipe each way, late by the network's latency, stopped while nothing passes.

Satisfies ports.Stream, with the limits and errors of the real one. Not here: connections and faults (memory_swarm).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId
from meshmax.net import limits


class Route(Protocol):
    """What a pipe lies on; a MemoryNetwork is one."""

    latency_s: float

    def passes(self, a: PeerId, b: PeerId) -> bool:
        """Whether bytes pass between ``a`` and ``b`` now."""
        ...

    async def wait_passable(self, a: PeerId, b: PeerId) -> None:
        """Wait until they do."""
        ...


class Pipe:
    """One direction of a stream: bounded, late by the latency, stopped while nothing passes."""

    def __init__(
        self, network: Route, source: PeerId, sink: PeerId, on_arrival: Callable[[PeerId], None] = lambda sink: None
    ) -> None:
        """``on_arrival``: called with the sink when something is read, which here is when it comes."""
        self._network, self._source, self._sink = network, source, sink
        self._on_arrival = on_arrival
        self._parts: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._changed = trio.Event()
        self.ended = self.broken = self.abandoned = False

    def change(self, *, ended: bool = False, broken: bool = False, abandoned: bool = False) -> None:
        """Note the end (no more is sent), a break (reset, or connection lost) or that nobody reads any more."""
        self.ended |= ended
        self.broken |= broken
        self.abandoned |= abandoned
        if broken or abandoned:
            self._parts.clear()
            self._held_bytes = 0
        self._changed.set()
        self._changed = trio.Event()

    async def send(self, data: bytes) -> None:
        """Put ``data`` in as room comes free. Raises PeerGone."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self.broken or self.ended:
                raise PeerGone("the stream was closed or reset")
            room = limits.MAX_STREAM_BUFFER_BYTES - self._held_bytes
            if self.abandoned:
                return
            if not room:
                await self._changed.wait()
                continue
            part, view = bytes(view[:room]), view[room:]
            self._parts.append((trio.current_time() + self._network.latency_s, part))
            self._held_bytes += len(part)
            self.change()

    async def receive(self, max_bytes: int) -> bytes:
        """1 to ``max_bytes`` bytes once they have arrived, or b"" at the end. Raises PeerGone."""
        await trio.lowlevel.checkpoint()
        while True:
            if self.broken:
                raise PeerGone("the stream was reset or the peer is gone")
            if not self._parts and not self.ended:
                await self._changed.wait()
                continue
            if not self._network.passes(self._source, self._sink):
                with trio.move_on_after(1.0):  # looks up now and then, so that a break is seen
                    await self._network.wait_passable(self._source, self._sink)
                continue
            if not self._parts:
                return b""
            due, part = self._parts[0]
            if due > trio.current_time() + 1e-9:  # floats: a clock that jumps to a deadline may land just before it
                await trio.sleep_until(due)
                continue
            return self._take(part, max_bytes)

    def _take(self, part: bytes, max_bytes: int) -> bytes:
        due, _ = self._parts.popleft()
        if len(part) > max_bytes:
            self._parts.appendleft((due, part[max_bytes:]))
        taken = part[:max_bytes]
        self._held_bytes -= len(taken)
        self._on_arrival(self._sink)
        self.change()
        return taken


class MemoryStream:
    """One end of a stream; satisfies ports.Stream."""

    def __init__(
        self, peer: PeerId, incoming: Pipe, outgoing: Pipe, forget: Callable[[], None], address: str = ""
    ) -> None:
        self.peer, self.address = peer, address
        self._incoming, self._outgoing, self._forget = incoming, outgoing, forget
        self._closed = False

    async def receive_some(self, max_bytes: int) -> bytes:
        """See ports.Stream."""
        if self._closed:
            raise PeerGone("the stream was closed here")
        return await self._incoming.receive(max_bytes)

    async def send_all(self, data: bytes) -> None:
        """See ports.Stream. Cancelled half-way, the stream is reset."""
        try:
            await self._outgoing.send(data)
        except trio.Cancelled:
            self.break_off()
            raise

    async def send_eof(self) -> None:
        """See ports.Stream."""
        await trio.lowlevel.checkpoint()
        if self._outgoing.broken:
            raise PeerGone("the stream was reset or the peer is gone")
        self._outgoing.change(ended=True)

    async def reset(self) -> None:
        """See ports.Stream."""
        self.break_off()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def aclose(self) -> None:
        """See ports.Stream. What the peer still sends is thrown away."""
        if not self._closed:
            self._closed = True
            self._outgoing.change(ended=True)
            self._incoming.change(abandoned=True)
            self._forget()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def break_off(self) -> None:
        """Reset without an await."""
        if not self._closed:
            self._closed = True
            self._incoming.change(broken=True)
            self._outgoing.change(broken=True)
            self._forget()
