"""What gets a node through NAT, joined: where it stands, mapped ports, places at relays, punching, and who dials members.

Everything here is for private meshes: the open mesh lives on one LAN. Each part asks `Traversal.wanted` and follows the mesh
while the node runs; what a `World` lacks is not there. Order: where we stand, port mappings, relays, signalling, connector; all
before presence, which dials by the connector. Not here: decisions (core.reachability, core.dial_plan, core.signalling ...).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from meshmax.base.membership import OPEN_MESH
from meshmax.base.reachability import UNKNOWN, Reachability
from meshmax.core.own_addresses import told_addresses
from meshmax.net.addresses import is_lan_address, parse_endpoint

if TYPE_CHECKING:
    from meshmax.node.running import Node
    from meshmax.ports import Relays, Signals


class Traversal:
    """A node's parts of it; each None, or empty, where it is not there."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.relays: Relays | None = None
        self.signals: Signals | None = None
        self.reachability: Callable[[], Reachability] = lambda: UNKNOWN  # where we stand now
        self._told: tuple[str, ...] = ()
        self._watchers: list[Callable[[], None]] = []

    @property
    def wanted(self) -> bool:
        """Whether peers of our mesh may be anywhere, so that getting through NAT is worth anything."""
        return self._node.membership.mesh != OPEN_MESH

    def told_addresses(self) -> tuple[str, ...]:
        """Our addresses as others may know them and pass them on, with /p2p, at most MAX_ADDRESSES."""
        own = self._node.swarm.addresses
        if not self.wanted:  # the open mesh lives on private addresses alone, so no others are told
            return tuple(text for text in own if is_lan_address(parse_endpoint(text).host))
        outside = [f"{text}/p2p/{self._node.peer_id}" for text in self.reachability().addresses]
        return told_addresses(own, outside, self.relays.addresses if self.relays else ())

    def watch(self, on_mesh_change: Callable[[], None]) -> None:
        """Call ``on_mesh_change`` when the node is in another mesh. It must not block, and is kept for ever."""
        self._watchers.append(on_mesh_change)

    def on_mesh_change(self) -> None:
        """`wanted` may be another."""
        for watcher in self._watchers:
            watcher()
        self.changed()

    def changed(self) -> None:
        """Our addresses may be others: if so, tell everybody at once. Cheap; every part calls it freely."""
        told, before = self.told_addresses(), self._told
        if told != before:
            self._told = told
            self._node.changed()
            self._node.rendezvous.check()


@asynccontextmanager
async def open_traversal(node: Node) -> AsyncIterator[None]:
    """Fill ``node.traversal``: open its parts until the block ends."""
    traversal = node.traversal
    async with AsyncExitStack() as stack:
        await trio.lowlevel.checkpoint()
        _ = stack  # each part is entered here, in the order of the module's text
        if traversal.relays is not None:
            traversal.relays.watch(traversal.changed)
        yield
