"""A transport in memory, on which real libp2p hosts run in simulated time: satisfies net.wire.Transport.

A `MemoryWires` is the cable: hosts with IP addresses of their own, byte streams between them that are bounded and late by
``latency_s``, and the faults: `partition`/`heal` (bytes stop, nobody is told), `freeze`/`thaw` (a host stops in both
directions), `kill` (every connection of a host breaks). Hosts are named by their IP address. No sockets, no threads.
"""

from __future__ import annotations

import errno
import itertools
from collections import deque

import trio

from meshmax.net import limits

BUFFER_BYTES = 1 << 20  # what one direction of a connection holds, as the kernel's socket buffers do
_EPSILON_S = 1e-9  # floats: a clock that jumps to a deadline may land just before it
CONNECT_TIMEOUT_S = 60.0  # until a connect to a host that does not answer fails


class MemoryWires:
    """The cable between hosts. ``latency_s``: one way."""

    def __init__(self, latency_s: float = 0.001) -> None:
        self.latency_s = latency_s
        self._listeners: dict[tuple[str, int], MemoryListener] = {}
        self._streams: dict[MemoryBytes, None] = {}
        self._blocked: set[frozenset[str]] = set()
        self._frozen: set[str] = set()
        self._hosts = itertools.count(1)
        self.ports = itertools.count(40000)
        self.changed = trio.Event()

    def attach(self) -> MemoryTransport:
        """A new host with an address of its own in 10.0.0.0/8."""
        number = next(self._hosts)
        return MemoryTransport(self, f"10.0.{number >> 8}.{number & 255}")

    def partition(self, a: str, b: str) -> None:
        """From now on nothing passes between the hosts ``a`` and ``b``."""
        self._blocked.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        """Take a `partition` back; what was sent meanwhile arrives."""
        self._blocked.discard(frozenset((a, b)))
        self._wake()

    def freeze(self, host: str) -> None:
        """From now on nothing passes to or from ``host``."""
        self._frozen.add(host)

    def thaw(self, host: str) -> None:
        """Take a `freeze` back."""
        self._frozen.discard(host)
        self._wake()

    def kill(self, host: str) -> None:
        """Break every connection of ``host`` and close its listeners."""
        for (ip, _), listener in list(self._listeners.items()):
            if ip == host:
                listener.close()
        for stream in list(self._streams):
            if host in (stream.ip, stream.remote[0]):
                stream.close()

    def passes(self, a: str, b: str) -> bool:
        """Whether bytes pass between ``a`` and ``b`` now."""
        return not (a in self._frozen or b in self._frozen or frozenset((a, b)) in self._blocked)

    async def wait_passable(self, a: str, b: str) -> None:
        """Wait until bytes pass between ``a`` and ``b``."""
        while not self.passes(a, b):
            await self.changed.wait()

    def bind(self, listener: MemoryListener) -> None:
        """Reserve a port. Raises OSError (EADDRINUSE)."""
        if listener.local in self._listeners:
            raise OSError(errno.EADDRINUSE, "the port is taken")
        self._listeners[listener.local] = listener

    def unbind(self, listener: MemoryListener) -> None:
        """Free a port."""
        if self._listeners.get(listener.local) is listener:
            del self._listeners[listener.local]

    async def connect(self, source: str, ip: str, port: int) -> MemoryBytes:
        """A connection from host ``source`` to a listener. Raises OSError."""
        with trio.move_on_after(CONNECT_TIMEOUT_S) as scope:
            await self.wait_passable(source, ip)
            await trio.sleep(2 * self.latency_s)
        listener = self._listeners.get((ip, port))
        if scope.cancelled_caught:
            raise OSError(errno.ETIMEDOUT, "no answer")
        if listener is None:
            raise OSError(errno.ECONNREFUSED, "connection refused")
        near = MemoryBytes(self, source, (ip, port))
        far = MemoryBytes(self, ip, (source, next(self.ports)))
        near.twin, far.twin = far, near
        try:
            listener.sink.send_nowait(far)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            raise OSError(errno.ECONNREFUSED, "connection refused") from None
        self._streams |= {near: None, far: None}
        return near

    def forget(self, stream: MemoryBytes) -> None:
        """A connection's end was closed."""
        self._streams.pop(stream, None)

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class MemoryBytes:
    """One end of a connection; satisfies net.wire.ByteStream."""

    twin: MemoryBytes

    def __init__(self, wires: MemoryWires, ip: str, remote: tuple[str, int]) -> None:
        self.ip, self.remote = ip, remote
        self._wires = wires
        self._arriving: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._changed = trio.Event()
        self._closed = self._broken = False

    async def send_all(self, data: bytes) -> None:
        """See net.wire.ByteStream."""
        await trio.lowlevel.checkpoint()
        twin, view = self.twin, memoryview(data)
        while view:
            if self._closed:
                raise trio.ClosedResourceError
            if twin._closed:
                raise trio.BrokenResourceError
            room = BUFFER_BYTES - twin._held_bytes
            if not room:
                await twin._changed.wait()
                continue
            part, view = bytes(view[:room]), view[room:]
            twin._arriving.append((trio.current_time() + self._wires.latency_s, part))
            twin._held_bytes += len(part)
            twin._change()

    async def receive_some(self, max_bytes: int) -> bytes:
        """See net.wire.ByteStream."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError
            passes = self._wires.passes(self.ip, self.remote[0])
            due_s = self._arriving[0][0] if self._arriving and passes else float("inf")
            if due_s <= trio.current_time() + _EPSILON_S:
                return self._take(max_bytes)
            if self._broken and not self._arriving:
                return b""
            changed = self._changed if passes else self._wires.changed
            with trio.move_on_at(due_s):
                await _either(changed, self._changed)

    def _take(self, max_bytes: int) -> bytes:
        due_s, part = self._arriving.popleft()
        if len(part) > max_bytes:
            self._arriving.appendleft((due_s, part[max_bytes:]))
        self._held_bytes -= min(len(part), max_bytes)
        self._change()
        return part[:max_bytes]

    def close(self) -> None:
        """See net.wire.ByteStream. The other end reads what is on its way, then the end."""
        if not self._closed:
            self._closed = True
            self._arriving.clear()  # nobody reads here any more
            self._wires.forget(self)
            self._change()
            self.twin._broken = True
            self.twin._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


async def _either(first: trio.Event, second: trio.Event) -> None:
    if first is second:
        await first.wait()
        return

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, first)
        nursery.start_soon(wait, second)


class MemoryListener:
    """A port of a host; satisfies net.wire.Listener."""

    def __init__(self, wires: MemoryWires, local: tuple[str, int]) -> None:
        self.local = local
        self._wires = wires
        self.sink, self._source = trio.open_memory_channel[MemoryBytes](limits.LISTEN_BACKLOG)

    async def accept(self) -> MemoryBytes:
        """See net.wire.Listener."""
        try:
            return await self._source.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None

    def close(self) -> None:
        """See net.wire.Listener."""
        self._wires.unbind(self)
        self.sink.close()


class MemoryTransport:
    """One host on the cable; satisfies net.wire.Transport. Every address that is listened on is ``ip``."""

    def __init__(self, wires: MemoryWires, ip: str) -> None:
        self.ip = ip
        self._wires = wires

    async def resolve(self, host: str) -> list[str]:
        """See net.wire.Transport. There are no names here."""
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENOENT, f"no such host: {host}")

    async def connect(self, ip: str, port: int) -> MemoryBytes:
        """See net.wire.Transport."""
        return await self._wires.connect(self.ip, ip, port)

    async def listen(self, host: str, port: int) -> MemoryListener:
        """See net.wire.Transport."""
        await trio.lowlevel.checkpoint()
        listener = MemoryListener(self._wires, (self.ip, port or next(self._wires.ports)))
        self._wires.bind(listener)
        return listener

    def interface_addresses(self) -> list[str]:
        """See net.wire.Transport."""
        return [self.ip]
