"""Frames: a 4-byte big-endian length, then that many bytes of MessagePack (msgspec).

Rules: a frame's body has 1 to 1 MiB bytes, fewer where a protocol's messages are small (`Codec`); the length is checked
before anything is allocated. Every message type is a
msgspec Struct; unions are told apart by their tag. Unknown fields are ignored (a newer peer may say more), unknown tags
and wrong types are errors. Not here: reading from a stream (services.frames).
"""

from __future__ import annotations

import struct
from typing import Any, Final, Generic, TypeVar

import msgspec

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.units import MIB

MAX_FRAME_BYTES: Final = MIB  # of the body; large enough for a status or a manifest, small enough to hold per stream
HEADER_BYTES: Final = 4

_LENGTH: Final = struct.Struct(">I")
_encoder: Final = msgspec.msgpack.Encoder()

M = TypeVar("M")


class Codec(Generic[M]):
    """Encodes and decodes the messages of one type (a Struct or a union of tagged Structs).

    ``max_bytes``: of a body. Small for small messages, so that who announces more is not waited for.
    """

    def __init__(self, message_type: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._decoder = msgspec.msgpack.Decoder(message_type)

    def encode(self, message: M) -> bytes:
        """The whole frame, header included. Raises LocalProtocolError if it is over the limit."""
        body = _encoder.encode(message)
        if len(body) > self.max_bytes:
            raise LocalProtocolError(f"a message of {len(body)} bytes is over the limit of {self.max_bytes}")
        return _LENGTH.pack(len(body)) + body

    def decode(self, body: bytes | bytearray | memoryview) -> M:
        """The message in a frame's body. Raises RemoteProtocolError."""
        try:
            message: M = self._decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"the peer sent a message that is not valid: {str(error)[:200]}") from None
        return message


def body_length(header: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """The length that a 4-byte header announces. Raises RemoteProtocolError outside 1 to ``max_bytes``."""
    (length,) = _LENGTH.unpack(header)
    if not 1 <= length <= max_bytes:
        raise RemoteProtocolError(f"the peer announced a frame of {length} bytes; allowed are 1 to {max_bytes}")
    return int(length)
