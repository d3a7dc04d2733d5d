"""Which relays a node may use, and its places at them (services.relay_client), joined to the rest of it.

Rules. Bootstrap nodes come first, which are there for that, then neighbours that say so. Who is reached from outside needs no
place; it still dials others over relays. Not here: what is relayed for others (node.serving).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from meshmax.base.ids import PeerId
from meshmax.base.status import PeerStatus
from meshmax.core.reservations import RelayPlace
from meshmax.node.bootstrapping import bootstrap_places
from meshmax.services.relay_client import RelayClient, open_relay_client

if TYPE_CHECKING:
    from meshmax.node.running import Node

MAX_MEMBER_RELAYS: Final = 8  # neighbours that may be asked for a place; two places are held
_CIRCUIT: Final = "/p2p-circuit"


@asynccontextmanager
async def open_relaying(node: Node) -> AsyncIterator[RelayClient]:
    """The relay client of a node, until the block ends."""
    opened = open_relay_client(
        node.swarm,
        lambda: _places(node),
        lambda: node.traversal.wanted,
        node.world.unix_now,
        node.world.random,
        lambda peer_id: _circuits_of(node, peer_id),
        lambda peer_id: node.membership.standing.knows(peer_id),  # noqa: PLW0108  the standing changes with the mesh
    )
    async with opened as client:
        node.network.watch(client.look_again)
        node.traversal.watch(client.look_again)
        client.watch(node.traversal.changed)
        yield client


def status_of(node: Node, peer_id: PeerId) -> PeerStatus | None:
    """What a peer says of itself; None where nothing is known, or it is too early to know anybody."""
    presence = getattr(node, "presence", None)  # opened later: peers may come to us before
    view = presence.view(peer_id) if presence is not None else None
    return view.status if view else None


def _places(node: Node) -> Sequence[RelayPlace]:
    if node.traversal.reached:
        return ()
    found = [RelayPlace(peer_id, addresses) for peer_id, addresses in bootstrap_places(node).items()]
    willing = []
    for peer_id, connection in node.swarm.connections().items():
        status = status_of(node, peer_id)
        if (
            status is not None
            and status.relay
            and connection.path in ("direct", "mapped")
            and connection.direction == "out"
        ):
            willing.append(RelayPlace(peer_id, (connection.address,), member=True))
    return [*found, *willing[:MAX_MEMBER_RELAYS]]


def _circuits_of(node: Node, peer_id: PeerId) -> Sequence[str]:
    status = status_of(node, peer_id)
    return [text for text in status.addresses if _CIRCUIT in text] if status else ()
