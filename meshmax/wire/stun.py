"""STUN binding requests and answers (RFC 8489), as a server that shares its port with other protocols speaks them.

Rules: a message is a header of 20 bytes and attributes; one with another cookie, a length that does not fit, a wrong
FINGERPRINT or over MAX_MESSAGE_BYTES is no message. A request needs no attribute; one that must be understood and is not gets
an error answer that names it (RFC 8489, 6.3.1). Answers carry XOR-MAPPED-ADDRESS, RESPONSE-ORIGIN and OTHER-ADDRESS where
they are given (RFC 5780), and FINGERPRINT where the request had it: an answer has at most MAX_ANSWER_BYTES, so that it is no
weapon against a spoofed address. Our own requests are padded to the length of what we answer to them. Credentials are not
checked: a binding is no secret. Over TCP messages follow each other; `message_length` says where one ends. Not here: who is
answered how often (services.stun_server), ICE.
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from typing import Final

import msgspec

from meshmax.base.errors import RemoteProtocolError

FIRST_BYTES: Final = range(4)  # of STUN on a shared port (RFC 7983)
HEADER_BYTES: Final = 20
TRANSACTION_BYTES: Final = 12
MAX_MESSAGE_BYTES: Final = 548  # what RFC 8489 (6.1) takes for the smallest path where nothing else is known
MAX_ANSWER_BYTES: Final = 100  # all attributes with IPv6 addresses; without the optional ones 32 to 52
MAX_UNKNOWN: Final = 8  # attributes that an error answer names; who sends more learns of the first ones

REQUEST: Final = 0x0001
SUCCESS: Final = 0x0101
ERROR: Final = 0x0111

_COOKIE: Final = 0x2112A442
_HEADER: Final = struct.Struct(">HHI12s")
_ATTRIBUTE: Final = struct.Struct(">HH")
_FINGERPRINT_XOR: Final = 0x5354554E
_XOR_MAPPED_ADDRESS, _ERROR_CODE, _UNKNOWN_ATTRIBUTES = 0x0020, 0x0009, 0x000A
_SOFTWARE, _FINGERPRINT, _RESPONSE_ORIGIN, _OTHER_ADDRESS = 0x8022, 0x8028, 0x802B, 0x802C
# Of those that must be understood: credentials and ICE's, which change nothing about what we answer.
_UNDERSTOOD: Final = frozenset((0x0001, 0x0006, 0x0008, 0x0014, 0x0015, 0x001C, 0x001D, 0x001E, 0x0024, 0x0025))
_OPTIONAL: Final = 0x8000

Address = tuple[str, int]  # (ip without zone, port)


class BindingRequest(msgspec.Struct, frozen=True):
    """``unknown``: attributes that had to be understood and are not; ``fingerprint``: it had one, and it was right."""

    transaction: bytes
    unknown: tuple[int, ...] = ()
    fingerprint: bool = False


class BindingAnswer(msgspec.Struct, frozen=True):
    """``mapped``: where the server saw us; None with ``error``, a STUN error code. ``other``: its second address (RFC 5780)."""

    transaction: bytes
    mapped: Address | None = None
    origin: Address | None = None
    other: Address | None = None
    error: int = 0


def message_length(header: bytes) -> int:
    """Bytes of the whole message that begins with these 20. Raises RemoteProtocolError where none does."""
    if len(header) < HEADER_BYTES:
        raise RemoteProtocolError("a STUN header is incomplete")
    kind, length, cookie, _ = _HEADER.unpack_from(header)
    if kind >> 14 or cookie != _COOKIE or length % 4 or HEADER_BYTES + length > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError("this is no STUN message")
    return int(HEADER_BYTES + length)


# --- requests --------------------------------------------------------------------------------------------------------


def padding(*, ipv6: bool) -> str:
    """The SOFTWARE of our requests, with which they are as long as their answers; it names no program."""
    return " " * (20 if ipv6 else 8)


def encode_request(transaction: bytes, *, fingerprint: bool = True, ipv6: bool = False) -> bytes:
    """A binding request, as long as its answer. ``transaction``: 12 random bytes; the fingerprint is due on ports that STUN
    shares. ``ipv6``: the answer will name such an address."""
    return _message(REQUEST, transaction, _attribute(_SOFTWARE, padding(ipv6=ipv6).encode()), fingerprint)


def parse_request(data: bytes) -> BindingRequest:
    """The binding request in ``data``. Raises RemoteProtocolError for everything else, other kinds of STUN included."""
    kind, transaction, attributes, fingerprint = _parsed(data)
    if kind != REQUEST:
        raise RemoteProtocolError("this is no binding request")
    unknown = (at for at, _ in attributes if at < _OPTIONAL and at not in _UNDERSTOOD)
    return BindingRequest(transaction, tuple(dict.fromkeys(unknown)), fingerprint)


# --- answers ---------------------------------------------------------------------------------------------------------


def encode_answer(
    request: BindingRequest, source: Address, *, origin: Address | None = None, other: Address | None = None
) -> bytes:
    """The answer to ``request``, which came from ``source``: success, or error 420 for attributes that are not understood."""
    if request.unknown:
        unknown = b"".join(struct.pack(">H", at) for at in request.unknown[:MAX_UNKNOWN])
        body = _attribute(_ERROR_CODE, bytes((0, 0, 4, 20))) + _attribute(_UNKNOWN_ATTRIBUTES, unknown)
        return _message(ERROR, request.transaction, body, request.fingerprint)
    body = _attribute(_XOR_MAPPED_ADDRESS, _packed(source, request.transaction))
    if origin is not None:
        body += _attribute(_RESPONSE_ORIGIN, _packed(origin))
    if other is not None:
        body += _attribute(_OTHER_ADDRESS, _packed(other))
    return _message(SUCCESS, request.transaction, body, request.fingerprint)


def parse_answer(data: bytes, transaction: bytes) -> BindingAnswer:
    """The answer to the request that had ``transaction``. Raises RemoteProtocolError for everything else."""
    kind, got, attributes, _ = _parsed(data)
    if kind not in (SUCCESS, ERROR) or got != transaction:
        raise RemoteProtocolError("this is no answer to our binding request")
    first = dict(reversed(attributes))  # of attributes that come twice the first one counts (RFC 8489, 14)
    if kind == ERROR:
        code = first.get(_ERROR_CODE, b"")
        return BindingAnswer(got, error=(code[2] & 7) * 100 + code[3] if len(code) >= 4 else 500)
    if _XOR_MAPPED_ADDRESS not in first:
        raise RemoteProtocolError("a binding answer names no address")
    return BindingAnswer(
        got,
        _address(first[_XOR_MAPPED_ADDRESS], got),
        _address(first[_RESPONSE_ORIGIN]) if _RESPONSE_ORIGIN in first else None,
        _address(first[_OTHER_ADDRESS]) if _OTHER_ADDRESS in first else None,
    )


# --- messages and attributes -----------------------------------------------------------------------------------------


def _message(kind: int, transaction: bytes, body: bytes, fingerprint: bool) -> bytes:
    length = len(body) + (8 if fingerprint else 0)
    message = _HEADER.pack(kind, length, _COOKIE, transaction) + body
    return message + _attribute(_FINGERPRINT, _fingerprint_of(message)) if fingerprint else message


def _parsed(data: bytes) -> tuple[int, bytes, list[tuple[int, bytes]], bool]:
    """Kind, transaction, attributes in order, and whether there was a (right) fingerprint."""
    if message_length(data) != len(data):
        raise RemoteProtocolError("a STUN message has not the length that it says")
    kind, _, _, transaction = _HEADER.unpack_from(data)
    attributes: list[tuple[int, bytes]] = []  # bounded by the message's length
    at = HEADER_BYTES
    while at < len(data):
        what, length = _ATTRIBUTE.unpack_from(data, at)
        value = data[at + 4 : at + 4 + length]
        end = at + 4 + -(-length // 4) * 4
        if end > len(data):
            raise RemoteProtocolError("a STUN attribute is longer than its message")
        if what == _FINGERPRINT:  # nothing after it counts (RFC 8489, 14.7)
            if end != len(data) or value != _fingerprint_of(data[:at]):
                raise RemoteProtocolError("a STUN message has a wrong fingerprint")
            return kind, transaction, attributes, True
        attributes.append((what, value))
        at = end
    return kind, transaction, attributes, False


def _attribute(what: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(what, len(value)) + value + b"\0" * (-len(value) % 4)


def _fingerprint_of(before: bytes) -> bytes:
    """Of a message whose header counts the fingerprint already, and everything before it."""
    return struct.pack(">I", zlib.crc32(before) ^ _FINGERPRINT_XOR)


def _packed(address: Address, transaction: bytes | None = None) -> bytes:
    """A MAPPED-ADDRESS's value; with ``transaction`` that of an XOR-MAPPED-ADDRESS. An IPv6 zone stays behind."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    value = struct.pack(">H", address[1]) + ip.packed
    return bytes((0, 1 if ip.version == 4 else 2)) + _xored(value, transaction)


def _address(value: bytes, transaction: bytes | None = None) -> Address:
    if (value[1:2], len(value)) not in ((b"\x01", 8), (b"\x02", 20)):
        raise RemoteProtocolError("a STUN answer holds an address of no known kind")
    plain = _xored(value[2:], transaction)
    return str(ipaddress.ip_address(plain[2:])), int.from_bytes(plain[:2], "big")


def _xored(value: bytes, transaction: bytes | None) -> bytes:
    if transaction is None:
        return value
    pad = struct.pack(">HI", _COOKIE >> 16, _COOKIE) + transaction
    return bytes(a ^ b for a, b in zip(value, pad, strict=False))
