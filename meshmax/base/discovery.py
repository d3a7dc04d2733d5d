"""The ladder of discovery as people see it: what each rung does, found and suffers from.

Not here: the rungs (net, services), their supervision (services.ladder), the doctor's findings (base.doctor).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId

RungName = Literal["cached", "mdns", "static", "rendezvous", "dht"]
BOOTSTRAP_OUTSIDE: Final = (
    "bootstrap nodes outside this LAN are used by private meshes only: meshmax mesh new, or meshmax join"
)
REFUSED_ADDRESS: Final = (
    "does not connect to that address"  # in what the dialler says of addresses that our mesh does not use
)
RungState = Literal["working", "failing", "off"]


class RungReport(msgspec.Struct, frozen=True):
    """One rung now. ``problem`` is a sentence for people, '' when all is well; ``found`` peers named since the start.

    ``first_found_s``: seconds from the rung's start to its first sighting; None while there was none.
    """

    name: str
    state: RungState
    problem: str = ""
    found: int = 0
    first_found_s: float | None = None
    restarts: int = 0


class SeenBy(msgspec.Struct, frozen=True):
    """A rung named a peer at these multiaddrs, ``ago_s`` seconds ago."""

    rung: str
    addresses: tuple[str, ...]
    ago_s: float


class KnownPeer(msgspec.Struct, frozen=True):
    """A peer that we were connected with in ``mesh`` ('' the open one), and where it may be found. Unix seconds."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    last_seen_s: float
    mesh: str = ""
