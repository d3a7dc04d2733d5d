"""Peers learn how they are seen, and what a node does for strangers."""

from typing import Any

import pytest
import trio

from meshmax.base.errors import PeerGone, RemoteProtocolError, VersionMismatch
from meshmax.services import observe as module
from meshmax.services.observe import ObserveServer, ask_observed
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from meshmax.wire import observe as wire
from meshmax.wire.protocols import OBSERVE


async def test_a_guest_is_told_its_address_the_ports_and_the_services(autojump_clock: Any) -> None:
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1), NoMesh()) as node, network.open_swarm(SeededSigner(2)) as peer:
        ObserveServer(11435, 11437, ("stun", "relay")).register(node)
        await peer.dial(node.peer_id, node.addresses, guest=True)
        observed = await ask_observed(peer, node.peer_id)
        own = peer.addresses[0].partition("/p2p/")[0]
        assert observed == wire.Observed(own, 11435, 11437, ("stun", "relay"))


async def test_who_does_not_ask_is_not_waited_for(autojump_clock: Any) -> None:
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as node, network.open_swarm(SeededSigner(2)) as peer:
        ObserveServer(0, 0, ()).register(node)
        await peer.dial(node.peer_id, node.addresses)
        stream = await peer.open_stream(node.peer_id, OBSERVE)
        began = trio.current_time()
        with pytest.raises(PeerGone):
            await stream.receive_some(1)
        assert trio.current_time() - began < module.ANSWER_TIMEOUT_S + 1


async def test_a_node_that_says_nothing_garbage_or_lacks_the_protocol_is_an_error(autojump_clock: Any) -> None:
    async def mute(stream: Any) -> None:
        await trio.sleep_forever()

    async def garbage(stream: Any) -> None:
        await stream.send_all(b"\xff" * 100)

    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as node, network.open_swarm(SeededSigner(2)) as peer:
        await peer.dial(node.peer_id, node.addresses)
        with pytest.raises(VersionMismatch):
            await ask_observed(peer, node.peer_id)
        node.serve(OBSERVE, mute)
        with pytest.raises(PeerGone):
            await ask_observed(peer, node.peer_id)
        node.serve(OBSERVE, garbage)
        with pytest.raises(RemoteProtocolError):
            await ask_observed(peer, node.peer_id)
