"""/meshmax/status/1.0.0: heartbeats that carry signed statuses.

Each side of a connection opens one stream and sends a Beat every few seconds; the other answers each with an Echo of the
same nonce at once, from which the sender measures the round trip and learns that the peer lives. Both may carry statuses
(of the sender and of peers it knows) that the receiver does not have in that sequence yet. Statuses are signed by the
peer that they describe, so a relayed one is as good as a direct one. Not here: when to send what (core.peers).
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from meshmax.base.errors import ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import HEX64
from meshmax.base.model import Signed
from meshmax.base.names import MAX_NAME
from meshmax.base.status import MAX_ADDRESSES, MAX_GPUS, MAX_MODELS, MAX_PEER_NAME, Gpu, ModelPresence, PeerStatus
from meshmax.wire.frames import Codec
from meshmax.wire.signed import MAX_PAYLOAD_BYTES, STATUS_DOMAIN, canonical, verify

MAX_STATUSES: Final = 64  # in one message; more follow in the next beat
MAX_STATUS_BYTES: Final = 768 << 10  # of all payloads in one message, so that it fits a frame
MAX_NAMES: Final = 64  # names of one model
MAX_ALL_NAMES: Final = 4096  # names of all models; each is looked at whenever a name is resolved
MAX_CAPABILITIES: Final = 16  # of one model; engines know five
MAX_NUMBER: Final = (1 << 62) - 1  # counts, bytes and seconds; leaves sums room in 64 bits
MAX_RATE: Final = 1e9
MAX_CAPACITY: Final = 1 << 20  # answers at once; figures are divided by it
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


def fitted(status: PeerStatus) -> PeerStatus:
    """Our own ``status`` as peers take it: what breaks a bound is cut or left out.

    Facts of models come out of files that somebody else made; an odd one must not cost us every neighbour.
    """
    models, room = [], MAX_ALL_NAMES - min(len(status.models), MAX_MODELS)
    for model in status.models[:MAX_MODELS]:
        names = tuple(name for name in model.names if len(name) <= MAX_NAME)[: min(MAX_NAMES, room + 1)]
        room -= max(len(names) - 1, 0)
        models.append(_fitted_model(model, names))
    gpus = tuple(map(_fitted_gpu, status.gpus[:MAX_GPUS]))
    status = msgspec.structs.replace(
        status, name=_text(status.name)[:MAX_PEER_NAME], addresses=status.addresses[:MAX_ADDRESSES], gpus=gpus
    )
    status = msgspec.structs.replace(status, models=tuple(models))
    while status.models and len(canonical(status)) > MAX_PAYLOAD_BYTES:
        status = msgspec.structs.replace(status, models=status.models[: len(status.models) * 7 // 8])
    return status


def _fitted_model(model: ModelPresence, names: tuple[str, ...]) -> ModelPresence:
    return msgspec.structs.replace(
        model,
        names=names,
        size=_number(model.size),
        family=_text(model.family),
        parameter_size=_text(model.parameter_size),
        quantization_level=_text(model.quantization_level),
        context_length=_number(model.context_length),
        embedding_length=_number(model.embedding_length),
        capabilities=tuple(map(_text, model.capabilities[:MAX_CAPABILITIES])),
        modified_at_s=_number(model.modified_at_s),
        prefill_per_s=_rate(model.prefill_per_s),
        decode_per_s=_rate(model.decode_per_s),
        load_s=_rate(model.load_s),
    )


def _fitted_gpu(gpu: Gpu) -> Gpu:
    used, total = _number(gpu.memory_bytes), _number(gpu.memory_total_bytes)
    return Gpu(_text(gpu.name), used, total, _rate(gpu.utilization_percent))


def _text(text: str) -> str:
    return "".join(letter for letter in text[:MAX_TEXT] if letter.isprintable())


def _number(number: int) -> int:
    return min(max(number, 0), MAX_NUMBER)


def _rate(rate: float) -> float:
    return rate if 0.0 <= rate < MAX_RATE else 0.0  # also what is not a number


def _within_bounds(status: PeerStatus) -> bool:
    texts = [status.version, status.mesh, status.engine, *status.addresses, *(gpu.name for gpu in status.gpus)]
    numbers = [
        status.memory_bytes,
        status.memory_total_bytes,
        status.load.running,
        status.load.queued,
        status.issued_at_s,
    ]
    for gpu in status.gpus:
        numbers += [gpu.memory_bytes, gpu.memory_total_bytes]
    for model in status.models:
        texts += [model.family, model.parameter_size, model.quantization_level, *model.capabilities]
        numbers += [model.size, model.context_length, model.embedding_length, model.modified_at_s]
        if (
            not HEX64.fullmatch(model.digest)
            or len(model.names) > MAX_NAMES
            or len(model.capabilities) > MAX_CAPABILITIES
            or any(len(n) > MAX_NAME for n in model.names)
        ):
            return False
        if not all(0.0 <= rate < MAX_RATE for rate in (model.prefill_per_s, model.decode_per_s, model.load_s)):
            return False
    return (
        len(status.addresses) <= MAX_ADDRESSES
        and len(status.models) <= MAX_MODELS
        and sum(len(model.names) for model in status.models) <= MAX_ALL_NAMES
        and len(status.gpus) <= MAX_GPUS
        and len(status.name) <= MAX_PEER_NAME
        and status.name.isprintable()
        and all(len(text) <= MAX_TEXT and text.isprintable() for text in texts)
        and all(0 <= number <= MAX_NUMBER for number in numbers)
        and 0 <= status.sequence <= MAX_NUMBER
        and 1 <= status.load.capacity <= MAX_CAPACITY
        and all(math.isfinite(p) for p in (status.cpu_percent, *(gpu.utilization_percent for gpu in status.gpus)))
    )
