"""Blob lanes: the words that open one (``/meshmax/lane/1.0.0``), and its keys.

The fetcher says LaneAsk inside the control connection, the server answers LaneGrant or a Failure. From both secrets and
the lane's id come two keys by HKDF-SHA256 (RFC 5869), one for each direction; both PeerIds and the cipher go into them, so
that who agreed on something else has other keys. Decided here: bounds, which cipher, keys. Not here: frames
(wire.lane_frames), sockets (net.lanes), randomness.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import PeerId
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
KEY_BYTES: Final = {AES_128_GCM: 16, CHACHA20_POLY1305: 32}
_DOMAIN: Final = b"meshmax lane 1"

_Secret = Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
_LaneId = Annotated[bytes, msgspec.Meta(min_length=LANE_ID_BYTES, max_length=LANE_ID_BYTES)]
_Cipher = Annotated[str, msgspec.Meta(min_length=1, max_length=32)]


class LaneAsk(msgspec.Struct, frozen=True, tag="ask"):
    """Fetcher: open a lane. ``ciphers`` are those it can use, the one it likes best first."""

    secret: _Secret
    ciphers: Annotated[tuple[_Cipher, ...], msgspec.Meta(min_length=1, max_length=MAX_CIPHERS)]


class LaneGrant(msgspec.Struct, frozen=True, tag="grant", omit_defaults=True):
    """Server: come to TCP ``port`` of the address of this connection and prove the key of lane ``lane_id``, once.

    ``external_port``: come there instead from outside the server's NAT, whose router maps it; 0: nothing is mapped.
    """

    lane_id: _LaneId
    secret: _Secret
    cipher: _Cipher
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    external_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


FromFetcher: TypeAlias = LaneAsk
FromServer: TypeAlias = LaneGrant | Failure

FROM_FETCHER: Final[Codec[FromFetcher]] = Codec(FromFetcher, _MAX_NEGOTIATION_BYTES)
FROM_SERVER: Final[Codec[FromServer]] = Codec(FromServer, _MAX_NEGOTIATION_BYTES)


class LaneKeys(msgspec.Struct, frozen=True):
    """The keys of one lane, one a direction, for ``cipher``."""

    cipher: str
    to_server: bytes
    to_fetcher: bytes

    def __repr__(self) -> str:
        return f"LaneKeys({self.cipher})"  # keys stay out of logs and tracebacks


def choose_cipher(ask: LaneAsk, ours: tuple[str, ...]) -> str:
    """The cipher for a lane: AES-128-GCM if both ends like it best, else ChaCha20-Poly1305, fast enough without AES
    instructions. Raises RemoteProtocolError if no cipher is known to both."""
    common = [cipher for cipher in ours if cipher in ask.ciphers and cipher in KEY_BYTES]
    if not common:
        raise RemoteProtocolError(f"no cipher in common: the peer offers {', '.join(ask.ciphers)[:200]}")
    if common[0] == ask.ciphers[0] or CHACHA20_POLY1305 not in common:
        return common[0]
    return CHACHA20_POLY1305


def derive_keys(ask: LaneAsk, grant: LaneGrant, fetcher: PeerId, server: PeerId) -> LaneKeys:
    """The keys that ``ask`` and ``grant`` agree on. Raises RemoteProtocolError if the cipher was not asked for."""
    if grant.cipher not in ask.ciphers or grant.cipher not in KEY_BYTES:
        raise RemoteProtocolError(f"the peer chose a cipher that was not offered: {grant.cipher}")
    return LaneKeys(grant.cipher, *(_key(ask, grant, fetcher, server, way) for way in (b"to server", b"to fetcher")))


def _key(ask: LaneAsk, grant: LaneGrant, fetcher: PeerId, server: PeerId, way: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # No part holds a zero byte (base58, names of ours), so the parts cannot be read in another way.
    context = b"\0".join((_DOMAIN, grant.cipher.encode(), fetcher.encode(), server.encode(), way))
    length = KEY_BYTES[grant.cipher]
    return HKDF(algorithm=SHA256(), length=length, salt=grant.lane_id, info=context).derive(ask.secret + grant.secret)
