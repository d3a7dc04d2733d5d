"""How a node is in its mesh, and what follows when the mesh changes. Not here: how one joins (services.membership)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from meshmax.base.ids import PeerId
from meshmax.base.membership import Ticket
from meshmax.core.catalog import FirstSeen
from meshmax.core.reachability import scope_of
from meshmax.core.rendezvous import bootstrap_nodes, learnt_bootstrap
from meshmax.core.subnets import ip_of
from meshmax.net.addresses import is_lan_address
from meshmax.node.bootstrapping import bootstrap_of
from meshmax.node.running import Node
from meshmax.ports import Discovery
from meshmax.services.membership import MembershipService
from meshmax.services.rendezvous import Rendezvous
from meshmax.store.mesh_files import MeshFiles

ANYWHERE: Final = 3  # of `scope_of`


def make_membership(node: Node) -> MembershipService:
    """What the node's files say of its mesh. Raises ConfigError; blocks briefly."""
    world = node.world
    membership = MembershipService(
        node.signer, MeshFiles(node.home.path), world.unix_now, world.random, world.run_sync, node.name
    )
    membership.lan = node.config.lan
    membership.bootstrap = lambda: bootstrap_of(node)
    membership.told = node.told_addresses
    membership.only_near = lambda: why_only_near(node)
    membership.search = lambda ticket: _meeting_place(node, ticket)
    return membership


def why_only_near(node: Node) -> str:
    """Why nobody outside our network can come to us now, for people; '' where somebody may."""
    traversal, bootstrap = node.traversal, node.rendezvous
    seen, addresses = traversal.reachability(), node.told_addresses()
    if traversal.reached or any("/p2p-circuit" in text for text in addresses):
        return ""
    if seen.state == "unknown" and any(scope_of(ip_of(text)) == ANYWHERE for text in addresses):
        return ""  # nobody has tried yet
    if not bootstrap.nodes:
        return "no address of this peer is reached from outside, and " + (
            bootstrap.off or "no bootstrap node was asked yet"
        )
    problem = bootstrap.problem or "no relay keeps a place for this peer yet"
    return f"no address of this peer is reached from outside, and {problem}"


def _meeting_place(node: Node, ticket: Ticket) -> Discovery | None:
    """Where the members of the ticket's mesh meet; we only ask there, since we are none yet."""
    places = bootstrap_nodes((*learnt_bootstrap(ticket.bootstrap), *(each.address for each in bootstrap_of(node))))
    if not places:
        return None
    world = node.world
    return Rendezvous(node.swarm, node.signer, lambda: places, tuple, lambda: ticket.mesh, world.unix_now, world.random)


def allow_of(membership: MembershipService) -> Callable[[str], bool]:
    """Which IP addresses may be dialled and may connect now."""
    return lambda ip: membership.allows(ip, is_lan_address)


def follow_mesh(node: Node, first_seen: FirstSeen) -> None:
    """From now on, whenever the mesh changes: forget peers and what names meant, and look for others at once."""

    def name_of(peer_id: PeerId) -> str:
        view = node.presence.view(peer_id)
        return view.status.name if view and view.status else ""

    def on_change(peer_id: PeerId | None, addresses: Sequence[str]) -> None:
        for key in list(first_seen.items()):
            first_seen.forget(key)
        node.presence.on_mesh_change()
        node.first_moments.begin()
        if peer_id is not None:
            node.presence.on_sighting(peer_id, addresses)
        node.catalog.note_names()
        node.traversal.on_mesh_change()
        node.dht.look_again()
        node.ladder.on_mesh_change()

    membership = node.membership
    membership.name_of = name_of
    membership.addresses_of = node.presence.addresses_of
    membership.on_change = on_change
    node.network.watch(membership.look_again)
