"""One raw connection, and the transport that makes them.

A Wire is what the library reads from and writes to. It decides that a message which the cipher has numbered goes out whole
and in order, whatever is cancelled meanwhile (half a Noise message would cost the connection and every stream on it), and
that nobody waits for a slow peer while holding one of the library's locks: writing is queueing, and one task sends. It
can be cut from outside at any time, which wakes every reader and writer. Until the peer is authenticated it may send
MAX_HANDSHAKE_BYTES. Transports make byte streams: TCP here, an in-memory one in meshmax.testing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from meshmax.net import limits
from meshmax.net.addresses import is_circuit, multiaddr_of
from meshmax.ports import ByteStream


class Listener(Protocol):
    """A listening port. ``local`` is (address, port) as bound."""

    local: tuple[str, int]

    async def accept(self) -> ByteStream:
        """The next connection. Raises OSError where accepting failed for now, trio.ClosedResourceError once closed."""
        ...

    def close(self) -> None:
        """Listen no more."""
        ...


class Transport(Protocol):
    """Makes byte streams; knows nothing of peers."""

    async def resolve(self, host: str) -> list[str]:
        """The IP addresses of ``host``, which may be one already. Raises OSError."""
        ...

    async def connect(self, ip: str, port: int) -> ByteStream:
        """Connect. Raises OSError."""
        ...

    async def listen(self, host: str, port: int) -> Listener:
        """Listen; port 0 is any free one. Raises OSError (EADDRINUSE where the port is taken)."""
        ...

    def interface_addresses(self) -> list[str]:
        """IP addresses of this machine, loopback ones last."""
        ...


class Wire:
    """A byte stream in the form that the library wants (libp2p.io.abc.ReadWriteCloser). Its owner runs `pump`."""

    def __init__(self, stream: ByteStream, on_end: Callable[[], None], address: str = "") -> None:
        """``on_end`` is called once, when either side has ended the connection. ``address``: where it leads (a multiaddr)."""
        self._stream = stream
        self._on_end = on_end
        self._incoming = bytearray()  # read ahead: the library asks for each frame in four pieces
        self._outgoing: list[bytes] = []
        self._backlog_bytes = 0
        self._queued, self._sent = trio.Event(), trio.Event()
        self._allowance_bytes: int | None = limits.MAX_HANDSHAKE_BYTES
        self.cut_off = False
        self.heard_s = trio.current_time()  # when bytes came last
        self.agreed = trio.Event()  # the peer speaks Yamux, as far as we asked; or the wire is cut
        self.remote = stream.remote
        self.address = address or multiaddr_of(*stream.remote)
        relayed = is_circuit(self.address)
        self.step_bytes = limits.RELAYED_STEP_BYTES if relayed else limits.WRITE_STEP_BYTES  # for who writes much
        self._ahead_bytes = limits.RELAYED_AHEAD_BYTES if relayed else limits.WRITE_AHEAD_BYTES

    def authenticated(self) -> None:
        """From now on the peer may send without a limit of this layer."""
        self._allowance_bytes = None

    async def pump(self) -> None:
        """Send what was written until the wire is cut."""
        while not self.cut_off:
            while self._outgoing:
                data = b"".join(self._outgoing)
                self._outgoing.clear()
                try:
                    await self._stream.send_all(data)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    self.cut()
                    return
                self._backlog_bytes -= len(data)
                self._sent.set()
                self._sent = trio.Event()
            if not self.cut_off:
                self._queued = trio.Event()
                await self._queued.wait()

    async def write(self, data: bytes) -> None:
        """Queue ``data``, which the cipher has numbered already; nothing is waited for before, and little after.

        Who sends much calls `wait_room` first. Raises the library's ConnectionClosedError.
        """
        if self._backlog_bytes + len(data) > limits.MAX_BACKLOG_BYTES:
            self.cut()
        if self.cut_off:
            raise _closed_error()
        self._outgoing.append(bytes(data))
        self._backlog_bytes += len(data)
        self._queued.set()
        await trio.lowlevel.checkpoint()

    async def wait_room(self, size_bytes: int) -> None:
        """Wait until there is room to send ``size_bytes``, or the wire is cut. Cancelling costs nothing."""
        while not self.has_room(size_bytes) and not self.cut_off:
            await self._sent.wait()

    def has_room(self, size_bytes: int) -> bool:
        """Whether less than WRITE_AHEAD_BYTES (over a relay RELAYED_AHEAD_BYTES) are queued; half as much again for BRIEF_BYTES.

        Else whoever sends in bulk and was woken first could take all the room each time, while heartbeats and prompts
        wait for many rounds.
        """
        ahead_bytes = self._ahead_bytes * (1.5 if size_bytes <= limits.BRIEF_BYTES else 1)
        return self._backlog_bytes < ahead_bytes

    async def flush(self) -> None:
        """Wait until everything queued was sent, or the wire is cut."""
        while self._backlog_bytes and not self.cut_off:
            await self._sent.wait()

    async def read(self, n: int | None = None) -> bytes:
        """1 to ``n`` bytes, b"" once the connection is over for whatever reason. What was read ahead takes no turn."""
        if n == 0 or self.cut_off:
            return b""
        if not self._incoming and not await self._receive(max(n or 65536, limits.READ_AHEAD_BYTES)):
            return b""
        data = bytes(self._incoming[:n])
        del self._incoming[:n]
        return data

    async def try_read_message(self) -> bytes | None:
        """What follows two bytes that say how long it is, whole; None: the connection is over. Cancelling loses nothing."""
        while not self.cut_off:
            ends = 2 + int.from_bytes(self._incoming[:2], "big")
            if len(self._incoming) >= ends:
                data = bytes(self._incoming[2:ends])
                del self._incoming[:ends]
                return data
            if not await self._receive(max(ends - len(self._incoming), limits.READ_AHEAD_BYTES)):
                break
        return None

    async def _receive(self, max_bytes: int) -> bool:
        """More of what the peer sends; False: the connection is over."""
        if self._allowance_bytes is not None:
            max_bytes = min(max_bytes, self._allowance_bytes)
            if max_bytes == 0:
                self.cut()
                return False
        try:
            data = await self._stream.receive_some(max_bytes)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        self.heard_s = trio.current_time()
        if not data:
            self.cut()
        elif self._allowance_bytes is not None:
            self._allowance_bytes -= len(data)
        if self.cut_off:
            return False
        self._incoming += data
        return True

    async def close(self) -> None:
        """The library's word for `cut`; what is queued has a moment to go out first (a farewell, a refusal)."""
        with trio.move_on_after(limits.LAST_WORDS_S):
            await self.flush()
        self.cut()
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """End the connection now; stalled writers and readers wake with an error. Idempotent, no await."""
        if not self.cut_off:
            self.cut_off = True
            self._stream.close()
            self._incoming.clear()  # nobody reads or sends them any more, and the library's parts hold each other and us
            self._outgoing.clear()
            self._queued.set()
            self._sent.set()
            self.agreed.set()
            self._on_end()

    def get_remote_address(self) -> tuple[str, int]:
        """(IP address, port) of the other end."""
        return self.remote


def _closed_error() -> Exception:
    from libp2p.io.exceptions import ConnectionClosedError

    error: Exception = ConnectionClosedError("the connection is closed", transport="tcp")
    return error
