"""Presence among many, in virtual time: leaving, dying, hearsay, partitions, enough neighbours, copies, strangers."""

import random
from functools import partial
from typing import Literal

import pytest
import trio
import trio.testing

from meshmax.base.errors import NotAMember
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.status import ModelPresence
from meshmax.core.neighbours import MAX_NEIGHBOURS, NEIGHBOURS
from meshmax.ports import Stream
from meshmax.services.providers import ProviderSearch
from tests.services.presence_site import Mesh, Peer, open_mesh, until


async def meet(mesh: Mesh, count: int) -> list[Peer]:
    """That many peers, each of which was told of the first one."""
    for _ in range(count):
        await mesh.peer(*mesh.peers[:1])
    await until(lambda: all(len(peer.sees()) == count - 1 for peer in mesh.peers))
    return mesh.peers


async def test_a_peer_that_leaves_says_so_and_is_gone_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        peers = await meet(mesh, 5)
        began = trio.current_time()
        await peers[2].leave()
        others = [peer for peer in peers if peer is not peers[2]]
        await until(lambda: all(peer.listed() == 3 for peer in others))
        assert trio.current_time() - began < 0.5


async def test_a_frozen_peer_is_in_no_list_after_fifteen_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        peers = await meet(mesh, 5)
        mesh.freeze(peers[2])
        others = [peer for peer in peers if peer is not peers[2]]
        assert await until(lambda: all("peer2" not in peer.sees() for peer in others)) < 10
        began = trio.current_time()
        assert began + await until(lambda: all(peer.listed() == 3 for peer in others)) - began < 15
        await trio.sleep(60)  # nobody's old word brings it back
        assert all(peer.listed() == 3 for peer in others)


async def test_a_dead_peer_known_by_hearsay_is_forgotten_within_fifteen_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_mesh() as mesh:
        a = await mesh.peer()
        between = await mesh.peer(a)
        far = await mesh.peer()
        mesh.cut([a], [far])
        end = await mesh.peer(between, far)
        mesh.cut([a], [end])
        await until(lambda: a.presence.view(end.swarm.peer_id) is not None)
        mesh.freeze(end)
        began = trio.current_time()
        await until(lambda: a.presence.view(end.swarm.peer_id) is None)
        assert trio.current_time() - began < 15
        assert a.sees() == {"peer1"}


@pytest.mark.parametrize("away_s", [20.0, 150.0])
async def test_a_partition_heals_within_ten_seconds_of_the_networks_return(
    away_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_mesh() as mesh:
        peers = await meet(mesh, 6)
        left, right = peers[:3], peers[3:]
        mesh.cut(left, right)
        await trio.sleep(away_s)
        assert all(len(peer.sees()) == 2 for peer in peers)
        mesh.cut(left, right, heal=True)
        assert await until(lambda: all(len(peer.sees()) == 5 for peer in peers)) < 10


async def test_what_a_peer_has_is_known_to_all_in_a_second_and_a_large_status_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_mesh() as mesh:
        peers = await meet(mesh, 4)
        peers[0].models = tuple(
            ModelPresence(Sha256(f"{number:064x}"), (f"h/n/m{number}:t",), "disk", 1) for number in range(500)
        )
        peers[0].presence.changed()

        def known(peer: Peer) -> int:
            view = peer.presence.view(peers[0].swarm.peer_id)
            return len(view.status.models) if view and view.status else 0

        assert await until(lambda: all(known(peer) == 500 for peer in peers[1:])) < 1.5


async def test_a_mesh_as_large_as_everybody_has_neighbours_is_connected_each_with_each(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_mesh() as mesh:
        await meet(mesh, NEIGHBOURS)


async def test_in_a_larger_mesh_everybody_has_enough_neighbours_and_nobody_all(
    autojump_clock: trio.testing.MockClock,
) -> None:
    count = 44
    async with open_mesh() as mesh:
        for _ in range(count):
            await mesh.peer(*mesh.peers[:2])
        await until(lambda: all(len(peer.sees()) >= NEIGHBOURS for peer in mesh.peers))
        await trio.sleep(5)
        degrees = sorted(len(peer.sees()) for peer in mesh.peers)
        assert degrees[0] >= NEIGHBOURS
        assert degrees[-1] <= MAX_NEIGHBOURS
        assert degrees[0] < count - 1
        reached = {"peer0"}
        while more := {n for peer in mesh.peers if peer.name in reached for n in peer.sees()} - reached:
            reached |= more
        assert len(reached) == count


async def test_a_model_of_a_peer_that_is_no_neighbour_is_found_without_any_dht(
    autojump_clock: trio.testing.MockClock,
) -> None:
    name = "registry.ollama.ai/library/rare:latest"
    async with open_mesh() as mesh:
        for _ in range(44):
            await mesh.peer(*mesh.peers[:2])
        await until(lambda: all(len(peer.sees()) >= NEIGHBOURS for peer in mesh.peers))
        await trio.sleep(5)
        holder = min(mesh.peers, key=lambda peer: len(peer.sees()))
        far = [peer for peer in mesh.peers if holder.name not in peer.sees() and peer is not holder]
        assert far
        holder.models = (ModelPresence(Sha256("ab" * 32), (name,), "disk", 1),)
        holder.presence.changed()
        await trio.sleep(2)  # news reach all who keep the peer in one; nobody has tried it as a better neighbour yet
        for peer in far[:4]:
            search = ProviderSearch(
                peer.swarm, lambda: None, lambda: OPEN_MESH, random.Random(1), peer.presence.farther
            )
            assert await search.seek("rare", partial(has_a_neighbour_with, peer, name))


def has_a_neighbour_with(peer: Peer, name: str) -> bool:
    views = peer.presence.peers()
    return any(name in model.names for view in views if view.status for model in view.status.models)


async def test_two_peers_with_one_identity_and_a_third_are_told_so(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        third = await mesh.peer()
        a = await mesh.peer(third, seed=77)
        await trio.sleep(40)
        copy = await mesh.peer(third, seed=77)
        await until(lambda: all(peer.presence.problem for peer in (third, a, copy)), deadline_s=60)
        assert "identity" in third.presence.problem
        assert "this peer" in a.presence.problem
        assert "this peer" in copy.presence.problem
        await copy.leave()
        await until(lambda: not any(peer.presence.problem for peer in (third, a)), deadline_s=200)


async def test_a_peer_that_is_started_again_is_no_copy(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        third = await mesh.peer()
        fourth = await mesh.peer(third)
        for _ in range(3):
            again = await mesh.peer(third, fourth, seed=77)
            await trio.sleep(30)
            assert not any(peer.presence.problem for peer in (third, fourth, again))
            mesh.network.kill(again.swarm.peer_id)


class Strangers:
    """An admission that takes nobody in."""

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        await trio.lowlevel.checkpoint()
        raise NotAMember("that peer is in another mesh")

    def check(self, peer_id: PeerId, protocol: str) -> None:
        pass


async def test_a_peer_of_another_mesh_is_asked_rarely_and_kept_aside(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_mesh() as mesh:
        stranger = await mesh.peer(admission=Strangers())
        a = await mesh.peer(stranger, admission=Strangers())
        await trio.sleep(10)
        (refusal,) = a.presence.refused()
        assert refusal.peer_id == stranger.signer.peer_id
        assert refusal.address in stranger.swarm.addresses
        assert "another mesh" in refusal.reason
        dials = 0

        async def counted(*_args: object, **_named: object) -> None:
            nonlocal dials
            dials += 1
            await trio.lowlevel.checkpoint()
            raise NotAMember("that peer is in another mesh")

        monkeypatch.setattr(a.swarm, "dial", counted)
        await trio.sleep(1200)
        assert 3 <= dials <= 5
        a.presence.on_mesh_change()
        assert a.presence.refused() == ()


@pytest.mark.parametrize("after_start_s", [0.001, 0.03, 0.2, 3.0, 15.1])
@pytest.mark.parametrize("reconnect_s", [0.0, 0.01, 0.03, 0.076, 0.3, 1.0])
async def test_a_peer_that_changes_its_mesh_sees_at_once_who_is_in_the_new_one(
    after_start_s: float, reconnect_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_mesh() as mesh:
        giver = await mesh.peer(mesh_id=MeshId("far"))
        await trio.sleep(20)
        fresh = await mesh.peer()
        fresh.presence.changed()  # as at each start, when the models are counted
        await trio.sleep(after_start_s)
        fresh.mesh_id = MeshId("far")
        fresh.presence.on_mesh_change()
        await trio.sleep(reconnect_s)
        await fresh.swarm.dial(giver.swarm.peer_id, giver.swarm.addresses)
        await until(lambda: fresh.sees() == {"peer0"} and giver.sees() == {"peer1"}, 1.0)


@pytest.mark.parametrize("away_s", [0.0, 0.05, 0.5, 5.0])
async def test_a_neighbour_whose_status_was_dismissed_or_forgotten_is_asked_for_it(
    away_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_mesh() as mesh:
        giver = await mesh.peer(mesh_id=MeshId("far"))
        fresh = await mesh.peer()
        await fresh.swarm.dial(giver.swarm.peer_id, giver.swarm.addresses)  # before it knows of its change
        await trio.sleep(away_s)
        fresh.mesh_id = MeshId("far")
        fresh.presence.on_mesh_change()
        await until(lambda: fresh.sees() == {"peer0"} and giver.sees() == {"peer1"}, 7.0)
