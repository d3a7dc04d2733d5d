"""One blob fetched from peers over lanes, streams and from this machine itself, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.errors import BlobNotFound, StoreFull
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.ports import ChunkSource, Throttle
from meshmax.services.blob_server import BlobServer
from meshmax.services.fetch_events import SourceEvent, Stored, Unwritten
from meshmax.services.lane_client import LOST_S, RETRY_S, LaneOpener, try_ip
from meshmax.services.lane_server import LaneServer
from meshmax.services.local_source import name_of
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.services.pull_blob import BlobFetch
from meshmax.testing.memory_lanes import LaneNetwork, MemoryLanes
from meshmax.testing.memory_store import MemoryBlobStore, MemoryPartial
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire.chunkmap import chunk_map_of_bytes


def blob_of(chunks: int) -> bytes:
    return random.Random(chunks).randbytes((chunks - 1) * CHUNK_BYTES + 1000)


LARGE = blob_of(40)  # over MIN_BLOB_BYTES
SMALL = blob_of(3)


class Site:
    """A fetcher and servers, all connected. ``limit``: what every end keeps to."""

    def __init__(self, network: MemoryNetwork, limit: Throttle | None) -> None:
        self.network = network
        self.lanes = LaneNetwork()
        self.limit = limit
        self.servers: dict[PeerId, MemoryBlobStore] = {}
        self.store = MemoryBlobStore()
        self.fetcher: MemorySwarm
        self.partial: MemoryPartial

    async def serve(self, swarm: MemorySwarm, data: bytes, lanes: bool = True) -> PeerId:
        store = MemoryBlobStore()
        store.add(data)
        BlobServer(store, throttle=self.limit).register(swarm)
        if lanes:
            offers, port = Offers(trio.current_time), MemoryLanes(self.lanes, swarm.peer_id)
            LaneServer(store, port, Outflow(), offers, self.limit).register(swarm)
        self.servers[swarm.peer_id] = store
        await self.fetcher.dial(swarm.peer_id, swarm.addresses)
        return swarm.peer_id

    async def fetch(self, chunk_map: ChunkMap, per_peer: int = 2, local: Sequence[ChunkSource] = ()) -> BlobFetch:
        self.partial = await self.store.open_partial(chunk_map)
        opener = LaneOpener(
            self.fetcher, MemoryLanes(self.lanes, self.fetcher.peer_id), per_peer, lambda address: address
        )
        return BlobFetch(
            self.fetcher,
            self.partial,
            lambda: dict.fromkeys(self.servers, ()),
            random.Random(1),
            lambda: None,
            opener=opener if per_peer else None,
            throttle=self.limit,
            local=local,
        )

    async def finish(self, data: bytes) -> None:
        await self.partial.finish()
        assert self.store.content(chunk_map_of_bytes(data).sha256) == data


@asynccontextmanager
async def open_site(
    count: int = 1, data: bytes = LARGE, limit: Throttle | None = None, lanes: bool = True
) -> AsyncIterator[Site]:
    network = MemoryNetwork()
    site = Site(network, limit)
    async with network.open_swarm(SeededSigner(99)) as site.fetcher, trio.open_nursery() as nursery:
        ready = trio.Event()
        for seed in range(count):
            nursery.start_soon(run_server, site, seed + 1, data, lanes, count, ready)
        await ready.wait()
        yield site
        nursery.cancel_scope.cancel()


async def run_server(site: Site, seed: int, data: bytes, lanes: bool, count: int, ready: trio.Event) -> None:
    async with site.network.open_swarm(SeededSigner(seed)) as swarm:
        await site.serve(swarm, data, lanes)
        if len(site.servers) == count:
            ready.set()
        await trio.sleep_forever()


async def until_open(site: Site, count: int) -> None:
    while True:
        if len(site.lanes.open) >= count:
            return
        await trio.sleep(0.1)


async def until_carried(site: Site, count: int) -> None:
    while True:
        if len(site.lanes.carried) >= count:
            return
        await trio.sleep(0.001)


async def test_a_large_blob_comes_over_two_lanes_of_its_only_source_and_nothing_over_the_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        (peer,) = site.servers
        most = 0
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal most
                while True:
                    most = max(most, fetch.lanes(peer))
                    await trio.sleep(0.001)

            nursery.start_soon(look)
            await fetch.run()
            nursery.cancel_scope.cancel()
        assert most == 2
        assert fetch.lanes(peer) == 0
        assert not site.lanes.open
        assert sorted(index for _, _, index in site.lanes.carried) == list(range(40))
        assert fetch.view().sources[peer].bytes == len(LARGE)
        await site.finish(LARGE)


async def test_each_of_several_sources_gets_one_lane(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(3) as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        counts = []
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                while True:
                    counts.append(max(fetch.lanes(peer) for peer in site.servers))
                    await trio.sleep(0.001)

            nursery.start_soon(look)
            await fetch.run()
            nursery.cancel_scope.cancel()
        assert max(counts) == 1
        assert {server for server, _, _ in site.lanes.carried} == set(site.servers)
        await site.finish(LARGE)


async def test_a_small_blob_uses_no_lane(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(data=SMALL) as site:
        fetch = await site.fetch(chunk_map_of_bytes(SMALL))
        await fetch.run()
        assert not site.lanes.carried
        await site.finish(SMALL)


@pytest.mark.parametrize("per_peer", [0, 2])
async def test_without_lanes_on_either_end_chunks_ride_the_control_connection(
    autojump_clock: trio.testing.MockClock, per_peer: int
) -> None:
    async with open_site(lanes=per_peer == 0) as site:
        began_s = trio.current_time()
        fetch = await site.fetch(chunk_map_of_bytes(LARGE), per_peer)
        await fetch.run()
        assert not site.lanes.carried
        assert trio.current_time() - began_s < 1
        await site.finish(LARGE)


async def test_where_the_lane_port_is_blocked_a_second_is_lost_and_lanes_are_tried_again_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site(limit=Metered(500_000)) as site:
        site.lanes.blocked = set(site.servers)
        began_s = trio.current_time()
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await trio.sleep(3.5)
            assert fetch.done_bytes > 0
            assert not site.lanes.carried
            site.lanes.blocked = set()
        assert site.lanes.carried
        assert trio.current_time() - began_s > RETRY_S
        await site.finish(LARGE)


async def test_lanes_that_are_cut_in_the_middle_cost_nothing_but_what_was_on_them(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        (peer,) = site.servers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await until_carried(site, 10)
            assert site.lanes.cut(peer) == 2
        assert len(site.lanes.carried) < 40  # the rest came over the stream
        view = fetch.view()
        assert view.bytes_wasted == 0
        assert view.sources[peer].bytes == len(LARGE)
        await site.finish(LARGE)


async def test_lanes_that_are_lost_are_opened_anew_soon_and_less_soon_each_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site(limit=Metered(500_000)) as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        (peer,) = site.servers
        back_s = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            for _ in range(3):
                await until_open(site, 2)
                assert site.lanes.cut(peer) == 2
                cut_s = trio.current_time()
                await until_open(site, 1)
                back_s.append(trio.current_time() - cut_s)
        assert back_s == pytest.approx([LOST_S, 2 * LOST_S, 4 * LOST_S], abs=0.3)
        assert fetch.view().bytes_wasted == 0
        await site.finish(LARGE)


async def test_one_lane_that_is_cut_leaves_its_chunks_to_the_other(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await until_carried(site, 10)
            next(iter(site.lanes.open)).end(lost=True)
        assert sorted({index for _, _, index in site.lanes.carried}) == list(range(40))
        await site.finish(LARGE)


async def test_a_liar_over_lanes_is_banned_and_no_bad_byte_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(3) as site:
        liar = next(iter(site.servers))
        site.lanes.liars = {liar}
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        await fetch.run()
        view = fetch.view()
        assert view.sources[liar].strikes >= 1
        assert view.sources[liar].bytes == 0
        assert all(not source.strikes for peer, source in view.sources.items() if peer != liar)
        await site.finish(LARGE)


async def test_a_full_disk_met_on_a_lane_ends_the_fetch_and_keeps_what_came(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))

        async def fill() -> None:
            await until_carried(site, 10)
            site.store.full = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            with pytest.raises(StoreFull):
                await fetch.run()
        assert site.partial.haves.total >= 9
        assert not site.lanes.open


async def test_a_cancelled_fetch_leaves_no_lane_open_on_either_end(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await until_carried(site, 10)
            nursery.cancel_scope.cancel()
        await trio.sleep(0.1)
        assert not site.lanes.open
        assert fetch.done_bytes <= site.partial.haves.total * CHUNK_BYTES


@pytest.mark.parametrize("full", [False, True])
async def test_chunks_that_were_written_while_a_fetch_ended_are_kept(full: bool) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        (peer,) = site.servers
        for index in range(3):  # as the thread of a lane does
            site.partial.write_blocking(index, LARGE[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        told: list[SourceEvent] = [Stored(peer, index, CHUNK_BYTES) for index in range(3)]
        for event in [Unwritten(peer, StoreFull()), *told] if full else told:
            fetch._inbox.put(event)
        with trio.CancelScope() as scope:
            if full:
                with pytest.raises(StoreFull):
                    await fetch.run()
            else:
                scope.cancel()
                await fetch.run()
        assert site.partial.haves.total == 3
        assert fetch.done_bytes == 3 * CHUNK_BYTES


async def test_lanes_end_with_the_control_connection(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        (peer,) = site.servers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await until_carried(site, 10)
            await site.fetcher.disconnect(peer)
            await trio.sleep(0.01)
            assert not site.lanes.open
            nursery.cancel_scope.cancel()


async def test_a_source_that_is_connected_anew_is_asked_at_once_however_often_it_failed_before(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site(limit=Metered(4 * CHUNK_BYTES), lanes=False) as site:
        fetch = await site.fetch(chunk_map_of_bytes(LARGE))
        (peer,) = site.servers
        (server,) = [each for each in site.network._swarms.values() if each.peer_id == peer]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await trio.sleep(2)
            for away_s in (0.1, 25.0):
                await site.fetcher.disconnect(peer)
                await trio.sleep(away_s)
                had = fetch.done_bytes
                await site.fetcher.dial(peer, server.addresses)
                await trio.sleep(1.5)  # a look for sources, and a chunk
                assert fetch.done_bytes > had
            nursery.cancel_scope.cancel()


class Metered:
    """A limit of ``rate`` bytes a second each way, in virtual time."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_s: dict[str, float] = {}

    def piece(self, direction: str) -> int:
        return CHUNK_BYTES

    def reserve(self, peer: PeerId, direction: str, size: int) -> float:
        now = trio.current_time()
        begins_s = max(now, self._free_s.get(direction, 0.0))
        self._free_s[direction] = begins_s + size / self._rate
        return begins_s - now


@pytest.mark.parametrize("per_peer", [0, 2])
async def test_limits_hold_over_lanes_and_streams_and_no_source_counts_as_silent(
    autojump_clock: trio.testing.MockClock, per_peer: int
) -> None:
    async with open_site(limit=Metered(400_000)) as site:
        began_s = trio.current_time()
        fetch = await site.fetch(chunk_map_of_bytes(LARGE), per_peer)
        await fetch.run()
        took_s = trio.current_time() - began_s
        assert len(LARGE) / 400_000 * 0.9 < took_s < len(LARGE) / 400_000 * 1.15
        assert fetch.view().bytes_wasted == 0
        await site.finish(LARGE)


class Stick:
    """A bundle on a stick that has ``indexes`` of LARGE."""

    name = "stick"

    def __init__(self, indexes: set[int], wrong: frozenset[int] = frozenset()) -> None:
        self.indexes, self.wrong = indexes, wrong
        self.map = chunk_map_of_bytes(LARGE)

    async def haves(self, digest: Sha256) -> Haves | None:
        await trio.lowlevel.checkpoint()
        haves = Haves.none(self.map.count)
        for index in self.indexes:
            haves = haves.with_chunk(index)
        return haves if digest == self.map.sha256 else None

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        await trio.sleep(0.01)
        if index not in self.indexes:
            raise BlobNotFound("not on the stick")
        offset, length = self.map.span(index)
        return bytes(length) if index in self.wrong else LARGE[offset : offset + length]


async def test_a_bundle_on_a_stick_is_one_more_source(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        stick = Stick(set(range(20)))
        fetch = await site.fetch(chunk_map_of_bytes(LARGE), local=[stick])
        await fetch.run()
        sources = fetch.view().sources
        assert sources[name_of(stick)].chunks > 0
        assert sum(source.bytes for source in sources.values()) >= len(LARGE)
        await site.finish(LARGE)


async def test_a_stick_alone_is_enough_and_a_damaged_one_is_struck(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        site.servers.clear()
        fetch = await site.fetch(chunk_map_of_bytes(LARGE), local=[Stick(set(range(40)))])
        await fetch.run()
        await site.finish(LARGE)
    async with open_site() as site:
        stick = Stick(set(range(40)), wrong=frozenset({3}))
        fetch = await site.fetch(chunk_map_of_bytes(LARGE), local=[stick])
        await fetch.run()
        assert fetch.view().sources[name_of(stick)].strikes <= 1
        await site.finish(LARGE)


@pytest.mark.parametrize(
    ("address", "ip"),
    [
        ("/ip4/127.0.0.1/tcp/11435", "127.0.0.1"),
        ("/ip6/fe80::1/tcp/11435", "fe80::1"),
        ("/memory/1", None),
        ("/ip4/1.2.3.4/udp/1/quic", None),
        ("/ip4/1.2.3.4/tcp/1/p2p/X/p2p-circuit", None),
        ("", None),
    ],
)
def test_lanes_go_to_the_address_of_a_direct_tcp_connection(address: str, ip: str | None) -> None:
    assert try_ip(address) == ip
