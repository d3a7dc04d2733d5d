"""libp2p's rendezvous protocol (libp2p specs, rendezvous r3): its messages, and the namespace of a mesh.

Each message is a protobuf behind its length as a varint. A registration carries a signed peer record (wire.peer_record); the
form before the specification's third revision, a bare peer id with addresses, is still what some stacks write, and is read
so that they can register, but never believed by our client. Every limit of the protocol is here. Not here: who may register what
(core.registrations), when a client asks (core.rendezvous).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
from blake3 import blake3

from meshmax.base.errors import InvalidRequest, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.wire.multiaddr import peer_id_from_bytes
from meshmax.wire.peer_record import MAX_FOREIGN_ADDRESSES, MAX_RECORD_BYTES, decoded_addresses
from meshmax.wire.protobuf import Fields, data_field, number_field, uvarint

MAX_NAMESPACE_BYTES: Final = 255  # of the specification
MIN_TTL_S: Final = 2 * 3600  # likewise, as the next two
DEFAULT_TTL_S: Final = 2 * 3600
MAX_TTL_S: Final = 72 * 3600
MAX_COOKIE_BYTES: Final = 256  # of any server; ours have 24, those of others hold a namespace
MAX_PAGE: Final = 100  # registrations in one answer of ours
MAX_PAGE_BYTES: Final = 192 << 10  # of their records, so that an answer fits a stream's first window
MAX_REQUEST_BYTES: Final = 4096  # a registration: a record, a namespace and a few numbers
MAX_RESPONSE_BYTES: Final = 1 << 20  # that a client reads; other servers give up to 1000 registrations
MAX_REGISTRATIONS_READ: Final = 1000  # in one answer; the specification's largest page
MAX_STATUS_TEXT: Final = 200  # characters

OK: Final = 0
E_INVALID_NAMESPACE: Final = 100
E_INVALID_SIGNED_PEER_RECORD: Final = 101
E_INVALID_TTL: Final = 102
E_INVALID_COOKIE: Final = 103
E_NOT_AUTHORIZED: Final = 200
E_INTERNAL_ERROR: Final = 300
E_UNAVAILABLE: Final = 400

_REGISTER, _REGISTER_RESPONSE, _UNREGISTER, _DISCOVER, _DISCOVER_RESPONSE = range(5)
_MOST_FIELDS: Final = 16  # of a message without lists; the largest has six
_OPEN_NAMESPACE: Final = "meshmax/open"
_NAMESPACE_CONTEXT: Final = "meshmax 2026-11 rendezvous namespace of a mesh"


def namespace_of(mesh: MeshId) -> str:
    """Where members of ``mesh`` register: a keyed hash of its id, so that the namespace does not tell the id."""
    if mesh == OPEN_MESH:
        return _OPEN_NAMESPACE
    return "meshmax/" + str(blake3(mesh.encode(), derive_key_context=_NAMESPACE_CONTEXT).hexdigest())


class Register(msgspec.Struct, frozen=True):
    """``record``: the envelope of a signed peer record. ``ttl_s`` None leaves it to the server, in answers it is what is left."""

    namespace: str
    record: bytes
    ttl_s: int | None = None


class RegisterResponse(msgspec.Struct, frozen=True):
    """``ttl_s``: what was granted."""

    status: int
    text: str = ""
    ttl_s: int = 0


class Unregister(msgspec.Struct, frozen=True):
    """Who sends it leaves the namespace. It has no answer.

    ``peer``: the sender's PeerId in bytes, which earlier stacks want to be told; whom the connection proves counts.
    """

    namespace: str
    peer: bytes = b""


class Discover(msgspec.Struct, frozen=True):
    """Who is in ``namespace``? '' asks for all of them. ``cookie``: only what came after the answer that gave it."""

    namespace: str
    limit: int | None = None
    cookie: bytes = b""


class DiscoverResponse(msgspec.Struct, frozen=True):
    """``cookie`` asks for what comes after this."""

    registrations: tuple[Register, ...] = ()
    cookie: bytes = b""
    status: int = OK
    text: str = ""


Message = Register | RegisterResponse | Unregister | Discover | DiscoverResponse


def encode(message: Message) -> bytes:
    """``message`` with its length before it."""
    body = _body(message)
    return uvarint(len(body)) + body


def _body(message: Message) -> bytes:
    match message:
        case Register():
            return number_field(1, _REGISTER) + data_field(2, _register(message))
        case RegisterResponse(status, text, ttl_s):
            parts = number_field(1, status) + _text(2, text) + (number_field(3, ttl_s) if ttl_s else b"")
            return number_field(1, _REGISTER_RESPONSE) + data_field(3, parts)
        case Unregister(namespace, peer):
            parts = data_field(1, namespace.encode()) + (data_field(2, peer) if peer else b"")
            return number_field(1, _UNREGISTER) + data_field(4, parts)
        case Discover(namespace, limit, cookie):
            parts = _text(1, namespace)
            parts += number_field(2, limit) if limit is not None else b""
            parts += data_field(3, cookie) if cookie else b""
            return number_field(1, _DISCOVER) + data_field(5, parts)
        case DiscoverResponse(registrations, cookie, status, text):
            parts = b"".join(data_field(1, _register(registration)) for registration in registrations)
            parts += data_field(2, cookie) + number_field(3, status) + _text(4, text)
            return number_field(1, _DISCOVER_RESPONSE) + data_field(6, parts)


def _register(message: Register) -> bytes:
    ttl = number_field(3, message.ttl_s) if message.ttl_s is not None else b""
    return data_field(1, message.namespace.encode()) + data_field(2, message.record) + ttl


def _text(number: int, text: str) -> bytes:
    return data_field(number, text.encode()) if text else b""


def decode(body: bytes) -> Message:
    """The message in ``body``, which has no length before it. Raises RemoteProtocolError.

    A namespace is '' where it is not given, and cut to one byte more than is allowed where it is longer.
    """
    outer = Fields(body, _MOST_FIELDS)
    kind = outer.number(1) or 0
    if kind > _DISCOVER_RESPONSE:
        raise RemoteProtocolError(f"the peer sent a rendezvous message of the unknown type {kind}")
    data = outer.data(kind + 2)
    if data is None:
        raise RemoteProtocolError("the peer sent a rendezvous message without its content")
    if kind == _DISCOVER_RESPONSE:
        return _decode_discovered(Fields(data, _MOST_FIELDS + MAX_REGISTRATIONS_READ))
    if kind == _REGISTER:
        return _decode_register(data)
    fields = Fields(data, _MOST_FIELDS)
    if kind == _REGISTER_RESPONSE:
        return RegisterResponse(fields.number(1) or 0, _shown(fields.data(2)), fields.number(3) or 0)
    if kind == _UNREGISTER:
        return Unregister(_namespace(fields))
    return Discover(_namespace(fields), fields.number(2), _cookie(fields.data(3)))


def _decode_register(data: bytes) -> Register:
    fields = Fields(data, _MOST_FIELDS)
    record = fields.data(2) or b""
    if len(record) > MAX_RECORD_BYTES:
        record = b""  # taken by nobody, so it need not be kept
    return Register(_namespace(fields), record, fields.number(3))


def _decode_discovered(fields: Fields) -> DiscoverResponse:
    registrations = fields.repeated(1)
    if len(registrations) > MAX_REGISTRATIONS_READ:
        raise RemoteProtocolError(f"the peer sent more than {MAX_REGISTRATIONS_READ} registrations at once")
    found = tuple(_decode_register(data) for data in registrations)
    return DiscoverResponse(found, _cookie(fields.data(2)), fields.number(3) or 0, _shown(fields.data(4)))


def _namespace(fields: Fields) -> str:
    data = (fields.data(1) or b"")[: MAX_NAMESPACE_BYTES + 1]
    return data.decode("utf-8", "replace")


def _cookie(data: bytes | None) -> bytes:
    if data and len(data) > MAX_COOKIE_BYTES:
        raise RemoteProtocolError(f"the peer sent a cookie of more than {MAX_COOKIE_BYTES} bytes")
    return data or b""


def _shown(data: bytes | None) -> str:
    text = (data or b"")[: 4 * MAX_STATUS_TEXT].decode("utf-8", "replace")[:MAX_STATUS_TEXT]
    return "".join(char if char.isprintable() else " " for char in text)


def encode_peer_info(peer_id: bytes, addresses: Iterable[bytes]) -> bytes:
    """The unsigned form of earlier stacks, in the place of a record."""
    return data_field(1, peer_id) + b"".join(data_field(2, address) for address in addresses)


def try_read_peer_info(record: bytes) -> tuple[PeerId, tuple[str, ...]] | None:
    """The peer that an unsigned registration of an earlier stack names, with those addresses that we can write; else None."""
    try:
        fields = Fields(record, _MOST_FIELDS + MAX_FOREIGN_ADDRESSES)
        peer_id = peer_id_from_bytes(fields.data(1) or b"")
    except (RemoteProtocolError, InvalidRequest):
        return None
    return peer_id, decoded_addresses(fields.repeated(2), peer_id)
