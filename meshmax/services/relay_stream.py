"""Streams of circuit relay v2: its messages on them, and a circuit's end of one as the byte stream under a connection.

Rules. What was read behind a message is not lost: it is the first that a circuit brings. A circuit's end holds nothing else: who
sends waits until the relay takes it, and keeps below the relay's rate, so that what queues up does so where heartbeats and
prompts can pass each other, not on the way. Not here: who may have a circuit (core.circuits, core.relay), what flows in it
(the swarm's Noise).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import trio

from meshmax.base.errors import PeerGone, RemoteProtocolError
from meshmax.base.units import KIB
from meshmax.core.bucket import Bucket
from meshmax.core.circuits import RATE_BYTES_PER_S, Direction
from meshmax.core.subnets import ip_of
from meshmax.ports import Stream
from meshmax.wire import relay as wire

READ_BYTES: Final = 16 * KIB  # read ahead behind a message
STEP_BYTES: Final = 16 * KIB  # sent at once
RATE_SHARE: Final = 0.95  # of what the relay lets through, so that nothing queues up there

T = TypeVar("T")


class RelayMessages:
    """Reads delimited messages, and hands what follows them on."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.ahead = b""

    async def receive(self) -> bytes:
        """The body of the next message. Raises RemoteProtocolError, PeerGone. Deadlines are the caller's."""
        while (taken := wire.try_take(self.ahead)) is None:
            data = await self.stream.receive_some(READ_BYTES)
            if not data:
                raise RemoteProtocolError("the peer ended the stream where a message was due")
            self.ahead += data
        body, self.ahead = taken
        return body


class CircuitBytes:
    """Our end of a circuit; satisfies ports.ByteStream. Whoever made it awaits `closed` and then ends the stream.

    ``remote`` is where the relay is. ``broken``: the relay, or its connection, ended the circuit. ``carried`` is told of every
    byte.
    """

    def __init__(
        self, messages: RelayMessages, rate_bytes_per_s: int, carried: Callable[[Direction, int], None]
    ) -> None:
        self._stream, self._ahead, self._carried = messages.stream, messages.ahead, carried
        self._bucket = Bucket(int(RATE_SHARE * (rate_bytes_per_s or RATE_BYTES_PER_S)))
        self._working: set[trio.CancelScope] = set()  # two: who sends and who receives
        self.remote = _remote_of(self._stream.address)
        self.closed = trio.Event()
        self.broken = False

    async def send_all(self, data: bytes) -> None:
        """See ports.ByteStream."""
        for start in range(0, len(data), STEP_BYTES):
            step = data[start : start + STEP_BYTES]
            await self._until_closed(partial(self._send, step))

    async def _send(self, step: bytes) -> None:
        await trio.sleep(self._bucket.reserve(len(step), trio.current_time()))
        await self._stream.send_all(step)
        self._carried("out", len(step))

    async def receive_some(self, max_bytes: int) -> bytes:
        """See ports.ByteStream."""
        if self._ahead and not self.closed.is_set():
            await trio.lowlevel.checkpoint()
            data, self._ahead = self._ahead[:max_bytes], self._ahead[max_bytes:]
        else:
            data = await self._until_closed(partial(self._stream.receive_some, max_bytes))
        self._carried("in", len(data))
        return data

    async def _until_closed(self, work: Callable[[], Awaitable[T]]) -> T:
        if self.closed.is_set():
            raise trio.ClosedResourceError
        with trio.CancelScope() as scope:
            self._working.add(scope)
            try:
                return await work()
            except PeerGone as error:
                self.broken = not self.closed.is_set()
                raise trio.BrokenResourceError(error.message) from error
            finally:
                self._working.discard(scope)
        raise trio.ClosedResourceError

    def close(self) -> None:
        """See ports.ByteStream."""
        self.closed.set()
        for scope in tuple(self._working):
            scope.cancel()


def is_relayed(stream: Stream) -> bool:
    """Whether the stream's connection itself goes over a relay."""
    return "/p2p-circuit" in stream.address


def _remote_of(address: str) -> tuple[str, int]:
    port = address.rpartition("/tcp/")[2].partition("/")[0]
    return ip_of(address), int(port) if port.isdecimal() else 0
