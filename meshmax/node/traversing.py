"""What gets a node through NAT, joined: where it stands, mapped ports, places at relays, punching, and who dials members.

Everything here is for private meshes: the open mesh lives on one LAN. Each part asks `Traversal.wanted` and follows the mesh
while the node runs; what a `World` lacks is not there. Order: port mappings, where we stand, relays, signalling, connector; all
before presence, which dials by the connector. Not here: decisions (core.reachability, core.dial_plan, core.signalling ...).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from meshmax.base.membership import OPEN_MESH
from meshmax.base.reachability import UNKNOWN, Reachability, ReachState
from meshmax.core.own_addresses import told_addresses
from meshmax.net.addresses import is_lan_address, parse_endpoint
from meshmax.node.connecting import open_node_connector, open_signalling
from meshmax.node.mapping import open_node_mapping
from meshmax.node.relaying import open_relaying
from meshmax.node.whereabouts import open_whereabouts

if TYPE_CHECKING:
    from meshmax.base.ids import PeerId
    from meshmax.node.running import Node
    from meshmax.services.connector import Connector
    from meshmax.services.port_mapping import PortMappingService
    from meshmax.services.reachability import ReachabilityService
    from meshmax.services.relay_client import RelayClient
    from meshmax.services.signalling import Signalling


class Traversal:
    """A node's parts of it; each None, or empty, where it is not there."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.relays: RelayClient | None = None
        self.signals: Signalling | None = None
        self.where: ReachabilityService | None = None  # where we stand
        self.mapping: PortMappingService | None = None
        self.connector: Connector
        self._told: tuple[object, ...] = ()
        self._watchers: list[Callable[[], None]] = []

    @property
    def wanted(self) -> bool:
        """Whether peers of our mesh may be anywhere, so that getting through NAT is worth anything."""
        return self._node.membership.mesh != OPEN_MESH

    def reachability(self) -> Reachability:
        """Where we stand now."""
        return self.where.view if self.where is not None else UNKNOWN

    def stand(self) -> ReachState:
        """The one word of it; each prompt asks several times."""
        return self.where.state if self.where is not None else UNKNOWN.state

    @property
    def reached(self) -> bool:
        """Whether peers anywhere reach us without help."""
        return self.stand() in ("public", "mapped")

    @property
    def relays_members(self) -> bool:
        """Whether we relay for members of our mesh."""
        return self._node.config.serve.relay_members and self.wanted and self.reached

    def uses(self, peer_id: PeerId) -> bool:
        """Whether a guest's connection to ``peer_id`` is in use here, so that nobody else should end it."""
        asking = self.where is not None and self.where.is_asking(peer_id)
        return asking or (self.relays is not None and self.relays.uses(peer_id))

    @property
    def udp_blocked(self) -> bool:
        """Whether this network lets no UDP out: what would wait for it goes without."""
        return self.where is not None and self.where.udp_blocked

    def told_addresses(self) -> tuple[str, ...]:
        """Our addresses as others may know them and pass them on, with /p2p, at most MAX_ADDRESSES."""
        own = self._node.swarm.addresses
        if not self.wanted:  # the open mesh lives on private addresses alone, so no others are told
            return tuple(text for text in own if is_lan_address(parse_endpoint(text).host))
        outside = [f"{text}/p2p/{self._node.peer_id}" for text in self.reachability().addresses]
        return told_addresses(own, outside, self.relays.addresses if self.relays else ())

    def on_silent(self, peer_id: PeerId) -> None:
        """A peer lets us wait: its connection may be dead, and those to relays with it. Cheap."""
        if self.relays is not None:
            self.relays.doubt()
        self.connector.on_silent(peer_id)

    def watch(self, on_mesh_change: Callable[[], None]) -> None:
        """Call ``on_mesh_change`` when the node is in another mesh. It must not block, and is kept for ever."""
        self._watchers.append(on_mesh_change)

    def on_mesh_change(self) -> None:
        """`wanted` may be another."""
        for watcher in self._watchers:
            watcher()
        self.changed()

    def changed(self) -> None:
        """Our addresses, or what we do for members, may be others: if so, tell everybody at once. Cheap; called freely."""
        told, before = (*self.told_addresses(), self.relays_members), self._told
        if told != before:
            self._told = told
            self._node.changed()
            self._node.rendezvous.check()


@asynccontextmanager
async def open_traversal(node: Node) -> AsyncIterator[None]:
    """Fill ``node.traversal``: open its parts until the block ends."""
    traversal = node.traversal
    async with AsyncExitStack() as stack:
        # each part is entered here, in the order of the module's text
        traversal.mapping = await stack.enter_async_context(open_node_mapping(node))
        traversal.where = node.reachability = await stack.enter_async_context(open_whereabouts(node))
        if traversal.mapping is not None:
            traversal.mapping.watch(traversal.where.on_mappings)
            traversal.mapping.watch(node.changed)
        traversal.where.watch(traversal.changed)
        traversal.where.watch(node.dht.look_again)
        traversal.watch(traversal.where.look_again)
        traversal.relays = await stack.enter_async_context(open_relaying(node))
        traversal.where.watch(traversal.relays.check)
        traversal.relays.watch(traversal.where.on_relays)
        traversal.signals = await stack.enter_async_context(open_signalling(node, traversal.where))
        traversal.connector = await stack.enter_async_context(open_node_connector(node))
        traversal.relays.watch(traversal.connector.on_relays)
        yield
