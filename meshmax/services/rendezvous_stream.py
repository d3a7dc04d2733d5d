"""Rendezvous messages over a Stream: a varint of the length, then the message. Bounds are the caller's; so are deadlines."""

from __future__ import annotations

from meshmax.base.errors import RemoteProtocolError
from meshmax.ports import Stream
from meshmax.wire.protobuf import read_uvarint
from meshmax.wire.rendezvous import Message, decode, encode

_READ_BYTES = 65536
_MAX_LENGTH_BYTES = 4  # of the length; the largest message that is read has 2^20 bytes


class RendezvousStream:
    """Reads and writes messages on one stream, and keeps what was read ahead. ``max_bytes``: of a message that is read."""

    def __init__(self, stream: Stream, max_bytes: int) -> None:
        self.stream = stream
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    async def send(self, message: Message) -> None:
        """Send one message. Raises PeerGone."""
        await self.stream.send_all(encode(message))

    async def receive(self) -> Message:
        """The next message. Raises RemoteProtocolError (garbage, oversized, or the end of the stream), PeerGone."""
        message = await self.try_receive()
        if message is None:
            raise RemoteProtocolError("the peer ended the stream where a message was due")
        return message

    async def try_receive(self) -> Message | None:
        """The next message, or None where the stream ended between two. Raises RemoteProtocolError, PeerGone."""
        while not (head := self._head()):
            if not await self._read_more():
                return None
        length, start = head
        while len(self._buffer) < start + length:
            if not await self._read_more():
                raise RemoteProtocolError("the peer ended the stream inside a message")
        body = bytes(self._buffer[start : start + length])
        del self._buffer[: start + length]
        return decode(body)

    def _head(self) -> tuple[int, int] | None:
        """Length of the next message and where it begins; None while that is not there. Raises RemoteProtocolError."""
        head = bytes(self._buffer[:_MAX_LENGTH_BYTES])
        if len(head) < _MAX_LENGTH_BYTES and all(byte & 0x80 for byte in head):
            return None
        length, start = read_uvarint(head, 0)
        if not 0 < length <= self._max_bytes:
            raise RemoteProtocolError(
                f"the peer announced a message of {length} bytes; allowed are 1 to {self._max_bytes}"
            )
        return length, start

    async def _read_more(self) -> bool:
        data = await self.stream.receive_some(_READ_BYTES)
        self._buffer += data
        if not data and self._buffer:
            raise RemoteProtocolError("the peer ended the stream inside a message")
        return bool(data)
