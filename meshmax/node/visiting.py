"""How a node opens itself to the doctor: services.doctor's Patient, and looking back. Not here: what it finds (core.doctor)."""

from __future__ import annotations

from functools import partial

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE
from meshmax.base.doctor import BootstrapSeen, GivenSeen, MachineFacts, PeerFacts, PortKind, RefusedPeer
from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import PeerId
from meshmax.base.reachability import NatBehaviour
from meshmax.base.status import PeerView
from meshmax.core.rendezvous import bootstrap_nodes
from meshmax.net.addresses import parse_endpoint
from meshmax.net.static import parse_join
from meshmax.node.bootstrapping import bootstrap_of, bootstrap_outside, bootstrap_places, bootstrap_waiting
from meshmax.node.running import Node
from meshmax.services.checkup import check_machine
from meshmax.services.doctor import Doctor
from meshmax.services.look_back import LookBack


def make_doctor(node: Node) -> Doctor:
    """The doctor of a node, whose swarm answers look-backs from now on."""
    world = node.world

    def nat() -> NatBehaviour:
        return node.reachability.view.nat

    look_back = LookBack(node.swarm, node.ladder, world.knock, world.unix_now, node.datagrams, nat)
    return Doctor(NodePatient(node), node.ladder, look_back)


class NodePatient:
    """Satisfies services.doctor.Patient for a node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def online(self) -> tuple[PeerView, ...]:
        """See Patient."""
        return tuple(view for view in self._node.presence.peers() if view.state in ("online", "draining"))

    def ports(self) -> tuple[tuple[PortKind, int], ...]:
        """See Patient."""
        node = self._node
        found: list[tuple[PortKind, int]] = []
        for address in node.swarm.addresses[:1]:
            try:
                found.append(("control", parse_endpoint(address).port))
            except InvalidRequest:
                break
        if node.lane_port:
            found.append(("lane", node.lane_port))
        if node.datagrams and node.datagrams.addresses:
            found.append(("udp", node.datagrams.addresses[0][1]))
        return tuple(found)

    def refused(self) -> tuple[RefusedPeer, ...]:
        """See Patient."""
        presence = self._node.presence
        return tuple(
            RefusedPeer(each.peer_id, each.address, each.reason, view.status.name if view and view.status else "")
            for each in presence.refused()
            for view in (presence.view(each.peer_id),)
        )

    def bootstrap(self) -> tuple[BootstrapSeen, ...]:
        """See Patient."""
        given = bootstrap_nodes(each.address for each in bootstrap_of(self._node) if each.source == "config")
        visited = tuple(
            BootstrapSeen(seen.address, seen.problem, "config" if seen.peer_id in given else "ticket")
            for seen in self._node.rendezvous.nodes
        )
        unused = bootstrap_outside(self._node)
        # The issuer of a ticket that waits is looked for at these; what comes of it is said of the mesh.
        waiting = bootstrap_waiting(self._node)
        return (
            *visited,
            *(BootstrapSeen(each.address, BOOTSTRAP_OUTSIDE, each.source) for each in unused),
            *(BootstrapSeen(each.address, "", each.source) for each in waiting),
        )

    def facts(self) -> PeerFacts:
        """See Patient."""
        node = self._node
        problem, mesh = node.presence.problem, node.membership.view()
        return PeerFacts(
            control=tuple(address.partition("/p2p/")[0] for address in node.swarm.addresses),
            joined=len(node.config.join),
            given=tuple(GivenSeen(text, node.presence.why_not(*parse_join(text))) for text in node.config.join),
            mesh=mesh.mesh,
            mesh_name=mesh.name,
            mesh_problem=mesh.problem,
            certificate_left_s=None if mesh.expires_at_s is None else mesh.expires_at_s - node.now(),
            copies=(problem,) if problem else (),
            reachability=node.reachability.view,
            relays=tuple(self._relay_name(peer_id) for peer_id in node.reachability.view.relays),
        )

    def _relay_name(self, peer_id: PeerId) -> str:
        """What people call a relay: its name as a member, else the first address by which it is known."""
        view = self._node.presence.view(peer_id)
        if view is not None and view.status is not None and view.status.name:
            return view.status.name
        address = (bootstrap_places(self._node).get(peer_id) or ("",))[0]
        return (address.split("/") + [""] * 3)[2] or peer_id[-8:]

    async def machine(self) -> MachineFacts:
        """See Patient."""
        node = self._node
        return await node.world.run_sync(
            partial(check_machine, node.config, node.network.addresses, node.world.unix_now(), running=True)
        )
