"""What a peer says of itself, and how a neighbour stands to us.

A PeerStatus is advertised by its peer, signed, newest (``sequence``) wins. Figures in it only seed our own measurements
(design: routing). Every list is bounded by a constant here; the wire refuses longer ones. Not here: the table of peers
(core.peers), our measurements (core.routing).
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256

MAX_ADDRESSES: Final = 16  # a host with that many interfaces is still reached by the first ones
MAX_MODELS: Final = 1024  # models a peer lists; 1024 of ~150 bytes stay well inside one frame
MAX_GPUS: Final = 32
MAX_MAPPED: Final = 4  # a router has one address outside, rarely two
MAX_DEMANDS: Final = 16  # models a peer says are asked for; what is asked for less needs no preloading
MAX_PEER_NAME: Final = 64  # characters
MAX_WAITS: Final = 16  # models whose waits a peer tells; no more are in memory at once
MAX_WAIT_S: Final = 3600.0  # of a wait that is told; longer is as bad
NO_ENGINE: Final = "none"

ModelState = Literal["disk", "loaded", "partial"]
Device = Literal["gpu", "cpu"]
PeerState = Literal["self", "online", "draining", "offline"]
Path = Literal["self", "direct", "mapped", "punched-tcp", "punched-udp", "relay"]


class Gpu(msgspec.Struct, frozen=True):
    """A GPU that the engine can use. ``memory_bytes`` is in use; 0 where the driver does not tell."""

    name: str
    memory_bytes: int = 0
    memory_total_bytes: int = 0
    utilization_percent: float = 0.0


class ModelPresence(msgspec.Struct, frozen=True):
    """A model on a peer. ``names`` are full names; ``size`` bytes; ``device`` is where the engine runs or would run it.

    ``capabilities`` and ``details`` are what a neighbour needs to list and show the model without asking.
    ``prefill_per_s`` and ``decode_per_s`` are tokens a second, ``load_s`` seconds: measured by that peer, 0 if never.
    ``engine``: what runs it there, '' for the peer's own engine. ``served``: that engine brings the model along, so it runs
    there and cannot be fetched from there (`is_copy`). ``context_length``: tokens that it was trained for; ``loaded_context``:
    tokens with which that peer's own engine has it in memory, 0 where it does not say.
    """

    digest: Sha256
    names: tuple[str, ...]
    state: ModelState
    size: int
    device: Device = "cpu"
    family: str = ""
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: int = 0
    embedding_length: int = 0
    capabilities: tuple[str, ...] = ()
    modified_at_s: int = 0
    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    load_s: float = 0.0
    engine: str = ""
    served: bool = False
    loaded_context: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether the peer holds the whole model and can give it: what pulls, leases, replicas and sweeps count."""
        return self.state != "partial" and not self.served


class Wait(msgspec.Struct, frozen=True):
    """How long one who comes now is expected to wait for a slot of a loaded model, in seconds, by the peer's word.

    ``free``: its slots that are free (then nobody waits); ``queued``: how many wait for it.
    """

    digest: Sha256
    wait_s: float = 0.0
    free: int = 0
    queued: int = 0


class Load(msgspec.Struct, frozen=True):
    """Prompts on a peer now; ``capacity`` is how many it answers at once, ``limit`` how many may wait (0: it does not say).

    ``waits``: of models that are loaded there, those that are waited for most first; of others it tells nothing.
    """

    running: int = 0
    queued: int = 0
    capacity: int = 1
    limit: int = 0
    waits: tuple[Wait, ...] = ()


class Speed(msgspec.Struct, frozen=True):
    """A model's measured speed on a peer: tokens a second of prompt and of answer, seconds of a load; 0 if never measured."""

    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    load_s: float = 0.0


class Demand(msgspec.Struct, frozen=True):
    """A model that is asked for by way of a peer's own API: ``per_min`` prompts a minute of late."""

    digest: Sha256
    per_min: float


class PeerStatus(msgspec.Struct, frozen=True):
    """One peer's word about itself. ``sequence`` grows with each issue, over restarts too; ``mesh`` is '' in an open mesh.

    ``engine`` names what runs models there; a peer with NO_ENGINE stores and routes only. ``instance`` is drawn at each start:
    one PeerId with two of them at once is a copied identity. ``changed`` is the sequence of the issue at which lasting facts
    last changed (`lasting`); what changes all the time (`Vitals`) is told beside it. ``leaving``: the last word before the end.
    ``udp_port`` takes datagrams of the DHT, 0 if there is none: it may be another one than the control port's number.
    ``relay``: it relays for members of its mesh. ``mapped``: multiaddrs, without /p2p, at which its router says to forward to
    its control port: no addresses of its interfaces. ``demand``: the models asked for most by its own users.
    """

    peer_id: PeerId
    sequence: int
    issued_at_s: int
    name: str
    version: str
    mesh: str = ""
    engine: str = ""
    addresses: tuple[str, ...] = ()
    models: tuple[ModelPresence, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    load: Load = Load()
    cpu_percent: float = 0.0
    memory_bytes: int = 0
    memory_total_bytes: int = 0
    draining: bool = False
    instance: str = ""
    changed: int = 0
    leaving: bool = False
    udp_port: int = 0
    relay: bool = False
    mapped: tuple[str, ...] = ()
    demand: tuple[Demand, ...] = ()


class Vitals(msgspec.Struct, frozen=True):
    """What changes all the time, told by a peer of itself on its own connection, so unsigned; fields as in PeerStatus.

    ``sequence`` is drawn as for a status, so that the newer one of the two counts.
    """

    instance: str
    sequence: int
    issued_at_s: int
    load: Load = Load()
    cpu_percent: float = 0.0
    memory_bytes: int = 0
    memory_total_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    demand: tuple[Demand, ...] = ()


def lasting(status: PeerStatus) -> tuple[object, ...]:
    """The facts of a status that are worth its being signed and spread anew; speeds count by powers of two."""
    models = tuple(
        (
            model.digest,
            model.names,
            model.state,
            model.device,
            _power(model.decode_per_s),
            _power(model.prefill_per_s),
            model.engine,
            model.served,
            model.loaded_context,
        )
        for model in status.models
    )
    gpus = tuple((gpu.name, gpu.memory_total_bytes) for gpu in status.gpus)
    told = (status.addresses, status.mapped, status.udp_port, status.relay)
    facts = (status.name, status.version, status.mesh, status.engine, *told)
    return (*facts, status.load.capacity, status.draining, status.instance, status.leaving, models, gpus)


def vitals_of(status: PeerStatus) -> Vitals:
    """What of ``status`` changes all the time."""
    return Vitals(
        status.instance,
        status.sequence,
        status.issued_at_s,
        status.load,
        status.cpu_percent,
        status.memory_bytes,
        status.memory_total_bytes,
        status.gpus,
        status.demand,
    )


def with_vitals(status: PeerStatus, vitals: Vitals) -> PeerStatus:
    """``status`` with what changed since."""
    return msgspec.structs.replace(
        status,
        sequence=vitals.sequence,
        issued_at_s=vitals.issued_at_s,
        load=vitals.load,
        cpu_percent=vitals.cpu_percent,
        memory_bytes=vitals.memory_bytes,
        memory_total_bytes=vitals.memory_total_bytes,
        gpus=vitals.gpus,
        demand=vitals.demand,
    )


def cold(status: PeerStatus) -> PeerStatus:
    """``status`` without what a restart ends: what runs and waits there, and what is in memory."""
    load = Load(capacity=status.load.capacity, limit=status.load.limit)
    models = tuple(
        msgspec.structs.replace(model, state="disk", loaded_context=0) if model.state == "loaded" else model
        for model in status.models
    )
    return msgspec.structs.replace(status, load=load, models=models)


def _power(rate: float) -> int:
    return math.frexp(rate)[1]


class PeerView(msgspec.Struct, frozen=True):
    """A peer as this node sees it now. ``rtt_s`` is our own measurement; ``last_seen_s`` Unix time."""

    peer_id: PeerId
    state: PeerState
    path: Path
    status: PeerStatus | None
    address: str = ""
    rtt_s: float | None = None
    last_seen_s: float = 0.0
