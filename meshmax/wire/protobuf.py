"""Protocol Buffers, as far as libp2p's small messages need them: varints and length-delimited fields.

Rules (protobuf.dev, "Encoding"): a message is read into its fields once, at most ``most`` of them; unknown fields and fields of
another wire type are ignored, of a field that is given twice the last one counts; a varint has at most 64 bits and, as in
libp2p, no needless zero bytes at its end. The two fixed-width types are skipped, groups are an error. Not here: the
messages (wire.peer_record, wire.rendezvous).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.errors import RemoteProtocolError

MAX_VARINT_BYTES: Final = 10  # 64 bits, seven in a byte

_VARINT, _FIXED64, _DATA, _FIXED32 = 0, 1, 2, 5  # wire types


def uvarint(value: int) -> bytes:
    """``value`` (0 to 2^64 - 1) as an unsigned varint (multiformats, unsigned-varint)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_uvarint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at ``at`` and where it ends. Raises RemoteProtocolError."""
    value = shift = 0
    for position in range(at, min(len(data), at + MAX_VARINT_BYTES)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            if value >> 64 or (byte == 0 and position > at):
                break
            return value, position + 1
    raise RemoteProtocolError("the peer sent a message that is not valid: a varint is cut short or too long")


def number_field(number: int, value: int) -> bytes:
    """A varint field."""
    return uvarint(number << 3 | _VARINT) + uvarint(value)


def data_field(number: int, value: bytes) -> bytes:
    """A field of bytes, text or an embedded message."""
    return uvarint(number << 3 | _DATA) + uvarint(len(value)) + value


class Fields:
    """The fields of one message."""

    __slots__ = ("_data", "_numbers")

    def __init__(self, data: bytes, most: int) -> None:
        """Raises RemoteProtocolError where ``data`` is no message or has more than ``most`` fields."""
        self._numbers: dict[int, int] = {}
        self._data: dict[int, list[bytes]] = {}
        at = 0
        for _ in range(most):
            if at == len(data):
                return
            at = self._read_one(data, at)
        if at != len(data):
            raise RemoteProtocolError(f"the peer sent a message with more than {most} fields")

    def _read_one(self, data: bytes, at: int) -> int:
        key, at = read_uvarint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            self._numbers[number], at = read_uvarint(data, at)
            return at
        if kind == _DATA:
            length, at = read_uvarint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise RemoteProtocolError("the peer sent a message that is not valid: an unknown wire type")
        if length > len(data) - at:
            raise RemoteProtocolError("the peer sent a message that is not valid: a field is cut short")
        if kind == _DATA:
            self._data.setdefault(number, []).append(data[at : at + length])
        return at + length

    def number(self, number: int) -> int | None:
        """A varint field; None where it is not given."""
        return self._numbers.get(number)

    def data(self, number: int) -> bytes | None:
        """A field of bytes; None where it is not given."""
        return self._data[number][-1] if number in self._data else None

    def repeated(self, number: int) -> list[bytes]:
        """All of a repeated field of bytes, in their order."""
        return self._data.get(number, [])
