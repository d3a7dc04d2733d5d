"""Provider records: who has what, and where to reach it, as peers announce it in the DHT.

A key is 32 bytes: the keyed hash of a kind and a word (a model's digest, a full name, a PeerId), so that a private mesh's
words mean nothing to others. A record is signed by the provider that it names (`Signed` under its own domain). Not here:
bytes (wire.dht), how they are spread and found (net.dht*), when they are announced (core.announce).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId

KEY_BYTES: Final = 32
MAX_RECORD_ADDRESSES: Final = 8
MAX_RECORD_BYTES: Final = 720  # of a signed record: eight long addresses; about three usual ones fit a datagram
MAX_PROVIDERS: Final = 64  # records that one key keeps at a node, and that one look-up returns

KeyKind = Literal["model", "name", "peer", "mesh"]


class ProviderRecord(msgspec.Struct, frozen=True):
    """``peer_id`` provides ``key`` and is reached at ``addresses`` (multiaddrs); Unix seconds; the highest ``sequence`` wins.

    No addresses and an ``expires_at_s`` of now withdraw it.
    """

    key: bytes
    peer_id: PeerId
    sequence: int
    issued_at_s: int
    expires_at_s: int
    addresses: tuple[str, ...] = ()
