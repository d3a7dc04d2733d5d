"""Peers that meet at rendezvous nodes and stay together, in virtual time: who moved is found again without a person."""

import random

import trio
import trio.testing

from meshmax.base.config import Config
from meshmax.base.membership import OPEN_MESH
from meshmax.base.status import PeerStatus
from meshmax.services.ladder import Ladder
from meshmax.services.presence import PresenceService, open_presence
from meshmax.services.rendezvous import CHECK_S, Rendezvous
from meshmax.testing.memory_swarm import MemorySwarm, SeededSigner
from tests.services.rendezvous_site import Point, Site, open_site


class Peer:
    """A peer whose only rung is the rendezvous."""

    def __init__(self, swarm: MemorySwarm, presence: PresenceService) -> None:
        self.swarm, self.presence = swarm, presence

    def online(self) -> set[str]:
        views = self.presence.peers()
        return {view.peer_id for view in views if view.state == "online"}


async def enter_peer(site: Site, seed: int, *points: Point) -> Peer:
    signer = SeededSigner(seed)
    swarm = await site.swarm(signer)
    chance = random.Random(seed)

    def unix_now() -> float:
        return 1_700_000_000.0 + trio.current_time()

    rung = Rendezvous(
        swarm,
        signer,
        lambda: dict(point.place for point in points),
        lambda: swarm.addresses,
        lambda: OPEN_MESH,
        unix_now,
        chance,
    )
    status = PeerStatus(signer.peer_id, 0, 0, f"peer{seed}", "0")
    opened = open_presence(swarm, signer, Config(), lambda: status, Ladder([rung], chance), unix_now, chance)
    return Peer(swarm, await site.stack.enter_async_context(opened))


async def test_peers_that_all_changed_their_addresses_at_once_are_together_again_in_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        peers = [await enter_peer(site, seed, point) for seed in (1, 2, 3)]
        everybody = {peer.swarm.peer_id for peer in peers}
        await trio.sleep(60)
        assert all(peer.online() == everybody - {peer.swarm.peer_id} for peer in peers)
        await trio.sleep(600)
        for number, peer in enumerate(peers):
            site.network.move(peer.swarm, f"/ip4/192.168.77.{number}/tcp/11435")  # nobody knows anybody's address now
        await trio.sleep(0.1)
        assert not any(peer.online() for peer in peers)
        await trio.sleep(CHECK_S + 5)
        assert all(peer.online() == everybody - {peer.swarm.peer_id} for peer in peers)


async def test_a_peer_that_was_away_for_long_and_comes_back_elsewhere_is_found(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        first, away = [await enter_peer(site, seed, point) for seed in (1, 2)]
        await trio.sleep(60)
        assert first.online() == {away.swarm.peer_id}
        site.network.freeze(away.swarm.peer_id)
        await trio.sleep(2.1 * 3600)  # its registration is over, and its neighbours have forgotten it
        assert first.online() == set()
        site.network.move(first.swarm, "/ip4/192.168.77.1/tcp/11435")
        site.network.move(away.swarm, "/ip4/192.168.78.1/tcp/11435")
        site.network.thaw(away.swarm.peer_id)
        await trio.sleep(2 * CHECK_S + 30)
        assert first.online() == {away.swarm.peer_id}


async def test_a_mesh_needs_its_rendezvous_node_only_to_meet(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        north, south = await site.point(0), await site.point(1)
        first, second = [await enter_peer(site, seed, north, south) for seed in (1, 2)]
        await trio.sleep(60)
        site.network.kill(north.swarm.peer_id)
        third = await enter_peer(site, 3, north, south)
        await trio.sleep(60)
        assert third.online() == {first.swarm.peer_id, second.swarm.peer_id}
        site.network.kill(south.swarm.peer_id)
        await trio.sleep(600)
        assert first.online() == {second.swarm.peer_id, third.swarm.peer_id}
