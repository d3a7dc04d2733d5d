"""/meshmax/status/1.0.0: heartbeats that carry signed statuses, and what is worth asking for.

Each side of a connection opens one stream and sends a Beat every few seconds; the other answers each with an Echo of the
same nonce at once, from which the sender measures the round trip and learns that the peer lives. Both may carry: statuses,
signed by the peer that they describe, so that a relayed one is as good as a direct one; notices, which say without a body
whom the sender has for a neighbour and at which sequence that one's lasting facts changed, or that it is one no more (GONE);
wants, which ask for the bodies of such notices; vitals, what changes all the time about the sender itself; a parting word.
A message with nonce 0 begins afresh: what its sender's notices said before is void. Notices and wants name a peer by the
first KEY_BYTES of its public key. Not here: when to send what (core.gossip).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Literal

import msgspec

from meshmax.base.errors import ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import HEX64, PeerId, public_key_of
from meshmax.base.model import Signed
from meshmax.base.names import MAX_NAME
from meshmax.base.status import (
    MAX_ADDRESSES,
    MAX_DEMANDS,
    MAX_GPUS,
    MAX_MAPPED,
    MAX_MODELS,
    MAX_PEER_NAME,
    MAX_WAIT_S,
    MAX_WAITS,
    Gpu,
    ModelPresence,
    PeerStatus,
    Vitals,
)
from meshmax.wire.frames import Codec
from meshmax.wire.signed import MAX_PAYLOAD_BYTES, STATUS_DOMAIN, canonical, verify

MAX_STATUSES: Final = 64  # in one message; more follow in the next beat
MAX_STATUS_BYTES: Final = 768 << 10  # of all payloads in one message, so that it fits a frame
MAX_NAMES: Final = 64  # names of one model
MAX_ALL_NAMES: Final = 4096  # names of all models; each is looked at whenever a name is resolved
MAX_CAPABILITIES: Final = 16  # of one model; engines know five
MAX_NUMBER: Final = (1 << 62) - 1  # counts, bytes and seconds; leaves sums room in 64 bits
MAX_RATE: Final = 1e9
MAX_CONTEXT: Final = 1 << 31  # tokens; a thousand times what models are made for
MAX_CAPACITY: Final = 1 << 20  # answers at once; figures are divided by it
MAX_INSTANCE: Final = 32  # characters; ours are 16
MAX_NOTICES: Final = (
    1024  # in one message, 16 bytes each; as many as a peer could have neighbours, and as many that it lost
)
MAX_WANTS: Final = 64  # in one message; as many as it may be answered with
KEY_BYTES: Final = 8  # of a public key: enough to tell peers apart, and whoever forges a like one only confuses itself
GONE: Final = 0  # a notice's sequence of a peer that is the sender's neighbour no more
MAX_TEXT: Final = 200  # characters of any other text: a GPU's name, a family, an address


Parting = Literal["", "full"]  # full: the sender has too many neighbours and lets this one go; it lives

_NOTICE: Final = struct.Struct(f">{KEY_BYTES}sQ")


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Are you there? ``nonce`` counts up on the stream. ``notices`` and ``wants``: see `pack_notices`, `read_wants`."""

    nonce: int
    statuses: tuple[Signed, ...] = ()
    notices: bytes = b""
    wants: bytes = b""
    vitals: Vitals | None = None
    parting: Parting = ""


class Echo(msgspec.Struct, frozen=True, tag="echo"):
    """I am; the answer to the Beat with this ``nonce``."""

    nonce: int
    statuses: tuple[Signed, ...] = ()
    notices: bytes = b""
    wants: bytes = b""
    vitals: Vitals | None = None


BEAT: Final[Codec[Beat]] = Codec(Beat)
ECHO: Final[Codec[Echo]] = Codec(Echo)


def check_statuses(statuses: tuple[Signed, ...]) -> None:
    """Raises RemoteProtocolError if a message carries more than is allowed."""
    if len(statuses) > MAX_STATUSES or sum(len(signed.payload) for signed in statuses) > MAX_STATUS_BYTES:
        raise RemoteProtocolError(
            f"a heartbeat carries at most {MAX_STATUSES} statuses of {MAX_STATUS_BYTES} bytes in all"
        )


@lru_cache(maxsize=16384)
def key_of(peer_id: PeerId) -> bytes:
    """By what notices and wants name the peer. Raises InvalidRequest for what is no PeerId."""
    return public_key_of(peer_id)[:KEY_BYTES]


def pack_notices(notices: Iterable[tuple[bytes, int]]) -> bytes:
    """(key, sequence or GONE) one after the other, 16 bytes each, big-endian."""
    return b"".join(_NOTICE.pack(key, sequence) for key, sequence in notices)


def read_notices(packed: bytes) -> list[tuple[bytes, int]]:
    """What was packed. Raises RemoteProtocolError."""
    if len(packed) % _NOTICE.size or len(packed) > MAX_NOTICES * _NOTICE.size:
        raise RemoteProtocolError(f"a heartbeat carries at most {MAX_NOTICES} notices of {_NOTICE.size} bytes")
    return list(_NOTICE.iter_unpack(packed))


def read_wants(packed: bytes) -> list[bytes]:
    """The keys one after the other. Raises RemoteProtocolError."""
    if len(packed) % KEY_BYTES or len(packed) > MAX_WANTS * KEY_BYTES:
        raise RemoteProtocolError(f"a heartbeat carries at most {MAX_WANTS} wants of {KEY_BYTES} bytes")
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def check_vitals(vitals: Vitals) -> None:
    """Raises RemoteProtocolError if something is out of bounds."""
    told = PeerStatus(
        PeerId(""),
        vitals.sequence,
        vitals.issued_at_s,
        "",
        "",
        gpus=vitals.gpus,
        demand=vitals.demand,
        load=vitals.load,
        cpu_percent=vitals.cpu_percent,
        memory_bytes=vitals.memory_bytes,
        memory_total_bytes=vitals.memory_total_bytes,
        instance=vitals.instance,
    )
    if not _within_bounds(told):
        raise RemoteProtocolError("a peer's vitals hold a list, text or number that is out of bounds")


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
        loaded_context=min(_number(model.loaded_context), MAX_CONTEXT),
        embedding_length=_number(model.embedding_length),
        capabilities=tuple(map(_text, model.capabilities[:MAX_CAPABILITIES])),
        modified_at_s=_number(model.modified_at_s),
        prefill_per_s=_rate(model.prefill_per_s),
        decode_per_s=_rate(model.decode_per_s),
        load_s=_rate(model.load_s),
        engine=_text(model.engine),
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
    texts = [
        status.version,
        status.mesh,
        status.engine,
        status.instance,
        *status.addresses,
        *status.mapped,
        *(gpu.name for gpu in status.gpus),
    ]
    numbers = [
        status.memory_bytes,
        status.memory_total_bytes,
        status.load.running,
        status.load.queued,
        status.load.limit,
        status.issued_at_s,
    ]
    for gpu in status.gpus:
        numbers += [gpu.memory_bytes, gpu.memory_total_bytes]
    for wait in status.load.waits:
        numbers += [wait.free, wait.queued]
    for model in status.models:
        texts += [model.family, model.parameter_size, model.quantization_level, model.engine, *model.capabilities]
        numbers += [model.size, model.context_length, model.embedding_length, model.modified_at_s]
        if (
            not 0 <= model.loaded_context <= MAX_CONTEXT
            or not HEX64.fullmatch(model.digest)
            or len(model.names) > MAX_NAMES
            or len(model.capabilities) > MAX_CAPABILITIES
            or any(len(n) > MAX_NAME for n in model.names)
        ):
            return False
        if not all(0.0 <= rate < MAX_RATE for rate in (model.prefill_per_s, model.decode_per_s, model.load_s)):
            return False
    return (
        len(status.addresses) <= MAX_ADDRESSES
        and len(status.mapped) <= MAX_MAPPED
        and len(status.models) <= MAX_MODELS
        and sum(len(model.names) for model in status.models) <= MAX_ALL_NAMES
        and len(status.gpus) <= MAX_GPUS
        and len(status.demand) <= MAX_DEMANDS
        and all(HEX64.fullmatch(each.digest) and 0.0 <= each.per_min < MAX_RATE for each in status.demand)
        and len(status.name) <= MAX_PEER_NAME
        and status.name.isprintable()
        and all(len(text) <= MAX_TEXT and text.isprintable() for text in texts)
        and all(0 <= number <= MAX_NUMBER for number in numbers)
        and 0 <= status.sequence <= MAX_NUMBER
        and 0 <= status.changed <= status.sequence
        and len(status.instance) <= MAX_INSTANCE
        and 0 <= status.udp_port <= 65535
        and 1 <= status.load.capacity <= MAX_CAPACITY
        and len(status.load.waits) <= MAX_WAITS
        and all(HEX64.fullmatch(wait.digest) and 0.0 <= wait.wait_s <= MAX_WAIT_S for wait in status.load.waits)
        and all(math.isfinite(p) for p in (status.cpu_percent, *(gpu.utilization_percent for gpu in status.gpus)))
    )
