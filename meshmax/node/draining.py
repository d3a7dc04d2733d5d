"""A node that is taken out of service, by command or because it ends: what it tells the mesh, and what it waits for.

Drained by command it goes on living: its own API's prompts go to other peers, models move as before. A node that ends
(`begin_end`) refuses its own API's prompts as well, since their answers go through it. Not here: who is told how (cli, api), the
rules (core.draining).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from meshmax.base.drain import DrainView
from meshmax.base.errors import Refused
from meshmax.base.membership import OPEN_MESH
from meshmax.services.drain_exchange import NOT_IN_OPEN_MESH, DrainServer, ask_drain
from meshmax.wire.drain import DrainAsk, FromAsker, StandAsk, UndrainAsk

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshmax.base.ids import PeerId
    from meshmax.node.running import Node
    from meshmax.services.drain import Drain
    from meshmax.services.infer_server import InferServer

LOOK_S: Final = 0.05  # between looks at what is left
FAREWELL_S: Final = 1.0  # after the deadline: for other peers to hear that they are to go on elsewhere


class NodeDrain:
    """A node's draining; `ending` once it is about to end. Satisfies api.node_view.Draining."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._ends_at = 0.0
        self.here: Drain  # set while the node opens, like the next
        self._infer_server: InferServer
        self.ending = False

    def serve(self, infer_server: InferServer) -> None:
        """Answer other peers from now on. ``infer_server`` has what our engines answer them."""
        node, self._infer_server = self._node, infer_server
        DrainServer(
            self.here, lambda: node.membership.mesh, lambda peer: node.membership.require(peer, "admin")
        ).register(node.swarm)

    def changed(self) -> None:
        """The drain is in another state."""
        node = self._node
        if (before := node.state) != "starting":
            node.state = "running" if self.here.view.state == "running" else "draining"
            if before == node.state:
                node.changed()
            else:
                node.presence.own.issue()  # now: the next prompt goes by it

    async def drain(self, peer: PeerId, deadline_s: float) -> DrainView:
        """Drain a peer, ourselves too. Raises Refused (the open mesh), OutOfScope, PeerGone."""
        if peer != self._node.peer_id:
            return await self._ask(peer, DrainAsk(deadline_s))
        await trio.lowlevel.checkpoint()
        return self.here.drain(deadline_s)

    async def undrain(self, peer: PeerId) -> DrainView:
        """Let a peer take prompts again. Raises as `drain`."""
        if peer != self._node.peer_id:
            return await self._ask(peer, UndrainAsk())
        await trio.lowlevel.checkpoint()
        if self.ending:
            raise Refused("this peer is ending")
        return self.here.undrain()

    async def view(self, peer: PeerId) -> DrainView:
        """How a peer stands. Raises as `drain`."""
        if peer != self._node.peer_id:
            return await self._ask(peer, StandAsk())
        await trio.lowlevel.checkpoint()
        return self.here.view

    async def _ask(self, peer: PeerId, request: FromAsker) -> DrainView:
        if self._node.membership.mesh == OPEN_MESH:
            raise Refused(NOT_IN_OPEN_MESH)
        return await ask_drain(self._node.swarm, peer, request)

    # --- ending ------------------------------------------------------------------------------------------------------

    def begin_end(self, deadline_s: float) -> None:
        """Take nothing any more, for others or for our own API."""
        self.ending = True
        self._ends_at = trio.current_time() + deadline_s
        self.here.drain(deadline_s, stopping=True)

    def waiting_for(self) -> tuple[int, int]:
        """(prompts of our own API whose answers are not whole, other peers that we still owe an answer or a word)."""
        return self._node.prompts.under_way, len(self._infer_server.held)

    async def wait_end(self, told: Callable[[int, int], None]) -> None:
        """After `begin_end`: until nothing is left or its deadline is over; ``told`` hears when the counts change."""
        seen = (0, 0)
        while (counts := self.waiting_for()) != (0, 0):
            # What the deadline ends has still to be told so.
            late_s = trio.current_time() - self._ends_at
            if late_s > FAREWELL_S or (late_s > 0 and not counts[1]):
                return
            if counts != seen:
                seen = counts
                told(*counts)
            await trio.sleep(LOOK_S)
