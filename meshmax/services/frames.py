"""Messages over a Stream: one frame in, one frame out. Bounds are wire.frames'; deadlines are the caller's."""

from __future__ import annotations

from typing import TypeVar

from meshmax.base.errors import RemoteProtocolError
from meshmax.ports import Stream
from meshmax.wire.frames import HEADER_BYTES, Codec, body_length

M = TypeVar("M")


class FrameStream:
    """Reads and writes frames on one stream, and keeps what was read ahead. One reader and one writer at a time."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.peer = stream.peer
        self._buffer = bytearray()

    async def send(self, codec: Codec[M], message: M) -> None:
        """Send one message. Raises LocalProtocolError (too large), PeerGone."""
        await self.stream.send_all(codec.encode(message))

    async def receive(self, codec: Codec[M]) -> M:
        """The next message. Raises RemoteProtocolError (garbage, oversized, or the end of the stream), PeerGone."""
        message = await self.try_receive(codec)
        if message is None:
            raise RemoteProtocolError("the peer ended the stream where a message was due")
        return message

    async def try_receive(self, codec: Codec[M]) -> M | None:
        """The next message, or None where the stream ended between two messages. Raises RemoteProtocolError, PeerGone."""
        if not await self._fill(HEADER_BYTES):
            if self._buffer:
                raise RemoteProtocolError("the peer ended the stream inside a frame")
            return None
        length = body_length(bytes(self._buffer[:HEADER_BYTES]), codec.max_bytes)
        if not await self._fill(HEADER_BYTES + length):
            raise RemoteProtocolError("the peer ended the stream inside a frame")
        body = bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + length])
        del self._buffer[: HEADER_BYTES + length]
        return codec.decode(body)

    async def _fill(self, count: int) -> bool:
        while len(self._buffer) < count:
            data = await self.stream.receive_some(65536)
            if not data:
                return False
            self._buffer += data
        return True
