"""Messages of libp2p's circuit relay v2 (libp2p specs, relay/circuit-v2): hop to the relay, stop from it to the target.

Each message is protobuf behind its length as a varint, at most MAX_MESSAGE_BYTES. A peer asks its relay to Reserve, another one
to Connect it with the first; the relay tells the first one with a stop message, and both get a status. Reservations carry no
voucher, which the specification leaves open. A limit also says how many bytes a second may flow (a field of our own, which
others pass over), so that who sends can keep below it and nothing queues up on the way. Decided here: bounds. Not here: who is
let do what (core.relay).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from meshmax.base.errors import InvalidRequest, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.wire.multiaddr import encode_multiaddr, peer_id_bytes, peer_id_from_bytes
from meshmax.wire.protobuf import Fields, data_field, number_field, read_uvarint, uvarint

MAX_MESSAGE_BYTES: Final = 4096  # of the body; a status with eight addresses has some hundred
MAX_FIELDS: Final = 64  # of one message, repeated ones and unknown ones counted
MAX_ADDRESSES: Final = 8  # of a relay in a reservation
MAX_LENGTH_BYTES: Final = 2  # of the length's varint

Status: TypeAlias = Literal[100, 200, 201, 202, 203, 204, 400, 401]
OK: Final = 100
RESERVATION_REFUSED: Final = 200
RESOURCE_LIMIT_EXCEEDED: Final = 201
PERMISSION_DENIED: Final = 202
CONNECTION_FAILED: Final = 203
NO_RESERVATION: Final = 204
MALFORMED_MESSAGE: Final = 400
UNEXPECTED_MESSAGE: Final = 401

_RESERVE, _CONNECT, _HOP_STATUS = 0, 1, 2
_STOP_CONNECT, _STOP_STATUS = 0, 1
_RATE: Final = 100  # our field of Limit


class Limit(msgspec.Struct, frozen=True):
    """What one circuit may carry: seconds in all, bytes in each direction; 0: no limit. The rate, each way, 0 where unknown."""

    duration_s: int = 0
    data_bytes: int = 0
    rate_bytes_per_s: int = 0


class Reserve(msgspec.Struct, frozen=True):
    """Asker: keep a place for me, so that others can be connected with me through you."""


class Connect(msgspec.Struct, frozen=True):
    """Asker (hop): connect me with ``peer_id``. Relay (stop): ``peer_id`` wants to talk to you, within ``limit``."""

    peer_id: PeerId
    limit: Limit = Limit()


class RelayStatus(msgspec.Struct, frozen=True):
    """How it went. A reservation has an end (Unix seconds) and the relay's addresses."""

    status: int
    expires_at_s: int = 0
    addresses: tuple[bytes, ...] = ()
    limit: Limit = Limit()


# --- hop: peers and their relay --------------------------------------------------------------------------------------


def encode_reserve() -> bytes:
    """A Reserve, length included."""
    return _delimited(number_field(1, _RESERVE))


def encode_connect(peer_id: PeerId) -> bytes:
    """A hop Connect, length included."""
    return _delimited(number_field(1, _CONNECT) + data_field(2, data_field(1, peer_id_bytes(peer_id))))


def parse_hop_request(body: bytes) -> Reserve | Connect:
    """What a peer asks of its relay. Raises RemoteProtocolError."""
    fields = Fields(body, MAX_FIELDS)
    kind = fields.number(1) or 0  # proto3 leaves a zero out
    if kind == _RESERVE:
        return Reserve()
    if kind == _CONNECT:
        return Connect(_peer(fields.data(2)))
    raise RemoteProtocolError("the peer sent a relay's answer where a request was due")


def encode_hop_status(
    status: Status, *, expires_at_s: int = 0, addresses: Sequence[str] = (), limit: Limit | None = None
) -> bytes:
    """A relay's answer, length included. ``addresses`` that have no bytes here are left out."""
    body = number_field(1, _HOP_STATUS)
    if expires_at_s:
        encoded = b"".join(data_field(2, raw) for raw in _encoded(addresses))
        body += data_field(3, number_field(1, expires_at_s) + encoded)
    if limit is not None:
        body += data_field(4, _limit(limit))
    return _delimited(body + number_field(5, status))


def parse_hop_status(body: bytes) -> RelayStatus:
    """A relay's answer. Raises RemoteProtocolError."""
    fields = Fields(body, MAX_FIELDS)
    if fields.number(1) != _HOP_STATUS:
        raise RemoteProtocolError("the relay did not answer with a status")
    reservation = fields.data(3)
    place = Fields(reservation or b"", MAX_FIELDS)
    # Some relays leave the status of a reservation out, which then is there or not.
    status = fields.number(5) or (OK if reservation is not None else RESERVATION_REFUSED)
    addresses = tuple(place.repeated(2)[:MAX_ADDRESSES])
    return RelayStatus(status, place.number(1) or 0, addresses, _parse_limit(fields.data(4)))


# --- stop: a relay and the target ------------------------------------------------------------------------------------


def encode_stop_connect(peer_id: PeerId, limit: Limit) -> bytes:
    """A stop Connect, length included."""
    body = number_field(1, _STOP_CONNECT) + data_field(2, data_field(1, peer_id_bytes(peer_id)))
    return _delimited(body + data_field(3, _limit(limit)))


def parse_stop_connect(body: bytes) -> Connect:
    """Who is at the other end of the circuit that a relay offers. Raises RemoteProtocolError."""
    fields = Fields(body, MAX_FIELDS)
    if (fields.number(1) or 0) != _STOP_CONNECT:
        raise RemoteProtocolError("the relay sent an answer where a request was due")
    return Connect(_peer(fields.data(2)), _parse_limit(fields.data(3)))


def encode_stop_status(status: Status) -> bytes:
    """A target's answer, length included."""
    return _delimited(number_field(1, _STOP_STATUS) + number_field(4, status))


def parse_stop_status(body: bytes) -> int:
    """A target's answer. Raises RemoteProtocolError."""
    fields = Fields(body, MAX_FIELDS)
    if fields.number(1) != _STOP_STATUS:
        raise RemoteProtocolError("the target of a circuit did not answer with a status")
    return fields.number(4) or 0


# --- parts -----------------------------------------------------------------------------------------------------------


def try_take(data: bytes) -> tuple[bytes, bytes] | None:
    """(body of the first message in ``data``, what follows it); None while it is not whole. Raises RemoteProtocolError."""
    head = data[:MAX_LENGTH_BYTES]
    if all(byte & 0x80 for byte in head) and len(head) < MAX_LENGTH_BYTES:
        return None
    length, start = read_uvarint(head, 0)
    if not 0 < length <= MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(
            f"the peer announced a message of {length} bytes; allowed are 1 to {MAX_MESSAGE_BYTES}"
        )
    if len(data) < start + length:
        return None
    return data[start : start + length], data[start + length :]


def _delimited(body: bytes) -> bytes:
    return uvarint(len(body)) + body


def _peer(data: bytes | None) -> PeerId:
    try:
        return peer_id_from_bytes(Fields(data or b"", MAX_FIELDS).data(1) or b"")
    except InvalidRequest as error:
        raise RemoteProtocolError(f"the peer named nobody to connect with: {error.message}") from None


def _limit(limit: Limit) -> bytes:
    told = number_field(1, limit.duration_s) + number_field(2, limit.data_bytes)
    return told + (number_field(_RATE, limit.rate_bytes_per_s) if limit.rate_bytes_per_s else b"")


def _parse_limit(data: bytes | None) -> Limit:
    fields = Fields(data or b"", MAX_FIELDS)
    return Limit(fields.number(1) or 0, fields.number(2) or 0, fields.number(_RATE) or 0)


def _encoded(addresses: Sequence[str]) -> list[bytes]:
    found: list[bytes] = []
    for address in addresses:
        try:
            found.append(encode_multiaddr(address))
        except InvalidRequest:
            continue
    return found[:MAX_ADDRESSES]
