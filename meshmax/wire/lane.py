"""Blob lanes: the words that open one (``/meshmax/lane/1.0.0``), its keys, and its sealed frames.

The fetcher says LaneAsk inside the control connection, the server answers LaneGrant or a Failure. From the two secrets and
the lane's id come four keys (HKDF-SHA256): one to prove each end's first frame, one for each direction's frames. A frame is
its length (4 bytes, big-endian, authenticated) and an AEAD ciphertext of a 48-byte header and a body; the nonce is the
number of the frame in its direction, so one that is changed, repeated, moved or left out does not open. Decided here:
layout, bounds, keys. Not here: sockets (net.lane), randomness, chunk hashes (wire.chunkmap).
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, TypeAlias

import msgspec

from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec

LANE_ID_BYTES: Final = 16
SECRET_BYTES: Final = 32
MAX_CIPHERS: Final = 8  # in an ask; this version knows two
MAX_WANTS: Final = 256  # unanswered wants a lane: 256 MiB under way, and few enough for any socket buffer to take
_MAX_NEGOTIATION_BYTES: Final = 4 * KIB  # a body; an ask or a grant has about 120 bytes, a Failure up to 2,000

AES_128_GCM: Final = "aes-128-gcm"
CHACHA20_POLY1305: Final = "chacha20-poly1305"
CIPHERS: Final = (AES_128_GCM, CHACHA20_POLY1305)

_Secret = Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
_LaneId = Annotated[bytes, msgspec.Meta(min_length=LANE_ID_BYTES, max_length=LANE_ID_BYTES)]
_Cipher = Annotated[str, msgspec.Meta(min_length=1, max_length=32)]


class LaneAsk(msgspec.Struct, frozen=True, tag="ask"):
    """Fetcher: open a lane. ``ciphers`` are those it can use, the one it likes best first."""

    secret: _Secret
    ciphers: Annotated[tuple[_Cipher, ...], msgspec.Meta(min_length=1, max_length=MAX_CIPHERS)]


class LaneGrant(msgspec.Struct, frozen=True, tag="grant"):
    """Server: come to TCP ``port`` of the address of this connection and prove the key of lane ``lane_id``, once."""

    lane_id: _LaneId
    secret: _Secret
    cipher: _Cipher
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


FromFetcher: TypeAlias = LaneAsk
FromServer: TypeAlias = LaneGrant | Failure

FROM_FETCHER: Final[Codec[FromFetcher]] = Codec(FromFetcher, _MAX_NEGOTIATION_BYTES)
FROM_SERVER: Final[Codec[FromServer]] = Codec(FromServer, _MAX_NEGOTIATION_BYTES)
