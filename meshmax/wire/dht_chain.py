"""A member's certificates in a datagram: as compact as they can be, since a datagram has little room.

Of each certificate: signature 64, issuer's public key 32, length 2, payload. Two certificates (a member's, and its admitter's)
take some 600 bytes; MAX_CHAIN_BYTES of wire.dht holds three. They name the mesh, and datagrams are read by whoever is on the way
and by bootstrap nodes: so they travel sealed under a key made of the mesh's id, for those who know that anyway. Not here: what
certificates mean (wire.membership).
"""

from __future__ import annotations

from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import peer_id_of, public_key_of
from meshmax.base.membership import MAX_CHAIN, Chain, MeshId
from meshmax.base.model import Signed

_FRONT: Final = 64 + 32 + 2
_NONCE_BYTES: Final = 12
_CONTEXT: Final = "meshmax 2026 dht certificates"


def seal_chain(mesh: MeshId, chain: Chain) -> bytes:
    """``chain`` for those who know the id of ``mesh``: nonce 12, ChaCha20-Poly1305 of its bytes. The nonce is made of these, so
    that no two contents have the same one."""
    if not chain:
        return b""
    key, data = _key_of(mesh), encode_chain(chain)
    nonce: bytes = blake3(data, key=key).digest(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, None)


def open_chain(mesh: MeshId, sealed: bytes) -> Chain:
    """What `seal_chain` was given, unchecked. Raises RemoteProtocolError: of another mesh, or damaged."""
    try:
        data = ChaCha20Poly1305(_key_of(mesh)).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
    except (InvalidTag, ValueError):
        raise RemoteProtocolError("certificates in a DHT message are of another mesh") from None
    return decode_chain(data)


def _key_of(mesh: MeshId) -> bytes:
    key: bytes = blake3(mesh.encode(), derive_key_context=_CONTEXT).digest(32)
    return key


def encode_chain(chain: Chain) -> bytes:
    """The bytes of ``chain``; how many depends on it, the caller sees whether they fit."""
    return b"".join(
        signed.signature + public_key_of(signed.signer) + len(signed.payload).to_bytes(2, "big") + signed.payload
        for signed in chain
    )


def decode_chain(data: bytes) -> Chain:
    """The certificates, none of them checked yet. Raises RemoteProtocolError."""
    chain: list[Signed] = []
    while data:
        length = int.from_bytes(data[_FRONT - 2 : _FRONT], "big")
        if len(data) < _FRONT + length or len(chain) == MAX_CHAIN:
            raise RemoteProtocolError("certificates in a DHT message are cut off, or too many")
        chain.append(Signed(peer_id_of(data[64:96]), data[_FRONT : _FRONT + length], data[:64]))
        data = data[_FRONT + length :]
    return tuple(chain)
