"""Real nodes, relays and paths between them: who is no member any more, and who never was in a private mesh."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.net.swarm import LibrarySwarm
from meshmax.node import Node
from meshmax.services.relay_stream import RelayMessages
from meshmax.wire import relay as wire
from meshmax.wire.protocols import RELAY_HOP, RELAY_STOP
from tests.sim.site import online, until
from tests.sim.test_paths import open_apart, path

Clock = trio.testing.MockClock


def links(node: Node, peer: PeerId) -> int:
    swarm = node.swarm
    assert isinstance(swarm, LibrarySwarm)
    return sum(link.view.peer_id == peer for link in swarm._upgrader.links.values())


@pytest.mark.parametrize("direct", [False, True], ids=["over a relay", "directly after it"])
async def test_a_revoked_member_loses_circuits_and_paths_at_once_and_gets_none_again(
    tmp_path: Path, autojump_clock: Clock, direct: bool
) -> None:
    async with open_apart(tmp_path) as site:
        await site.helper()
        a, b, c = await site.apart("a", "b", "c")
        await until(lambda: online(a) == {"b", "c"} and online(c) == {"a", "b"}, 20)
        if direct:
            site.network.heal(a.peer_id, b.peer_id)
            await until(lambda: path(a, b.peer_id) == "direct", 120)
        await a.membership.revoke(b.peer_id)
        took_s = await until(lambda: not links(a, b.peer_id) and not links(c, b.peer_id), 10)
        assert took_s < 6  # its own dials are refused, which takes a moment each
        assert a.traversal.relays is not None
        held = {circuit.peer_id for node in (a, c) for circuit in node.traversal.relays.circuits._open}  # type: ignore[union-attr]
        assert b.peer_id not in held
        for _ in range(60):
            await trio.sleep(1)
            assert b.peer_id not in a.swarm.connections()
            assert b.peer_id not in c.swarm.connections()
        with pytest.raises(MeshmaxError):
            await b.traversal.connector.connect(a.peer_id, a.told_addresses())
        assert online(a) == {"c"}


async def test_in_the_open_mesh_nobody_is_relayed_reached_over_relays_or_told_of_from_outside(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_apart(tmp_path) as site:
        helper = await site.helper()
        a, b = await site.node("a"), await site.node("b")
        await trio.sleep(60)
        for node in (a, b):
            traversal = node.traversal
            assert not traversal.wanted
            assert not traversal.relays_members
            assert traversal.relays is not None
            assert traversal.relays.relays == traversal.relays.addresses == ()
            assert not any("p2p-circuit" in text for text in traversal.told_addresses())
        await helper.dial(a.peer_id, a.swarm.addresses, guest=True)
        for protocol, request in (
            (RELAY_HOP, wire.encode_reserve()),
            (RELAY_HOP, wire.encode_connect(b.peer_id)),
            (RELAY_STOP, wire.encode_stop_connect(b.peer_id, wire.Limit())),
        ):
            stream = await helper.open_stream(a.peer_id, protocol)
            await stream.send_all(request)
            body = await RelayMessages(stream).receive()
            refused = wire.parse_hop_status(body).status if protocol == RELAY_HOP else wire.parse_stop_status(body)
            assert refused == wire.PERMISSION_DENIED
            await stream.reset()
