"""One raw connection, and the transport that makes them.

A Wire is what the library reads from and writes to. It decides two things: a write that has begun is finished, whatever
is cancelled meanwhile (half a Noise message on the wire would cost the connection and every stream on it), and therefore
a Wire can be cut from outside at any time, which wakes every reader and writer. Until the peer is authenticated it may
send MAX_HANDSHAKE_BYTES. Transports make byte streams: TCP here, an in-memory one in meshmax.testing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from meshmax.net import limits


class ByteStream(Protocol):
    """A connected pair's one end. ``remote`` is (IP address, port)."""

    remote: tuple[str, int]

    async def send_all(self, data: bytes) -> None:
        """Send everything. Raises OSError or trio's Broken- and ClosedResourceError."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes:
        """1 to ``max_bytes`` bytes or b"" at the end. Raises OSError or trio's Broken- and ClosedResourceError."""
        ...

    def close(self) -> None:
        """Close both directions now and wake whoever sends or receives; idempotent."""
        ...


class Listener(Protocol):
    """A listening port. ``local`` is (address, port) as bound."""

    local: tuple[str, int]

    async def accept(self) -> ByteStream:
        """The next connection. Raises OSError where accepting failed for now."""
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
    """A byte stream in the form that the library wants (libp2p.io.abc.ReadWriteCloser)."""

    def __init__(self, stream: ByteStream, on_end: Callable[[], None]) -> None:
        """``on_end`` is called once, when either side has ended the connection."""
        self._stream = stream
        self._on_end = on_end
        self._lock = trio.Lock()
        self._allowance_bytes: int | None = limits.MAX_HANDSHAKE_BYTES
        self.cut_off = False
        self.remote = stream.remote

    def authenticated(self) -> None:
        """From now on the peer may send without a limit of this layer."""
        self._allowance_bytes = None

    async def write(self, data: bytes) -> None:
        """Send all of ``data`` even if cancelled; only `cut` ends a stalled write."""
        # Shielded from before the lock on: what is given here is already numbered by the cipher and must not be left out.
        with trio.CancelScope(shield=True):
            async with self._lock:
                try:
                    await self._stream.send_all(data)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self.cut()
                    raise self._closed_error() from error

    async def read(self, n: int | None = None) -> bytes:
        """1 to ``n`` bytes, b"" once the connection is over for whatever reason."""
        if n == 0:
            return b""
        max_bytes = n or 65536
        if self._allowance_bytes is not None:
            max_bytes = min(max_bytes, self._allowance_bytes)
            if max_bytes == 0:
                self.cut()
                return b""
        try:
            data = await self._stream.receive_some(max_bytes)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            self.cut()
        elif self._allowance_bytes is not None:
            self._allowance_bytes -= len(data)
        return data

    async def close(self) -> None:
        """The library's word for `cut`."""
        self.cut()
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """End the connection now; stalled writers and readers wake with an error. Idempotent, no await."""
        if not self.cut_off:
            self.cut_off = True
            self._stream.close()
            self._on_end()

    def get_remote_address(self) -> tuple[str, int]:
        """(IP address, port) of the other end."""
        return self.remote

    @staticmethod
    def _closed_error() -> Exception:
        from libp2p.io.exceptions import ConnectionClosedError

        error: Exception = ConnectionClosedError("the connection is closed", transport="tcp")
        return error
