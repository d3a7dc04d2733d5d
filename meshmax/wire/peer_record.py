"""Signed peer records: a peer's addresses under its own signature, as every libp2p stack writes them.

libp2p specs, RFC 0002 (signed envelopes) and RFC 0003 (peer routing records): the envelope holds the public key, the type of
the payload and the signature over domain, type and payload, each with its length before it; the payload names the PeerId, a
sequence (the highest wins) and the addresses. Only Ed25519 keys are taken. Addresses that we cannot write are left out. Not
here: how records travel (wire.rendezvous).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshmax.base.errors import InvalidRequest, ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import PeerId, peer_id_of, public_key_of
from meshmax.base.status import MAX_ADDRESSES
from meshmax.wire.multiaddr import encode_multiaddr, peer_id_bytes, peer_id_from_bytes, try_decode_multiaddr
from meshmax.wire.protobuf import Fields, data_field, number_field, uvarint

MAX_RECORD_BYTES: Final = 2048  # of an envelope; 16 addresses with IPv6, a name or a relay in them need under 1.5 KB
MAX_FOREIGN_ADDRESSES: Final = 64  # in a record of another stack, which has addresses that are not for us

_DOMAIN: Final = b"libp2p-peer-record"
_PAYLOAD_TYPE: Final = b"\x03\x01"
_KEY_HEAD: Final = bytes([0x08, 0x01, 0x12, 0x20])  # protobuf PublicKey: Type (1) = Ed25519 (1), Data (2) of 32 bytes
_MOST_FIELDS: Final = 8  # of an envelope; it has four


class PeerRecord(msgspec.Struct, frozen=True):
    """``peer_id`` is at ``addresses`` (multiaddrs without /p2p of its own, at most MAX_ADDRESSES)."""

    peer_id: PeerId
    sequence: int
    addresses: tuple[str, ...]


def seal_record(
    peer_id: PeerId, sequence: int, addresses: Iterable[str], sign_bytes: Callable[[bytes], bytes]
) -> bytes:
    """The envelope of a record of ``peer_id``, whose key ``sign_bytes`` uses; its own /p2p at an address's end is cut off.

    Addresses that have no bytes, and those beyond MAX_ADDRESSES, are left out.
    """
    payload = data_field(1, peer_id_bytes(peer_id)) + number_field(2, sequence)
    for address in _encoded(addresses, peer_id)[:MAX_ADDRESSES]:
        payload += data_field(3, data_field(1, address))
    return b"".join(
        (
            data_field(1, _KEY_HEAD + public_key_of(peer_id)),
            data_field(2, _PAYLOAD_TYPE),
            data_field(3, payload),
            data_field(5, sign_bytes(_signed_bytes(payload))),
        )
    )


def open_record(envelope: bytes) -> PeerRecord:
    """The record in ``envelope``, signed by the peer that it names. Raises ManifestInvalid."""
    try:
        return _open(envelope)
    except (RemoteProtocolError, InvalidRequest, InvalidSignature, ValueError):
        raise ManifestInvalid("a peer record is not valid, or not signed by the peer that it names") from None


def _open(envelope: bytes) -> PeerRecord:
    if len(envelope) > MAX_RECORD_BYTES:
        raise ValueError("too large")
    outer = Fields(envelope, _MOST_FIELDS)
    key, payload, signature = outer.data(1) or b"", outer.data(3) or b"", outer.data(5) or b""
    if outer.data(2) != _PAYLOAD_TYPE or not key.startswith(_KEY_HEAD) or len(key) != len(_KEY_HEAD) + 32:
        raise ValueError("another payload, or another kind of key")
    public_key = key[len(_KEY_HEAD) :]
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _signed_bytes(payload))
    inner = Fields(payload, _MOST_FIELDS + MAX_FOREIGN_ADDRESSES)
    peer_id = peer_id_from_bytes(inner.data(1) or b"")
    if peer_id != peer_id_of(public_key):
        raise ValueError("a record of somebody else")
    found = (Fields(part, 1).data(1) or b"" for part in inner.repeated(3))
    return PeerRecord(peer_id, inner.number(2) or 0, decoded_addresses(found, peer_id))


def decoded_addresses(addresses: Iterable[bytes], peer_id: PeerId) -> tuple[str, ...]:
    """The texts of those that we can write, without a last /p2p of ``peer_id``, at most MAX_ADDRESSES, none twice."""
    found = (try_decode_multiaddr(address) for address in addresses)
    texts = dict.fromkeys(text.removesuffix(f"/p2p/{peer_id}") for text in found if text)
    return tuple(text for text in texts if text)[:MAX_ADDRESSES]


def _encoded(addresses: Iterable[str], peer_id: PeerId) -> list[bytes]:
    found: dict[bytes, None] = {}
    for address in addresses:
        try:
            found[encode_multiaddr(address.removesuffix(f"/p2p/{peer_id}"))] = None
        except InvalidRequest:
            continue
    return list(found)


def _signed_bytes(payload: bytes) -> bytes:
    return b"".join(uvarint(len(part)) + part for part in (_DOMAIN, _PAYLOAD_TYPE, payload))
