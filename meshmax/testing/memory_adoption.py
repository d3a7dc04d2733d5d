"""How two MemorySwarms recognise each other over a byte stream that both adopt: a line each way, nothing proved.

The side that began ("out") says its PeerId and a number, hears the other's PeerId, and then both belong to one connection; what
passes on that connection is MemoryNetwork's matter, but it ends with the stream. Not here: admission, the connection itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

import trio

from meshmax.base.errors import ConnectError
from meshmax.base.ids import PeerId
from meshmax.ports import ByteStream

_MAX_LINE_BYTES: Final = 100  # a PeerId has 52 characters, the number a few
_MADE: Final = b"!"

C = TypeVar("C")
STREAM_FAILURES: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Meeting(Generic[C]):
    """Where the two ends of one stream meet; kept by the network under a number."""

    def __init__(self, address: str) -> None:
        """``address``: of the side that began, as the other sees it."""
        self.address = address
        self.connection: C | None = None


class Meetings(Generic[C]):
    """Those under way on one network."""

    def __init__(self) -> None:
        self._numbers = 0
        self._meetings: dict[tuple[PeerId, PeerId, int], Meeting[C]] = {}

    async def lead(self, stream: ByteStream, own: PeerId, expected: PeerId, connect: Callable[[Meeting[C]], C]) -> C:
        """The side that began: ``connect`` makes the connection. Raises ConnectError."""
        self._numbers += 1
        number = self._numbers
        try:
            await stream.send_all(f"{own} {number}\n".encode())
            answer = await _line(stream)
            meeting = self._meetings.get((own, expected, number))
            if answer != expected or meeting is None:
                raise ConnectError(f"the peer there is {answer[:60]}")
            meeting.connection = connect(meeting)
            await stream.send_all(_MADE)
        except STREAM_FAILURES as error:
            raise ConnectError(f"the stream was lost: {error}") from error
        return meeting.connection

    async def follow(self, stream: ByteStream, own: PeerId, expected: PeerId, address: str) -> C:
        """The other side. Raises ConnectError."""
        meeting: Meeting[C] = Meeting(address)
        key = None
        try:
            name, _, number = (await _line(stream)).partition(" ")
            if name != expected or not number.isdigit():
                raise ConnectError(f"the peer there is {name[:60]}")
            key = expected, own, int(number)
            self._meetings[key] = meeting
            await stream.send_all(f"{own}\n".encode())
            if await stream.receive_some(1) != _MADE or meeting.connection is None:
                raise ConnectError("the stream was lost before both had agreed")
        except STREAM_FAILURES as error:
            raise ConnectError(f"the stream was lost: {error}") from error
        finally:
            if key is not None:
                del self._meetings[key]
        return meeting.connection


async def _line(stream: ByteStream) -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = await stream.receive_some(1)
        line += part
        if not part or len(line) > _MAX_LINE_BYTES:
            raise ConnectError("the other end of the stream is none of a swarm")
    return line[:-1].decode(errors="replace")
