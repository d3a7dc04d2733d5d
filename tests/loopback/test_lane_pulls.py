"""Pulls over real lanes: TCP on loopback, worker threads, files; the control connections are in memory, but for one test."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from meshmax.base.errors import StoreFull
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.net.lanes import TcpLanes, open_lanes
from meshmax.ports import ChunkReader, Partial
from meshmax.services.blob_server import BlobServer
from meshmax.services.lane_client import LaneOpener
from meshmax.services.lane_server import LaneServer, open_lane_server
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.services.pull_blob import BlobFetch
from meshmax.store import Store, open_store
from meshmax.testing.gguf import build_gguf
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.testing.process import PeerProcess, meet, peers, start_peer
from meshmax.testing.process import until as eventually
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.store.fakes import FullDisk

pytestmark = pytest.mark.loopback

DATA = random.Random(5).randbytes(48 * CHUNK_BYTES + 1000)
MAP = chunk_map_of_bytes(DATA)
PROMPTLY_S = 20.0  # for what takes milliseconds on an idle machine
T = TypeVar("T")


async def in_thread(work: Callable[[], T], /) -> T:
    return await trio.to_thread.run_sync(work)


class Lying:
    """Flips a bit of every chunk after it was verified."""

    def __init__(self, truth: ChunkReader) -> None:
        self._truth = truth

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        size = self._truth.read_chunk_into(digest, index, buffer)
        buffer[7] ^= 1
        return size


class Slow:
    """Takes a moment over every chunk, so that there is a middle."""

    def __init__(self, truth: ChunkReader) -> None:
        self._truth = truth

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        time.sleep(0.02)
        return self._truth.read_chunk_into(digest, index, buffer)


class Peer:
    def __init__(self, swarm: MemorySwarm, store: Store, lanes: TcpLanes, disk: FullDisk) -> None:
        self.swarm, self.store, self.lanes, self.disk = swarm, store, lanes, disk
        self.outflow = Outflow()

    def opener(self, per_peer: int = 2) -> LaneOpener:
        return LaneOpener(self.swarm, self.lanes, per_peer, lambda address: "127.0.0.1")

    @asynccontextmanager
    async def fetching(self, *sources: Peer) -> AsyncIterator[tuple[BlobFetch, Partial]]:
        for source in sources:
            await self.swarm.dial(source.swarm.peer_id, source.swarm.addresses)
        file = await self.store.blobs.open_partial(MAP)
        try:
            yield (
                BlobFetch(
                    self.swarm,
                    file,
                    lambda: {source.swarm.peer_id: () for source in sources},
                    random.Random(1),
                    lambda: None,
                    opener=self.opener(),
                ),
                file,
            )
        finally:
            await file.aclose()

    def sent(self) -> int:
        """Bytes of blobs that went out over lanes."""
        return sum(transfer.bytes_done for transfer in self.outflow.transfers())


class Site:
    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.network = MemoryNetwork()
        self.count = 0

    async def peer(
        self,
        whole: bool = False,
        reader: Callable[[ChunkReader], ChunkReader] = lambda truth: truth,
        allow: bool = True,
    ) -> Peer:
        self.count += 1
        enter, home, disk = self.stack.enter_async_context, self.folder / str(self.count), FullDisk()
        store = await enter(open_store(home / "models", home / "state", in_thread, disk))
        swarm = await enter(self.network.open_swarm(SeededSigner(self.count)))
        lanes = await enter(open_lanes(swarm.peer_id, [("127.0.0.1", 0)], lambda ip: allow))
        peer = Peer(swarm, store, lanes, disk)
        if whole:
            file = await store.blobs.open_partial(MAP)
            for index in range(MAP.count):
                offset, length = MAP.span(index)
                await file.write(index, DATA[offset : offset + length])
            await file.finish()
        offers = Offers(time.monotonic)
        BlobServer(store.blobs, offers=offers).register(swarm)
        server = LaneServer(reader(store.blobs), lanes, peer.outflow, offers)
        await enter(open_lane_server(server, swarm, lanes))
        return peer


@asynccontextmanager
async def open_site(folder: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(folder, stack)
    assert await lanes_left() == 0


def lane_threads() -> int:
    return sum(thread.name.startswith("lane with") for thread in threading.enumerate())


async def lanes_left() -> int:
    """After a moment: a thread's name is given back just after its result."""
    with trio.move_on_after(2.0):
        while lane_threads():  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
    return lane_threads()


async def whole(peer: Peer, file: Partial) -> bool:
    await file.finish()
    return (await peer.store.blobs.path(MAP.sha256)).read_bytes() == DATA


async def test_a_blob_moves_over_lanes_and_every_byte_of_it_by_them(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.peer(whole=True), await site.peer()
        async with b.fetching(a) as (fetch, file):
            await fetch.run()
            assert await lanes_left() == 0
            assert a.sent() == len(DATA)
            assert await whole(b, file)


async def test_where_the_lane_port_is_closed_the_control_connection_brings_the_blob(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.peer(whole=True, allow=False), await site.peer()
        async with b.fetching(a) as (fetch, file):
            began_s = trio.current_time()
            await fetch.run()
            assert trio.current_time() - began_s < 60
            assert a.sent() == 0
            assert await whole(b, file)


async def test_a_liar_over_lanes_is_struck_and_the_others_bring_the_blob(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        liar, a, b = await site.peer(True, Lying), await site.peer(True, Slow), await site.peer()
        async with b.fetching(liar, a) as (fetch, file):
            await fetch.run()
            sources = fetch.view().sources
            assert sources[liar.swarm.peer_id].strikes >= 1
            assert sources[liar.swarm.peer_id].bytes == 0
            assert sources[a.swarm.peer_id].strikes == 0
            assert await whole(b, file)


async def test_a_source_whose_lanes_die_in_the_middle_goes_on_by_the_control_connection(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.peer(True, Slow), await site.peer()
        async with b.fetching(a) as (fetch, _), trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await until(lambda: fetch.done_bytes > 8 * CHUNK_BYTES)
            a.lanes.close_peer(b.swarm.peer_id)
            await until(lambda: lane_threads() == 0)
            assert fetch.done_bytes < len(DATA)
        assert fetch.view().bytes_wasted == 0
        assert fetch.done_bytes == len(DATA)


async def test_a_cancelled_fetch_leaves_no_thread_and_keeps_what_came(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.peer(True, Slow), await site.peer()
        async with b.fetching(a) as (fetch, file):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch.run)
                await until(lambda: fetch.done_bytes > 8 * CHUNK_BYTES)
                assert lane_threads() == 4
                began_s = trio.current_time()
                nursery.cancel_scope.cancel()
            assert trio.current_time() - began_s < PROMPTLY_S
            assert fetch.lanes(a.swarm.peer_id) == 0
        assert file.haves.total >= 8
        await until(lambda: lane_threads() == 0)
        async with b.fetching(a) as (fetch, file):
            missing = len(file.haves.missing())
            await fetch.run()
            assert fetch.view().sources[a.swarm.peer_id].chunks == missing
            assert await whole(b, file)


async def test_a_disk_that_fills_up_ends_the_fetch_and_no_thread_is_left(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.peer(True, Slow), await site.peer()
        async with b.fetching(a) as (fetch, file), trio.open_nursery() as nursery:

            async def fill() -> None:
                await until(lambda: fetch.done_bytes > 8 * CHUNK_BYTES)
                b.disk.full = True

            nursery.start_soon(fill)
            with pytest.raises(StoreFull):
                await fetch.run()
            b.disk.full = False
        assert file.haves.total >= 8
        await until(lambda: lane_threads() == 0)


async def test_a_peer_serves_over_lanes_what_it_fetches_over_lanes(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await site.peer(True, Slow), await site.peer(), await site.peer()
        async with b.fetching(a) as (first, one), c.fetching(a, b) as (second, other):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.run)
                await until(lambda: first.done_bytes > 4 * CHUNK_BYTES)
                nursery.start_soon(second.run)
            assert second.view().sources[b.swarm.peer_id].bytes > 0
            assert b.sent() > 0
            assert await whole(b, one)
            assert await whole(c, other)


def test_peers_move_a_model_over_two_lanes_and_without_any_where_that_is_configured(tmp_path: Path) -> None:
    size = 256 << 20
    with peers(tmp_path, "a", "b") as (a, b):
        c = start_peer(tmp_path / "c", "--name", "c", lanes_per_peer="0")
        try:
            meet(a, b, c)
            (tmp_path / "m.gguf").write_bytes(build_gguf(tensor_bytes=size))
            a.run("add", "big", str(tmp_path / "m.gguf"))
            for puller, most in ((b, 2), (c, 0)):
                eventually("it is listed", partial(lists, puller))
                assert lanes_seen(puller) == most
                assert puller.get("/api/v1/transfers")["transfers"][0]["state"] == "done"
        finally:
            c.stop()


def lists(peer: PeerProcess) -> bool:
    return any(model["name"] == "big:latest" for model in peer.get("/api/tags")["models"])


def lanes_seen(peer: PeerProcess) -> int:
    """Pull, and the most lanes that one source had meanwhile."""
    most = 0
    pull = threading.Thread(target=partial(peer.run, "pull", "big"))
    pull.start()
    while pull.is_alive():
        for transfer in peer.get("/api/v1/transfers")["transfers"][:1]:
            most = max([most, *(source["lanes"] for source in transfer["peers"].values())])
        time.sleep(0.01)
    pull.join()
    return most


async def until(there: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while True:
            if there():
                return
            await trio.sleep(0.005)
