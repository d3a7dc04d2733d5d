"""Transfers that end in the middle let go of what they had read and received, and nobody has to look for it as garbage."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio
import trio.testing

from meshmax.base.errors import NoProviders
from meshmax.base.model import CHUNK_BYTES
from meshmax.base.units import KIB
from meshmax.net.swarm import LibrarySwarm
from meshmax.services.blob_server import BlobServer
from meshmax.services.pull_blob import BlobFetch
from meshmax.testing.garbage import collector_off
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import SimNetwork
from meshmax.wire.chunkmap import chunk_map_of_bytes

BLOB = random.Random(5).randbytes(6 * CHUNK_BYTES)
CONNECTION_BYTES = 256 * KIB  # what the one that is open has read ahead, and what is on its way
Clock = trio.testing.MockClock


@asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[LibrarySwarm, LibrarySwarm]]:
    """A fetcher that is connected to a server of BLOB, over the real transport on a simulated cable."""
    network, store = SimNetwork(), MemoryBlobStore()
    store.add(BLOB)
    async with (
        network.open_swarm(SeededSigner(1).private_bytes) as server,
        network.open_swarm(SeededSigner(2).private_bytes) as fetcher,
    ):
        BlobServer(store).register(server)
        await fetcher.dial(server.peer_id, server.addresses)
        yield fetcher, server


async def fetch_for(seconds: float, fetcher: LibrarySwarm, server: LibrarySwarm) -> float:
    """Fetch BLOB for so long at most; the share that came."""
    partial = await MemoryBlobStore().open_partial(chunk_map_of_bytes(BLOB))
    fetch = BlobFetch(fetcher, partial, lambda: {server.peer_id: ()}, random.Random(1), lambda: None, lambda: 3.0)
    with trio.move_on_after(seconds), suppress(NoProviders):
        await fetch.run()
    return fetch.done_bytes / len(BLOB)


async def test_wherever_a_fetch_is_cancelled_neither_end_keeps_a_buffer(autojump_clock: Clock) -> None:
    async with open_pair() as (fetcher, server):
        assert await fetch_for(60.0, fetcher, server) == 1  # what is made once is made
        await trio.sleep(1)
        with collector_off() as left:
            shares = [await fetch_for(0.003 * moment, fetcher, server) for moment in range(1, 30)]
            await trio.sleep(1)
    assert shares[0] == 0
    assert shares[-1] > 0.3
    assert sum(left.buffers) <= CONNECTION_BYTES
    assert not left.rings


async def test_when_a_connection_is_lost_in_the_middle_neither_end_keeps_a_buffer(autojump_clock: Clock) -> None:
    async with open_pair() as (fetcher, server):
        assert await fetch_for(60.0, fetcher, server) == 1
        await trio.sleep(1)
        with collector_off() as left:
            for moment in range(1, 10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(fetch_for, 60.0, fetcher, server)
                    await trio.sleep(0.01 * moment)
                    await server.disconnect(fetcher.peer_id)
                await fetcher.dial(server.peer_id, server.addresses)
            await trio.sleep(1)
    assert sum(left.buffers) <= CONNECTION_BYTES  # rings are left: the library's connections are
