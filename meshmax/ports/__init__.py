"""The Protocols between services and the world, and between faces and services: three to six methods each.

Adapters (net, store, engine) and fakes (testing) satisfy the first group and are held to one contract suite per port
(tests/contracts). Services satisfy the second group; meshmax.node joins them. An async method may be cancelled at any await
and then leaves nothing half done that a later call cannot see. Errors are those of base.errors only.
"""

from __future__ import annotations

from meshmax.ports.common import Progress, RunSync, Signer, Throttle
from meshmax.ports.dht import Dht
from meshmax.ports.engine import Backend, Engine, LoadedFacts, LoadedModel
from meshmax.ports.lanes import (
    ExpectedLane,
    FetchLane,
    LaneArrived,
    LaneBad,
    LaneBusy,
    LaneCancelled,
    LaneDial,
    LaneEvent,
    LaneLacking,
    Lanes,
    LaneStoreFailed,
    Pace,
    ServeLane,
    at_once,
)
from meshmax.ports.net import (
    Admission,
    ByteStream,
    Connections,
    ConnectionView,
    CountsStreams,
    Datagrams,
    Discovery,
    HearsPeers,
    LooksAgain,
    Network,
    PromisesProtocols,
    ProvesPeers,
    Sighting,
    Stream,
    Swarm,
    SwarmEvent,
)
from meshmax.ports.probes import Arrival, ProbePort, Probes
from meshmax.ports.services import Answer, Catalog, Distribution, Presence, Pulls, Residency, Router
from meshmax.ports.store import BlobStore, ChunkReader, ChunkSource, ChunkWriter, ModelStore, Naming, Partial
from meshmax.ports.traversal import ChannelEnd, Channels, PortMapper, Puncher, PunchPort, Relays, Signals

__all__ = [
    "Admission",
    "Answer",
    "Arrival",
    "Backend",
    "BlobStore",
    "ByteStream",
    "Catalog",
    "ChannelEnd",
    "Channels",
    "ChunkReader",
    "ChunkSource",
    "ChunkWriter",
    "ConnectionView",
    "Connections",
    "CountsStreams",
    "Datagrams",
    "Dht",
    "Discovery",
    "Distribution",
    "Engine",
    "ExpectedLane",
    "FetchLane",
    "HearsPeers",
    "LaneArrived",
    "LaneBad",
    "LaneBusy",
    "LaneCancelled",
    "LaneDial",
    "LaneEvent",
    "LaneLacking",
    "LaneStoreFailed",
    "Lanes",
    "LoadedFacts",
    "LoadedModel",
    "LooksAgain",
    "ModelStore",
    "Naming",
    "Network",
    "Pace",
    "Partial",
    "PortMapper",
    "Presence",
    "ProbePort",
    "Probes",
    "Progress",
    "PromisesProtocols",
    "ProvesPeers",
    "Pulls",
    "PunchPort",
    "Puncher",
    "Relays",
    "Residency",
    "Router",
    "RunSync",
    "ServeLane",
    "Sighting",
    "Signals",
    "Signer",
    "Stream",
    "Swarm",
    "SwarmEvent",
    "Throttle",
    "at_once",
]
