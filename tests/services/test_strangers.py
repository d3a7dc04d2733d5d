"""Nodes that let strangers in: who is a member all the same, and what the others are told."""

from typing import Any, Literal

import pytest
import trio

from meshmax.base.errors import NotAMember
from meshmax.base.ids import PeerId
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.observe import ObserveServer, ask_observed
from meshmax.services.strangers import FROM_ELSEWHERE, IN_NO_MESH, BesideStrangers, NoMesh
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from meshmax.wire import membership as wire
from meshmax.wire.failure import Failure, error_of


class Everybody:
    """Says hello to every dialler, and waits for the same."""

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        frames = FrameStream(stream)
        await frames.send(wire.MEMBER, wire.Welcome())
        message = await frames.receive(wire.MEMBER)
        if isinstance(message, Failure):
            raise error_of(message)

    def check(self, peer_id: PeerId, protocol: str) -> None:
        if protocol == "/secret":
            raise NotAMember("no")


async def test_who_asks_a_bootstrap_node_for_admission_is_told_what_it_is_and_may_come_as_a_guest(
    autojump_clock: Any,
) -> None:
    network = MemoryNetwork()
    async with (
        network.open_swarm(SeededSigner(1), NoMesh()) as node,
        network.open_swarm(SeededSigner(2), Everybody()) as peer,
    ):
        ObserveServer(1, 2, ()).register(node)
        with pytest.raises(NotAMember, match=IN_NO_MESH[:40]):
            await peer.dial(node.peer_id, node.addresses)
        await trio.sleep(5)
        await peer.dial(node.peer_id, node.addresses, guest=True)
        assert (await ask_observed(peer, node.peer_id)).udp_port == 1
        assert not node.connections()
        with pytest.raises(NotAMember):
            NoMesh().check(peer.peer_id, "/x")


@pytest.mark.parametrize("allowed", [True, False])
async def test_members_of_an_open_mesh_still_come_from_where_it_lives(autojump_clock: Any, allowed: bool) -> None:
    network = MemoryNetwork()
    asked: list[str] = []

    def allows(ip: str) -> bool:
        asked.append(ip)
        return allowed

    async with (
        network.open_swarm(SeededSigner(1), BesideStrangers(Everybody(), allows)) as node,
        network.open_swarm(SeededSigner(2), Everybody()) as peer,
    ):
        if allowed:
            await peer.dial(node.peer_id, node.addresses)
            assert set(node.connections()) == {peer.peer_id}
        else:
            with pytest.raises(NotAMember, match=FROM_ELSEWHERE[:30]):
                await peer.dial(node.peer_id, node.addresses)
        assert asked == [peer.addresses[0].partition("/p2p/")[0]]


def test_scopes_are_those_of_the_mesh() -> None:
    with pytest.raises(NotAMember):
        BesideStrangers(Everybody(), lambda _ip: True).check(SeededSigner(1).peer_id, "/secret")
