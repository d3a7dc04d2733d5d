"""A ticket's text: ``meshmax-`` and base32 (RFC 4648, no padding) of compact bytes with a checksum; at most 300 characters.

Rules: all in small or all in capital letters (QR codes hold capitals in half the room), blanks and line ends anywhere are
ignored; a text with one character changed, missing or too many is refused. What does not fit is left out: two addresses of
the issuer come first, then one relay, by which it is reached wherever it is, or a bootstrap node where it has no relay, then
further addresses, bootstrap nodes, relays. That node goes before the second address where both do not fit.
The mesh's name is cut to 32 bytes (the whole one comes with the certificate).

Bytes: version 1, root key 32, issuer's key 32, secret 16, scopes 1 (bits in the order of SCOPES), expiry 4 (Unix seconds,
big-endian), length and UTF-8 of the name, places, checksum 4 (BLAKE3 of all before it). A place: a byte of kind (4: ip4/tcp,
6: ip6/tcp, 0: text with a length before it; plus 0x80 for a bootstrap node, 0x40 for a relay at which the issuer has a place,
one may be both), address, port, and of such a node its key of 32 bytes.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Iterable
from typing import Final

from blake3 import blake3

from meshmax.base.errors import InvalidRequest, LocalProtocolError
from meshmax.base.ids import PeerId, peer_id_of, public_key_of
from meshmax.base.membership import MAX_TICKET_ADDRESSES, SCOPES, MeshId, Ticket
from meshmax.wire.membership import SECRET_BYTES, ordered

PREFIX: Final = "meshmax-"
MAX_TICKET_TEXT: Final = 300  # characters; a QR code of 57 by 57 dots
MAX_PASTED: Final = 2000  # characters that are looked at, blanks included
MAX_NAME_BYTES: Final = 32
MAX_PLACE_TEXT: Final = 100  # bytes of an address that is neither ip4/tcp nor ip6/tcp

_VERSION: Final = 1
_CHECKSUM_BYTES: Final = 4
_CHECKSUM_CONTEXT: Final = b"meshmax/ticket/1\n"
_KEY_BYTES: Final = 32
_FIXED_BYTES: Final = 1 + 2 * _KEY_BYTES + SECRET_BYTES + 1 + 4
_MAX_BYTES: Final = (MAX_TICKET_TEXT - len(PREFIX)) * 5 // 8
_TEXT, _IP4, _IP6, _BOOTSTRAP, _RELAY = 0, 4, 6, 0x80, 0x40
_P2P: Final = "/p2p/"
_CIRCUIT: Final = "/p2p-circuit"
_FIRST: Final = 2  # addresses of the issuer that come before its relay

_INCOMPLETE: Final = "the ticket is incomplete or was changed on its way: copy it whole, from 'meshmax-' to its end"


class _Reader:
    """Takes bytes from the front; what is missing raises InvalidRequest."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def take(self, count: int) -> bytes:
        if len(self.left) < count:
            raise InvalidRequest(_INCOMPLETE)
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def text(self) -> str:
        try:
            text = self.take(self.number(1)).decode()
        except UnicodeDecodeError:
            raise InvalidRequest(_INCOMPLETE) from None
        if not text.isprintable():
            raise InvalidRequest(_INCOMPLETE)
        return text


def ticket_text(ticket: Ticket) -> str:
    """``ticket`` as people pass it on. Raises LocalProtocolError if its keys, secret or expiry cannot be written."""
    try:
        keys = public_key_of(PeerId(ticket.mesh)) + public_key_of(ticket.issuer)
        expiry = ticket.expires_at_s.to_bytes(4, "big")
    except (InvalidRequest, OverflowError):
        raise LocalProtocolError("a ticket needs a mesh, an issuer and an expiry before the year 2106") from None
    if len(ticket.secret) != SECRET_BYTES:
        raise LocalProtocolError(f"a ticket's secret has {SECRET_BYTES} bytes")
    scopes = sum(1 << SCOPES.index(scope) for scope in ordered(ticket.scopes))
    name = _cut(ticket.mesh_name)
    data = bytes([_VERSION]) + keys + ticket.secret + bytes([scopes]) + expiry + bytes([len(name)]) + name
    for place in _places(ticket, _MAX_BYTES - _CHECKSUM_BYTES - len(data)):
        if len(data) + len(place) + _CHECKSUM_BYTES <= _MAX_BYTES:
            data += place
    return PREFIX + base64.b32encode(data + _checksum(data)).decode().rstrip("=").lower()


def parse_ticket(text: str) -> Ticket:
    """The ticket that ``text`` writes. Raises InvalidRequest with a sentence; which part was wrong is not told by position."""
    if len(text) > MAX_PASTED:
        raise InvalidRequest(f"a ticket has at most {MAX_TICKET_TEXT} characters: this is something else")
    compact = "".join(text.split())
    if not compact:
        raise InvalidRequest("a ticket is needed: `meshmax ticket` at a member of the mesh makes one")
    if not compact.lower().startswith(PREFIX):
        raise InvalidRequest(f"a ticket begins with '{PREFIX}': `meshmax ticket` at a member of the mesh makes one")
    reader = _Reader(_checked(compact))
    if reader.number(1) != _VERSION:
        raise InvalidRequest("the ticket is of another version of meshmax: update this one, or the one that made it")
    mesh, issuer = MeshId(peer_id_of(reader.take(_KEY_BYTES))), peer_id_of(reader.take(_KEY_BYTES))
    secret, bits, expires_at_s = reader.take(SECRET_BYTES), reader.number(1), reader.number(4)
    scopes = tuple(scope for index, scope in enumerate(SCOPES) if bits >> index & 1)
    name = reader.text()
    addresses: list[str] = []
    bootstrap: list[str] = []
    while reader.left:
        flags, place = _read_place(reader)
        if flags & _RELAY or not flags:
            addresses.append(place + _CIRCUIT if flags else place)
        if flags & _BOOTSTRAP:
            bootstrap.append(place)
    if not scopes or bits >> len(SCOPES) or max(len(addresses), len(bootstrap)) > MAX_TICKET_ADDRESSES:
        raise InvalidRequest("the ticket is of a newer version of meshmax: update this one")
    return Ticket(mesh, name, issuer, secret, scopes, expires_at_s, tuple(addresses), tuple(bootstrap))


def _checked(compact: str) -> bytes:
    """The bytes before the checksum."""
    if compact not in (compact.lower(), compact.upper()) or not compact.isascii():
        raise InvalidRequest(_INCOMPLETE)
    body = compact[len(PREFIX) :].upper()
    try:
        data = base64.b32decode(body + "=" * (-len(body) % 8))
    except ValueError:
        raise InvalidRequest(_INCOMPLETE) from None
    # The last character may carry bits that no byte takes: they are zero in what we write.
    if base64.b32encode(data).decode().rstrip("=") != body or len(data) > _MAX_BYTES:
        raise InvalidRequest(_INCOMPLETE)
    payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(payload) < _FIXED_BYTES + 1 or checksum != _checksum(payload):
        raise InvalidRequest(_INCOMPLETE)
    return payload


def _checksum(data: bytes) -> bytes:
    return blake3(_CHECKSUM_CONTEXT + data).digest(_CHECKSUM_BYTES)


def _cut(name: str) -> bytes:
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore").encode()


def _places(ticket: Ticket, room: int) -> list[bytes]:
    """Those that can be written, in the order in which they are left out last. ``room``: bytes for all."""
    suffix = _P2P + ticket.issuer
    own = [address.removesuffix(suffix) for address in ticket.addresses][:MAX_TICKET_ADDRESSES]
    direct = [(0, address) for address in own if _P2P not in address]
    nodes = [address for address in ticket.bootstrap if _P2P in address][:MAX_TICKET_ADDRESSES]
    over = [address.removesuffix(_CIRCUIT) for address in own if _P2P in address and address.endswith(_CIRCUIT)]
    relays = [(_RELAY | (_BOOTSTRAP if address in nodes else 0), address) for address in over]
    rest = [(_BOOTSTRAP, address) for address in nodes if address not in over]
    far = (relays or rest)[:1]  # without either nobody outside the issuer's network finds it
    front = _written([*direct[:_FIRST], *far])
    if sum(map(len, front)) > room:
        front = _written([*direct[:1], *far, *direct[1:_FIRST]])
    return list(dict.fromkeys((*front, *_written([*direct[_FIRST:], *rest, *relays[1:]]))))


def _written(places: Iterable[tuple[int, str]]) -> list[bytes]:
    return [place for flags, address in places if (place := _try_place(flags, address)) is not None]


def _try_place(flag: int, address: str) -> bytes | None:
    bare, _, peer = address.partition(_P2P)
    try:
        key = public_key_of(PeerId(peer)) if flag else b""
    except InvalidRequest:
        return None
    match bare.split("/"):
        case ["", "ip4" | "ip6" as kind, ip, "tcp", port] if port.isascii() and port.isdigit() and int(port) < 1 << 16:
            try:
                packed = ipaddress.IPv4Address(ip).packed if kind == "ip4" else ipaddress.IPv6Address(ip).packed
            except ValueError:
                return None
            return bytes([flag | (_IP4 if kind == "ip4" else _IP6)]) + packed + int(port).to_bytes(2, "big") + key
    text = bare.encode()
    if not 0 < len(text) <= MAX_PLACE_TEXT or not bare.isprintable():
        return None
    return bytes([flag | _TEXT, len(text)]) + text + key


def _read_place(reader: _Reader) -> tuple[int, str]:
    """What sort of node it is (0: the issuer), and its address."""
    kind = reader.number(1)
    flags, kind = kind & (_BOOTSTRAP | _RELAY), kind & ~(_BOOTSTRAP | _RELAY)
    if kind == _IP4:
        bare = f"/ip4/{ipaddress.IPv4Address(reader.take(4))}/tcp/{reader.number(2)}"
    elif kind == _IP6:
        bare = f"/ip6/{ipaddress.IPv6Address(reader.take(16))}/tcp/{reader.number(2)}"
    elif kind == _TEXT:
        bare = reader.text()
    else:
        raise InvalidRequest("the ticket is of a newer version of meshmax: update this one")
    return flags, bare + _P2P + peer_id_of(reader.take(_KEY_BYTES)) if flags else bare
