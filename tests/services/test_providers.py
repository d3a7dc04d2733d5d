"""Providers that are no neighbours are found by name, dialled, and believed only once they are there."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import trio
import trio.testing

from meshmax.base.ids import Sha256
from meshmax.base.membership import OPEN_MESH
from meshmax.base.providers import ProviderRecord
from meshmax.base.status import ModelPresence, PeerStatus, PeerView
from meshmax.core.announce import Word
from meshmax.ports import Sighting, Swarm
from meshmax.services.announce import IN_MESH
from meshmax.services.dht_rung import MAX_PAUSE_S, DhtRung
from meshmax.services.providers import DIAL_S, DIALS, STATUS_S, ProviderSearch
from meshmax.testing.memory_dht import MemoryDht, MemoryDhtSite
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from meshmax.wire.dht import dht_key
from meshmax.wire.provider_records import sign_record

EPOCH_S = 1_790_000_000.0
NAME = Word("name", "registry.ollama.ai/library/llama:latest")


class Site:
    """One who looks, the DHT that it looks in, and a network to dial in."""

    def __init__(self, network: MemoryNetwork, looker: MemoryDht, other: MemoryDht, swarm: Swarm) -> None:
        self.network, self.looker, self.other, self.swarm = network, looker, other, swarm
        self.search = ProviderSearch(swarm, lambda: self.looker, lambda: OPEN_MESH, Random(1))
        self.rung = DhtRung(swarm, lambda: self.looker, lambda: OPEN_MESH, lambda: (), Random(1))

    async def announce(self, seed: int, word: Word, *addresses: str) -> None:
        signer, now_s = SeededSigner(seed), int(EPOCH_S + trio.current_time())
        key = dht_key(OPEN_MESH, word.kind, word.text)
        record = ProviderRecord(key, signer.peer_id, now_s, now_s, now_s + 3600, addresses)
        assert await self.other.announce(sign_record(record, signer.sign))


@asynccontextmanager
async def open_site() -> AsyncIterator[Site]:
    dhts, network = MemoryDhtSite(lambda: EPOCH_S + trio.current_time()), MemoryNetwork()
    async with dhts.open(SeededSigner(1)) as looker, dhts.open(SeededSigner(2)) as other:
        await looker.join([other.address])
        async with network.open_swarm(SeededSigner(1)) as swarm:
            yield Site(network, looker, other, swarm)


async def test_a_provider_is_found_and_connected(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site, site.network.open_swarm(SeededSigner(5)) as provider:
        await site.announce(5, NAME, *provider.addresses)
        there = site.swarm.connections
        assert await site.search.seek("llama", lambda: provider.peer_id in there())


async def test_one_that_lies_about_where_it_is_costs_a_dial_and_no_more(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site, site.network.open_swarm(SeededSigner(5)) as provider:
        await site.announce(6, NAME, *provider.addresses)
        began_s = trio.current_time()
        assert not await site.search.seek("llama", lambda: False)
        assert trio.current_time() - began_s <= DIAL_S + STATUS_S + 1.0
        assert not site.swarm.connections()


async def test_a_name_that_nobody_provides_or_that_is_none_is_not_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        began_s = trio.current_time()
        assert not await site.search.seek("llama", lambda: False)
        assert not await site.search.seek("//", lambda: False)
        assert trio.current_time() - began_s < 1.0


async def test_without_a_node_of_the_dht_nothing_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        site.looker.cut()
        began_s = trio.current_time()
        assert not await site.search.seek("llama", lambda: False)
        assert trio.current_time() == began_s


def told_of(swarm: Swarm, *names: str) -> PeerView:
    """A peer as a neighbour tells of it."""
    models = (ModelPresence(Sha256("ab" * 32), names, "disk", 1),)
    status = PeerStatus(swarm.peer_id, 1, 0, "far", "0", addresses=swarm.addresses, models=models)
    return PeerView(swarm.peer_id, "offline", "direct", status)


async def test_without_a_dht_a_provider_that_neighbours_tell_of_is_connected(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with (
        open_site() as site,
        site.network.open_swarm(SeededSigner(5)) as provider,
        site.network.open_swarm(SeededSigner(6)) as other,
    ):
        told = (told_of(provider, NAME.text), told_of(other, "registry.ollama.ai/library/else:latest"))
        there = site.swarm.connections
        for wanted in ("llama", "llama@" + "ab" * 32):
            search = ProviderSearch(site.swarm, lambda: None, lambda: OPEN_MESH, Random(1), lambda: told)
            assert await search.seek(wanted, lambda: provider.peer_id in there())
        assert not await search.seek("another", lambda: False)


async def test_when_all_dials_fail_at_once_nobody_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        await site.announce(5, NAME, "/memory/9999")
        began_s = trio.current_time()
        assert not await site.search.seek("llama", lambda: False)
        assert trio.current_time() - began_s < 1.0


async def test_of_many_providers_only_a_few_are_dialled(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        for seed in range(10, 40):
            await site.announce(seed, NAME, "/memory/9999")
        dialled = []

        async def dial(peer_id: str, _addresses: object) -> None:
            dialled.append(peer_id)
            await trio.lowlevel.checkpoint()

        site.swarm.dial = dial  # type: ignore[assignment, method-assign]
        await site.search.seek("llama", lambda: False)
        assert len(dialled) == DIALS


async def test_the_rung_names_peers_of_the_mesh_and_old_neighbours_that_moved(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        old = SeededSigner(7).peer_id
        site.rung._known = lambda: (old,)
        await site.announce(5, IN_MESH, "/ip4/10.0.0.5/tcp/1")
        await site.announce(7, Word("peer", old), "/ip4/10.0.0.7/tcp/1")
        await site.announce(8, Word("peer", old), "/ip4/10.0.0.8/tcp/1")  # says that it is somebody else
        send, receive = trio.open_memory_channel[Sighting](100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(site.rung.run, send)
            await trio.sleep(4.0)
            nursery.cancel_scope.cancel()
        send.close()
        named = {sighting.peer_id: sighting.addresses async for sighting in receive}
        new = SeededSigner(5).peer_id
        assert named == {new: (f"/ip4/10.0.0.5/tcp/1/p2p/{new}",), old: (f"/ip4/10.0.0.7/tcp/1/p2p/{old}",)}


async def test_the_rung_says_what_is_wrong_and_looks_again_when_told(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        assert site.rung.problem == ""
        send, receive = trio.open_memory_channel[Sighting](100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(site.rung.run, send)
            await trio.sleep(20 * MAX_PAUSE_S)
            await site.announce(5, IN_MESH, "/ip4/10.0.0.5/tcp/1")
            site.rung.look_again()
            await trio.sleep(1.0)
            assert receive.receive_nowait().peer_id == SeededSigner(5).peer_id
            nursery.cancel_scope.cancel()
        site.looker.cut()
        assert "no node of the DHT" in site.rung.problem
