"""Messages of ``/meshmax/lease/1.0.0``: keep your copy of a model for a moment, and prove that you have it.

Who is about to drop a model says LeaseAsk; the holder answers Leased or a Failure, and the stream ends. The proof is the
BLAKE3, keyed with the asker's fresh nonce, of the bytes of the chunks that the asker chose: only who has them can make it,
and the asker, who has them too, checks it. Decided here: bounds, what is proved. Not here: who grants (core.lease).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import msgspec
from blake3 import blake3

from meshmax.base.ids import Sha256
from meshmax.base.units import KIB
from meshmax.wire.blob import Index
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec
from meshmax.wire.model import Hex64

NONCE_BYTES: Final = 32  # a BLAKE3 key
PROOF_BYTES: Final = 32
MAX_PROBES: Final = 8  # chunks: 8 MiB read and hashed by the holder, some milliseconds
MAX_LEASE_S: Final = 3600.0
_MAX_BODY_BYTES: Final = 4 * KIB  # eight probes of 90 bytes; a Failure has up to 2,000


class Probe(msgspec.Struct, frozen=True, array_like=True):
    """Chunk ``index`` of ``blob``, one of the model's."""

    blob: Hex64
    index: Index


class LeaseAsk(msgspec.Struct, frozen=True, tag="ask"):
    """Asker: I am about to drop the model whose manifest has this ``digest``; keep yours."""

    digest: Hex64
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    probes: Annotated[tuple[Probe, ...], msgspec.Meta(max_length=MAX_PROBES)]


class Leased(msgspec.Struct, frozen=True, tag="leased"):
    """Holder: my copy is whole, and I shall not drop it for so many ``seconds`` from now on."""

    seconds: Annotated[float, msgspec.Meta(gt=0, le=MAX_LEASE_S)]
    proof: Annotated[bytes, msgspec.Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]


FromAsker: TypeAlias = LeaseAsk
FromHolder: TypeAlias = Leased | Failure

FROM_ASKER: Final[Codec[FromAsker]] = Codec(FromAsker, _MAX_BODY_BYTES)
FROM_HOLDER: Final[Codec[FromHolder]] = Codec(FromHolder, _MAX_BODY_BYTES)


def proof_of(nonce: bytes, digest: Sha256, chunks: Sequence[bytes]) -> bytes:
    """What proves that one has ``chunks``, in the order of the probes."""
    hasher = blake3(digest.encode(), key=nonce)
    for chunk in chunks:
        hasher.update(len(chunk).to_bytes(4, "big"))
        hasher.update(chunk)
    return hasher.digest()
