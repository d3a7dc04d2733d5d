"""/meshmax/status/1.0.0: heartbeats that carry signed statuses.

Each side of a connection opens one stream and sends a Beat every few seconds; the other answers each with an Echo of the
same nonce at once, from which the sender measures the round trip and learns that the peer lives. Both may carry statuses
(of the sender and of peers it knows) that the receiver does not have in that sequence yet. Statuses are signed by the
peer that they describe, so a relayed one is as good as a direct one. Not here: when to send what (core.peers).
"""

from __future__ import annotations

from typing import Final

import msgspec

from meshmax.base.errors import ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import HEX64
from meshmax.base.model import Signed
from meshmax.base.names import MAX_NAME
from meshmax.base.status import MAX_ADDRESSES, MAX_GPUS, MAX_MODELS, MAX_PEER_NAME, PeerStatus
from meshmax.wire.frames import Codec
from meshmax.wire.signed import STATUS_DOMAIN, verify

MAX_STATUSES: Final = 64  # in one message; more follow in the next beat
MAX_STATUS_BYTES: Final = 768 << 10  # of all payloads in one message, so that it fits a frame
MAX_NAMES: Final = 64  # names of one model
MAX_TEXT: Final = 200  # characters of any other text: a GPU's name, a family, an address


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Are you there? ``nonce`` counts up on the stream."""

    nonce: int
    statuses: tuple[Signed, ...] = ()


class Echo(msgspec.Struct, frozen=True, tag="echo"):
    """I am; the answer to the Beat with this ``nonce``."""

    nonce: int
    statuses: tuple[Signed, ...] = ()


BEAT: Final[Codec[Beat]] = Codec(Beat)
ECHO: Final[Codec[Echo]] = Codec(Echo)


def check_statuses(statuses: tuple[Signed, ...]) -> None:
    """Raises RemoteProtocolError if a message carries more than is allowed."""
    if len(statuses) > MAX_STATUSES or sum(len(signed.payload) for signed in statuses) > MAX_STATUS_BYTES:
        raise RemoteProtocolError(
            f"a heartbeat carries at most {MAX_STATUSES} statuses of {MAX_STATUS_BYTES} bytes in all"
        )


def read_status(signed: Signed) -> PeerStatus:
    """The status inside, signed by the peer it describes and within every bound. Raises ManifestInvalid."""
    status = verify(STATUS_DOMAIN, signed, PeerStatus)
    if status.peer_id != signed.signer:
        raise ManifestInvalid("a status is not signed by the peer that it describes")
    if not _within_bounds(status):
        raise ManifestInvalid("a status holds a list, text or number that is out of bounds")
    return status


def _within_bounds(status: PeerStatus) -> bool:
    texts = [status.version, status.mesh, status.engine, *status.addresses, *(gpu.name for gpu in status.gpus)]
    numbers = [
        status.memory_bytes,
        status.memory_total_bytes,
        status.load.running,
        status.load.queued,
        status.issued_at_s,
    ]
    for model in status.models:
        texts += [model.family, model.parameter_size, model.quantization_level, *model.capabilities]
        numbers += [model.size, model.context_length, model.embedding_length, model.modified_at_s]
        if (
            not HEX64.fullmatch(model.digest)
            or len(model.names) > MAX_NAMES
            or len(model.capabilities) > 16
            or any(len(n) > MAX_NAME for n in model.names)
        ):
            return False
        if not all(0.0 <= rate < 1e9 for rate in (model.prefill_per_s, model.decode_per_s, model.load_s)):
            return False
    return (
        len(status.addresses) <= MAX_ADDRESSES
        and len(status.models) <= MAX_MODELS
        and len(status.gpus) <= MAX_GPUS
        and len(status.name) <= MAX_PEER_NAME
        and status.name.isprintable()
        and all(len(text) <= MAX_TEXT and text.isprintable() for text in texts)
        and all(0 <= number < 1 << 62 for number in numbers)
        and 0 <= status.sequence < 1 << 62
        and status.load.capacity >= 1
    )
