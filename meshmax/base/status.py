"""What a peer says of itself, and how a neighbour stands to us.

A PeerStatus is advertised by its peer, signed, newest (``sequence``) wins. Figures in it only seed our own measurements
(design: routing). Every list is bounded by a constant here; the wire refuses longer ones. Not here: the table of peers
(core.peers), our measurements (core.routing).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256

MAX_ADDRESSES: Final = 16  # a host with that many interfaces is still reached by the first ones
MAX_MODELS: Final = 1024  # models a peer lists; 1024 of ~150 bytes stay well inside one frame
MAX_GPUS: Final = 32
MAX_PEER_NAME: Final = 64  # characters
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


class Load(msgspec.Struct, frozen=True):
    """Prompts on a peer now; ``capacity`` is how many it answers at once."""

    running: int = 0
    queued: int = 0
    capacity: int = 1


class Speed(msgspec.Struct, frozen=True):
    """A model's measured speed on a peer: tokens a second of prompt and of answer, seconds of a load; 0 if never measured."""

    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    load_s: float = 0.0


class PeerStatus(msgspec.Struct, frozen=True):
    """One peer's word about itself. ``sequence`` grows with each issue, over restarts too; ``mesh`` is '' in an open mesh.

    ``engine`` names what runs models there; a peer with NO_ENGINE stores and routes only.
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


class PeerView(msgspec.Struct, frozen=True):
    """A peer as this node sees it now. ``rtt_s`` is our own measurement; ``last_seen_s`` Unix time."""

    peer_id: PeerId
    state: PeerState
    path: Path
    status: PeerStatus | None
    address: str = ""
    rtt_s: float | None = None
    last_seen_s: float = 0.0
