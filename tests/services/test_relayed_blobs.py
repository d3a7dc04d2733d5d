"""Chunks over a relay, over real libp2p in virtual time: little of them, slowly, and no more whatever the other side says."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
import trio

from meshmax.base.errors import NoProviders
from meshmax.base.model import CHUNK_BYTES
from meshmax.core import relay_quota
from meshmax.core.relay_quota import RelayQuota
from meshmax.services.blob_server import BlobServer
from meshmax.services.frames import FrameStream
from meshmax.services.pull_blob import BlobFetch
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.wire import blob as wire
from meshmax.wire.protocols import BLOB
from tests.services.relay_site import Host, RelaySite, exchange, open_site, until

CHUNKS = 4  # in an hour, here: the tests are as quick as the cipher
SHARE_BYTES = CHUNKS * CHUNK_BYTES
HOUR_S = 400.0
DATA = random.Random(1).randbytes(CHUNK_BYTES * (CHUNKS + 3))


@pytest.fixture(autouse=True)
def small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_quota, "RELAY_BLOB_BYTES", SHARE_BYTES)
    monkeypatch.setattr(relay_quota, "RELAY_HOUR_S", HOUR_S)


async def relayed_pair(site: RelaySite) -> tuple[Host, Host, MemoryBlobStore]:
    """A fetcher, and a server with DATA that it reaches over a relay."""
    await site.relay()
    a, b = await site.member(), await site.member()
    store = MemoryBlobStore()
    store.add(DATA)
    BlobServer(store).register(b.swarm)
    await until(lambda: b.client.relays)
    await a.client.connect(b.peer_id, b.client.addresses[0])
    return a, b, store


async def fetch_of(a: Host, sources: list[Host], quota: RelayQuota, patience_s: float = 1e9) -> BlobFetch:
    store = MemoryBlobStore()
    partial = await store.open_partial(MemoryBlobStore().add(DATA))
    peers = {source.peer_id: () for source in sources}
    return BlobFetch(a.swarm, partial, lambda: peers, random.Random(1), lambda: None, lambda: patience_s, quota=quota)


async def test_an_hours_share_comes_slowly_then_it_waits_until_the_path_is_better(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, _ = await relayed_pair(site)
        fetch = await fetch_of(a, [b], RelayQuota())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            assert fetch.relay_left_bytes() is None  # nobody is asked yet
            await trio.sleep(30)
            assert fetch.relay_left_bytes() == SHARE_BYTES - fetch.done_bytes
            waits_at_first = fetch.waits_for_quota
            assert not waits_at_first
            assert fetch.done_bytes <= 40 * 64 * 1024
            began = trio.current_time()
            await exchange(a, b)
            assert trio.current_time() - began < 1  # it holds nobody up
            await until(lambda: fetch.done_bytes == SHARE_BYTES, 700)
            await trio.sleep(60)
            assert fetch.done_bytes == SHARE_BYTES
            assert fetch.stuck_since_s is not None
            assert fetch.waits_for_quota
            assert re.match(
                rf"only a relay leads to {b.peer_id}: 32 MiB of this hour are used, more in \d+ min, or at once when a "
                r"direct path is found \(meshmax doctor\)$",
                fetch.lacking(),
            )
            site.wires.heal(a.ip, b.ip)
            await a.swarm.dial(b.peer_id, b.swarm.addresses, better=True)
            await until(lambda: fetch.done_bytes == len(DATA), 30)


async def test_it_goes_on_in_the_next_hour(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, _ = await relayed_pair(site)
        quota = RelayQuota()
        quota.note(b.peer_id, SHARE_BYTES, trio.current_time())
        fetch = await fetch_of(a, [b], quota)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await trio.sleep(60)
            assert fetch.done_bytes == 0
            await trio.sleep(HOUR_S + 60)
            assert fetch.done_bytes > CHUNK_BYTES
            nursery.cancel_scope.cancel()


async def test_who_does_not_want_to_wait_is_told_why(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, _ = await relayed_pair(site)
        quota = RelayQuota()
        quota.note(b.peer_id, SHARE_BYTES, trio.current_time())
        fetch = await fetch_of(a, [b], quota, patience_s=5)
        with pytest.raises(NoProviders, match="only a relay leads to"):
            await fetch.run()


async def test_a_fetcher_that_does_not_count_gets_no_more(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, store = await relayed_pair(site)
        chunk_map = store.add(DATA)
        frames = FrameStream(await a.swarm.open_stream(b.peer_id, BLOB))
        await frames.send(wire.FROM_FETCHER, wire.open_blob(chunk_map.sha256))
        got, busy = 0, []
        for index in range(chunk_map.count):
            await frames.send(wire.FROM_FETCHER, wire.Want(index))
            while True:
                message = await frames.receive(wire.FROM_SERVER)
                if isinstance(message, wire.Busy):
                    busy.append(message.retry_after_s)
                    break
                if isinstance(message, wire.ChunkPart):
                    got += len(message.data)
                    if message.offset + len(message.data) == CHUNK_BYTES:
                        break
        assert got == SHARE_BYTES
        assert len(busy) == 3
        assert all(200 < pause_s <= HOUR_S for pause_s in busy)


async def test_a_source_that_is_reached_directly_brings_everything(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, _ = await relayed_pair(site)
        c = await site.member([])
        site.wires.heal(a.ip, c.ip)
        store = MemoryBlobStore()
        store.add(DATA)
        BlobServer(store).register(c.swarm)
        await a.swarm.dial(c.peer_id, c.swarm.addresses)
        fetch = await fetch_of(a, [b, c], RelayQuota())
        with trio.fail_after(60):
            await fetch.run()
        sources = fetch.view().sources
        assert sources[c.peer_id].chunks >= CHUNKS


async def test_what_the_other_side_has_counted_ends_the_share_too_and_is_told(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, _ = await relayed_pair(site)
        for partly in (await fetch_of(a, [b], RelayQuota()), await fetch_of(a, [b], RelayQuota())):  # the second forgot
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partly.run)
                await until(lambda fetch=partly: fetch.waits_for_quota, 200)
                await trio.sleep(120)  # the other side ends a session without work meanwhile
                assert partly.waits_for_quota
                assert "32 MiB of this hour are used" in partly.lacking()
                nursery.cancel_scope.cancel()
        assert partly.done_bytes == 0


async def test_a_fetch_that_may_wait_without_end_goes_on_when_the_share_is_new(autojump_clock: Any) -> None:
    async with open_site() as site:
        a, b, _ = await relayed_pair(site)
        quota = RelayQuota()
        quota.note(b.peer_id, SHARE_BYTES, trio.current_time())
        fetch = await fetch_of(a, [b], quota)
        fetch._patience_s = lambda: math.inf if fetch.waits_for_quota else 300.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch.run)
            await until(lambda: fetch.done_bytes > 0, HOUR_S + 60)
            nursery.cancel_scope.cancel()
