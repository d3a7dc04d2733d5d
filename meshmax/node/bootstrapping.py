"""Which bootstrap nodes a node uses: those of its configuration first, then those that the tickets of its mesh named.

Rules: looked at anew by whoever uses them, since they change with the mesh. What a ticket named counts only in its mesh. Not
here: what is done there (services.rendezvous, node.dht), how they are kept (store.mesh_files).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from meshmax.base.ids import PeerId
from meshmax.base.membership import BootstrapAddress
from meshmax.core.rendezvous import bootstrap_nodes

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
    """`bootstrap_of` by PeerId: addresses without /p2p."""
    return bootstrap_nodes(each.address for each in bootstrap_of(node))
