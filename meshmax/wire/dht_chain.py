"""A member's certificates in a datagram: as compact as they can be, since a datagram has little room.

Of each certificate: signature 64, issuer's public key 32, length 2, payload. Two certificates (a member's, and its admitter's)
take some 600 bytes; MAX_CHAIN_BYTES of wire.dht holds three. Not here: what certificates mean (wire.membership).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import peer_id_of, public_key_of
from meshmax.base.membership import MAX_CHAIN, Chain
from meshmax.base.model import Signed

_FRONT: Final = 64 + 32 + 2


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
