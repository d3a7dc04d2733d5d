"""Multiaddrs between text and bytes, for the few components of which our addresses are made.

Codes and forms: multiformats, multiaddr protocol table. An address with any other component cannot be dialled by us and has no
text here; of whatever comes from outside it is left out. Not here: what may be dialled (net.dialler), what the text of an
address must be for a person (net.addresses).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import base58

from meshmax.base.errors import InvalidRequest, RemoteProtocolError
from meshmax.base.ids import PeerId, parse_peer_id, peer_id_of, public_key_of
from meshmax.wire.protobuf import read_uvarint, uvarint

MAX_ADDRESS_BYTES: Final = 512  # a DNS name has at most 253, two PeerIds with a circuit between them 80
MAX_COMPONENTS: Final = 8  # a relayed address with a zone has seven

_TEXT_CODES: Final = {"ip6zone": 42, "dns": 53, "dns4": 54, "dns6": 55}
_TEXT_NAMES: Final = {code: name for name, code in _TEXT_CODES.items()}
_IP4, _TCP, _IP6, _P2P, _CIRCUIT = 4, 6, 41, 421, 290
_WORD: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")  # a DNS name or the name of an interface


def encode_multiaddr(text: str) -> bytes:
    """``text`` in bytes. Raises InvalidRequest where a component is unknown or malformed."""
    parts = text.split("/")
    if parts[0] or len(parts) < 3 or len(text) > MAX_ADDRESS_BYTES:
        raise InvalidRequest(f"'{text[:100]}' is not a multiaddr")
    out, at = b"", 1
    while at < len(parts):
        if parts[at] == "p2p-circuit":
            out, at = out + uvarint(_CIRCUIT), at + 1
            continue
        if at + 1 == len(parts):
            raise InvalidRequest(f"'{text[:100]}' is not a multiaddr: '{parts[at][:20]}' lacks its value")
        try:
            out += _encode_component(parts[at], parts[at + 1])
        except ValueError:
            raise InvalidRequest(f"'{text[:100]}' is not a multiaddr: '{parts[at + 1][:60]}' is not valid") from None
        at += 2
    return out


def _encode_component(name: str, value: str) -> bytes:
    match name:
        case "ip4":
            return uvarint(_IP4) + ipaddress.IPv4Address(value).packed
        case "ip6":
            return uvarint(_IP6) + ipaddress.IPv6Address(value).packed
        case "tcp":
            if not (value.isascii() and value.isdigit() and len(value) <= 5 and int(value) <= 0xFFFF):
                raise ValueError
            return uvarint(_TCP) + int(value).to_bytes(2, "big")
        case "p2p":
            raw = base58.b58decode(parse_peer_id(value))
            return uvarint(_P2P) + uvarint(len(raw)) + raw
        case "dns" | "dns4" | "dns6" | "ip6zone":
            if not _WORD.fullmatch(value):
                raise ValueError
            return uvarint(_TEXT_CODES[name]) + uvarint(len(value)) + value.encode()
        case _:
            raise InvalidRequest(f"addresses with '{name[:20]}' are not spoken here")


def try_decode_multiaddr(data: bytes) -> str | None:
    """The text of ``data``, or None where a component is not one of ours, malformed, or too many are there."""
    if not 0 < len(data) <= MAX_ADDRESS_BYTES:
        return None
    text, at = "", 0
    try:
        for _ in range(MAX_COMPONENTS):
            if at == len(data):
                return text
            component, at = _decode_component(data, at)
            text += component
    except (RemoteProtocolError, InvalidRequest, ValueError):
        return None
    return text if at == len(data) else None


def _decode_component(data: bytes, at: int) -> tuple[str, int]:
    code, at = read_uvarint(data, at)
    if code == _CIRCUIT:
        return "/p2p-circuit", at
    fixed = {_IP4: 4, _IP6: 16, _TCP: 2}.get(code)
    length, at = (fixed, at) if fixed is not None else read_uvarint(data, at)
    value = data[at : at + length]
    if len(value) != length:
        raise ValueError("cut short")
    return _component_text(code, value), at + length


def _component_text(code: int, value: bytes) -> str:
    match code:
        case 4:
            return f"/ip4/{ipaddress.IPv4Address(value)}"
        case 41:
            return f"/ip6/{ipaddress.IPv6Address(value)}"
        case 6:
            return f"/tcp/{int.from_bytes(value, 'big')}"
        case 421:
            return f"/p2p/{peer_id_from_bytes(value)}"
    word = value.decode("ascii")
    if code not in _TEXT_NAMES or not _WORD.fullmatch(word):
        raise ValueError("not a component of ours")
    return f"/{_TEXT_NAMES[code]}/{word}"


def peer_id_bytes(peer_id: PeerId) -> bytes:
    """The multihash of ``peer_id`` (libp2p specs, peer-ids). Raises InvalidRequest."""
    public_key_of(peer_id)
    return base58.b58decode(peer_id)


def peer_id_from_bytes(data: bytes) -> PeerId:
    """The PeerId of a multihash. Raises InvalidRequest where it is not that of an Ed25519 key."""
    if len(data) != 38:
        raise InvalidRequest("not the PeerId of an Ed25519 key")
    return peer_id_of(public_key_of(PeerId(base58.b58encode(data).decode())))
