"""Identifiers: who (PeerId) and what (Sha256, MapAddress), as checked strings.

A PeerId is the base58 text of a libp2p Ed25519 peer id (``12D3KooW...``), from which the public key can be read
(libp2p specs, peer-ids: keys of up to 42 bytes are inlined with the identity multihash). A Sha256 is 64 lower-case hex
digits without prefix and names a blob or, of a manifest's bytes, a model. A MapAddress is the BLAKE3 of a chunk map's
encoding, 64 lower-case hex digits.
"""

from __future__ import annotations

import re
from typing import Final, NewType

import base58

from meshmax.base.errors import InvalidRequest

PeerId = NewType("PeerId", str)
Sha256 = NewType("Sha256", str)
MapAddress = NewType("MapAddress", str)

HEX64: Final = re.compile(r"[0-9a-f]{64}")
# identity multihash (0x00), 36 bytes; protobuf PublicKey: Type (1) = Ed25519 (1), Data (2) of 32 bytes
_ED25519_PREFIX: Final = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
_PEER_ID_MAX: Final = 64  # characters; an Ed25519 PeerId has 52


def parse_sha256(text: str) -> Sha256:
    """The digest in ``sha256:HEX``, ``sha256-HEX`` or plain ``HEX``. Raises InvalidRequest."""
    hex_part = text[7:] if text.startswith(("sha256:", "sha256-")) else text
    if not HEX64.fullmatch(hex_part):
        raise InvalidRequest("invalid digest format: a digest is sha256: and 64 hexadecimal digits")
    return Sha256(hex_part)


def parse_map_address(text: str) -> MapAddress:
    """The address of a chunk map. Raises InvalidRequest."""
    if not HEX64.fullmatch(text):
        raise InvalidRequest("invalid chunk map address: it has 64 hexadecimal digits")
    return MapAddress(text)


def peer_id_of(public_key: bytes) -> PeerId:
    """The PeerId of a raw 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise InvalidRequest("an Ed25519 public key has 32 bytes")
    return PeerId(base58.b58encode(_ED25519_PREFIX + public_key).decode())


def public_key_of(peer_id: PeerId) -> bytes:
    """The raw 32-byte Ed25519 public key inside ``peer_id``. Raises InvalidRequest for any other kind of id."""
    try:
        raw = base58.b58decode(peer_id) if len(peer_id) <= _PEER_ID_MAX else b""
    except ValueError:
        raw = b""
    if len(raw) != len(_ED25519_PREFIX) + 32 or not raw.startswith(_ED25519_PREFIX):
        raise InvalidRequest("not a PeerId: it begins with 12D3KooW and has 52 characters")
    return raw[len(_ED25519_PREFIX) :]


def parse_peer_id(text: str) -> PeerId:
    """``text`` as a PeerId, checked. Raises InvalidRequest."""
    public_key_of(PeerId(text))
    return PeerId(text)
