"""Which bootstrap nodes a node uses: those of its configuration first, then those that the tickets of its mesh named.

Rules: looked at anew by whoever uses them, since they change with the mesh. What a ticket named counts only in its mesh: while
it waits to be redeemed, its nodes are asked for its issuer alone (node.joining). The open mesh connects to private addresses
alone, so that it uses no node elsewhere. Not here: what is done there (services.rendezvous, node.dht), how they are kept
(store.mesh_files).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import PeerId
from meshmax.base.membership import BootstrapAddress
from meshmax.core.rendezvous import bootstrap_nodes, learnt_bootstrap
from meshmax.net.addresses import is_lan_address, parse_endpoint

if TYPE_CHECKING:
    from meshmax.node.running import Node

MAX_BOOTSTRAP: Final = 32  # addresses in use; a node of which there are 16 at most has one for IPv4 and one for IPv6


def bootstrap_of(node: Node) -> tuple[BootstrapAddress, ...]:
    """The addresses in use now, at most MAX_BOOTSTRAP, each with where it comes from."""
    given = dict.fromkeys(node.config.bootstrap)
    learnt = [text for text in node.membership.standing.bootstrap if text not in given]
    found = [BootstrapAddress(text, "config") for text in given] + [BootstrapAddress(text, "ticket") for text in learnt]
    return tuple(found[:MAX_BOOTSTRAP])


def bootstrap_places(node: Node) -> dict[PeerId, tuple[str, ...]]:
    """Those of `bootstrap_of` that our mesh connects to, by PeerId: addresses without /p2p."""
    unused = bootstrap_outside(node)
    return bootstrap_nodes(each.address for each in bootstrap_of(node) if each not in unused)


def bootstrap_outside(node: Node) -> tuple[BootstrapAddress, ...]:
    """Those of `bootstrap_of` that our mesh does not connect to, because of where they are; of names it is not known here."""
    return tuple(each for each in bootstrap_of(node) if not _may_be_used(node, each.address))


def bootstrap_waiting(node: Node) -> tuple[BootstrapAddress, ...]:
    """Those that the ticket names which waits to be redeemed, but for those of `bootstrap_of`."""
    if (ticket := node.membership.waiting) is None:
        return ()
    used = {each.address for each in bootstrap_of(node)}
    return tuple(BootstrapAddress(text, "ticket") for text in learnt_bootstrap(ticket.bootstrap) if text not in used)


def _may_be_used(node: Node, address: str) -> bool:
    try:
        endpoint = parse_endpoint(address)
    except InvalidRequest:
        return True  # `bootstrap_nodes` says what is wrong with it
    return endpoint.name or node.membership.allows(endpoint.host, is_lan_address)
