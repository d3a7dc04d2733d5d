"""Pulls when sources die, lie, freeze or are only half there, and when the disk is full; in virtual time."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.events import Transfer
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, Signed, StoredModel
from meshmax.base.names import ModelName, parse_name
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.pull_job import FULL_WAIT_S, WATCHED_WAIT_S
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.wire import blob
from meshmax.wire.chunkmap import chunk_map_of_bytes
from meshmax.wire.protocols import BLOB
from tests.services.pull_site import NAME, SitePeer, Store, model_bytes, open_site, sha256_of


class LyingBlobs(MemoryBlobStore):
    """Flips a bit of the chunks ``lies`` as it serves them."""

    lies: frozenset[int] = frozenset()

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        data = await super().read_chunk(digest, index)
        return bytes([data[0] ^ 1]) + data[1:] if index in self.lies else data


class LyingStore(Store):
    def __init__(self, lies: set[int]) -> None:
        super().__init__()
        self.blobs.__class__ = LyingBlobs
        assert isinstance(self.blobs, LyingBlobs)
        self.blobs.lies = frozenset(lies)


async def hold_alike(data: bytes, first: SitePeer, *others: SitePeer) -> None:
    """Let all of them have the same model under the record of the first."""
    stored = await first.hold(data)
    for other in others:
        await other.hold(data, record=first.record_of(stored))


async def pull_until(peer: SitePeer, share: float) -> Transfer:
    """Pull, and stop watching when that share is here."""
    async with peer.pulls.open_pull(NAME) as values:
        async for value in values:
            if value.bytes_total and value.bytes_done >= share * value.bytes_total:
                return value
    raise AssertionError("it ended before")


async def test_a_source_that_is_killed_half_way_is_replaced_by_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        await hold_alike(model_bytes(60), a, b)
        last = None
        async with c.pulls.open_pull(NAME) as values:
            async for last in values:
                if last.bytes_done > 20 * CHUNK_BYTES:
                    site.network.kill(a.peer_id)
        assert last is not None
        assert last.state == "done"
        assert last.bytes_wasted == 0
        assert sum(peer.bytes for peer in last.peers.values()) == last.bytes_total


async def test_a_liar_is_named_and_the_pull_completes_from_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        liar, b = await site.peer(LyingStore(set(range(60)))), await site.peer()
        c = await site.peer()
        data = model_bytes(60)
        await hold_alike(data, liar, b)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert last.peers[liar.peer_id].strikes >= 2
        assert last.peers[b.peer_id].strikes == 0
        assert c.store.blobs.content(sha256_of(data)) == data
        assert 0 < last.bytes_wasted <= 8 * CHUNK_BYTES


async def test_when_the_only_source_lies_the_pull_fails_and_says_what_is_missing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        liar, c = await site.peer(LyingStore({3})), await site.peer()
        data = model_bytes(8)
        await liar.hold(data)
        last = (await c.pull())[-1]
        assert (last.state, last.error_code) == ("failed", "no_providers")
        assert "missing 1 of 8 chunks" in last.reason
        assert last.peers[liar.peer_id].strikes == 1


async def test_a_frozen_source_does_not_hold_the_pull_up(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        await hold_alike(model_bytes(60), a, b)
        began_s = trio.current_time()
        last = None
        async with c.pulls.open_pull(NAME) as values:
            async for last in values:
                if last.bytes_done > 20 * CHUNK_BYTES:
                    site.network.freeze(a.peer_id)
        assert last is not None
        assert last.state == "done"
        assert trio.current_time() - began_s < 10


async def test_when_the_only_source_freezes_the_pull_ends_in_bounded_time_and_keeps_what_came(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(40)
        await a.hold(data)
        began_s = trio.current_time()
        last = None
        async with c.pulls.open_pull(NAME) as values:
            async for last in values:
                if last.bytes_done > 10 * CHUNK_BYTES:
                    site.network.freeze(a.peer_id)
        assert last is not None
        assert (last.state, last.error_code) == ("failed", "no_providers")
        assert trio.current_time() - began_s < WATCHED_WAIT_S + 10
        known = await c.store.blobs.haves(sha256_of(data))
        assert known is not None
        assert known[1].total >= 10


async def test_lost_sources_are_waited_for_and_a_new_one_is_taken_up(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        spare = await site.peer(a.store)
        await a.hold(model_bytes(40))
        last = None

        async def come_back() -> None:
            await trio.sleep(WATCHED_WAIT_S - 5)
            spare.state = "disk"

        async with trio.open_nursery() as nursery:
            async with c.pulls.open_pull(NAME) as values:
                async for last in values:
                    if last.bytes_done > 10 * CHUNK_BYTES and not a.swarm.closed:
                        site.network.kill(a.peer_id)
                        nursery.start_soon(come_back)
        assert last is not None
        assert last.state == "done"
        assert set(last.peers) == {a.peer_id, spare.peer_id}


async def test_a_pull_that_was_killed_goes_on_and_fetches_only_what_is_missing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(60)
        stored = await a.hold(data)
        await pull_until(c, 0.5)
        await trio.sleep(1)
        assert [t.state for t in c.pulls.transfers()] == ["cancelled"]
        site.network.kill(c.peer_id)
        known = await c.store.blobs.haves(sha256_of(data))
        assert known is not None
        here = known[1].total
        assert 30 <= here < 60
        a.store.blobs.reads.clear()
        again = await site.peer(c.store)
        last = (await again.pull())[-1]
        assert last.state == "done"
        assert last.bytes_done == stored.manifest.size
        assert sorted(a.served(sha256_of(data))) == sorted(known[1].missing())
        assert last.peers[a.peer_id].bytes <= (60 - here) * CHUNK_BYTES + 1000


async def test_a_full_disk_halts_the_pull_which_goes_on_by_itself_when_there_is_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(30)
        await a.hold(data)
        waited: list[Transfer] = []
        last = None

        async def make_room() -> None:
            await trio.sleep(1000)
            c.store.blobs.full = False

        async with trio.open_nursery() as nursery:
            async with c.pulls.open_pull(NAME) as values:
                async for last in values:
                    if not waited and last.bytes_done > 10 * CHUNK_BYTES:
                        c.store.blobs.full = True
                    if last.state == "waiting":
                        if not waited:
                            nursery.start_soon(make_room)
                        waited.append(last)
        assert last is not None
        assert last.state == "done"
        assert "full" in waited[0].reason
        assert waited[0].bytes_done >= 10 * CHUNK_BYTES
        assert {value.bytes_done for value in waited} == {waited[0].bytes_done}
        assert trio.current_time() < 1000 + 10
        assert c.store.blobs.content(sha256_of(data)) == data


async def test_a_disk_that_stays_full_ends_a_watched_pull_with_its_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(30))
        last = None
        async with c.pulls.open_pull(NAME) as values:
            async for last in values:
                c.store.blobs.full = c.store.blobs.full or last.bytes_done > 10 * CHUNK_BYTES
        assert last is not None
        assert (last.state, last.error_code) == ("failed", "store_full")
        assert FULL_WAIT_S <= trio.current_time() < FULL_WAIT_S + 60
        assert c.store.blobs.open_partials == set()
        c.store.blobs.full = False
        a.store.blobs.reads.clear()
        assert (await c.pull())[-1].state == "done"


async def test_a_peer_serves_onward_what_it_has_while_it_is_still_pulling(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(100)
        await a.hold(data)

        async with b.pulls.open_pull(NAME) as values:
            async for value in values:
                if value.bytes_done > 30 * CHUNK_BYTES:
                    break
            (partial,) = b.pulls.partials()
            assert 0.2 < partial.fraction < 1
            assert partial.names == ("registry.ollama.ai/library/small:latest",)
            last = (await c.pull())[-1]
        assert last.state == "done"
        assert last.peers[b.peer_id].bytes > 20 * CHUNK_BYTES
        assert last.peers[b.peer_id].strikes == 0


async def test_peers_that_have_only_parts_complete_each_other_when_the_seed_is_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(100)
        await a.hold(data)
        done: list[SitePeer] = []

        async def pull(peer: SitePeer) -> None:
            if (await peer.pull())[-1].state == "done":
                done.append(peer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, b)
            nursery.start_soon(pull, c)
            digest = sha256_of(data)
            while True:  # until they have every chunk between them
                await trio.sleep(0.0005)
                known = [await peer.store.blobs.haves(digest) for peer in (b, c)]
                bits = [int.from_bytes(have[1].bits, "little") if have else 0 for have in known]
                if (bits[0] | bits[1]).bit_count() == 100:
                    break
            assert min(held.bit_count() for held in bits) < 100  # the other may have got its last chunk just now
            site.network.kill(a.peer_id)
        assert set(done) == {b, c}


async def test_a_partial_peer_gives_manifest_and_record_too(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        await a.hold(model_bytes(100))
        async with b.pulls.open_pull(NAME) as values:
            async for value in values:
                if value.bytes_done > 30 * CHUNK_BYTES:
                    break
            await a.swarm.disconnect(c.peer_id)
            last = (await c.pull())[-1]
        assert last.state == "done"
        assert set(last.peers) == {b.peer_id}


async def test_a_chunk_that_rotted_on_one_sources_disk_comes_from_another_without_a_strike(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(20)
        await hold_alike(data, a, b)
        for index in range(20):
            a.store.blobs.corrupt(sha256_of(data), index)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert last.peers[b.peer_id].bytes > 19 * CHUNK_BYTES
        assert all(peer.strikes == 0 for peer in last.peers.values())
        assert last.bytes_wasted == 0


async def test_two_pullers_of_one_model_share_one_transfer(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(40)
        stored = await a.hold(data)
        site.names["registry.ollama.ai/library/other:latest"] = stored.manifest.digest
        ends: list[Transfer] = []

        async def pull(name: str) -> None:
            ends.append((await c.pull(name))[-1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, NAME)
            nursery.start_soon(pull, "other")
            await pull_until(c, 0.2)  # one that leaves does not end it for the others
        assert [end.state for end in ends] == ["done", "done"]
        assert len(c.pulls.transfers()) == 1
        assert len(a.served(sha256_of(data))) == 40
        assert {stored.name for stored in c.told} == {NAME, "other:latest"}


async def test_two_models_that_share_a_blob_fetch_it_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data, other = model_bytes(20), model_bytes(20, seed=9)
        await a.hold(data)
        await a.hold(other, "other:latest")
        assert a.store.blobs.whole(sha256_of(data))
        ends: list[Transfer] = []

        async def pull(name: str) -> None:
            ends.append((await c.pull(name))[-1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, NAME)
            nursery.start_soon(pull, "other")
        assert [end.state for end in ends] == ["done", "done"]


async def test_chunks_that_are_not_the_blob_condemn_their_publisher_and_another_publishers_record_is_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(5)
        stored = await a.hold(data)
        digest = sha256_of(data)
        rotten = a.store.blobs.blobs[digest]
        rotten.data[7] ^= 1
        whole = chunk_map_of_bytes(bytes(rotten.data))
        rotten.chunk_map = msgspec.structs.replace(whole, sha256=digest)  # a map of other bytes, and signed
        await a.store.models.put(parse_name(NAME), stored.manifest.raw, a.record_of(stored))
        last = (await c.pull())[-1]
        assert (last.state, last.error_code) == ("failed", "integrity")
        assert "digest mismatch" in last.reason
        assert a.peer_id in last.reason
        assert await c.store.blobs.haves(digest) is None
        b = await site.peer()
        await b.hold(data)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert c.store.blobs.content(digest) == data


async def test_a_peer_of_another_version_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        await hold_alike(model_bytes(10), a, b)
        a.swarm._answers.clear()
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert set(last.peers) == {b.peer_id}


async def test_a_peer_that_talks_garbage_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        await hold_alike(model_bytes(10), a, b)

        async def garbage(stream: Stream) -> None:
            await stream.send_all(b"\xff" * 5000)
            await trio.sleep_forever()

        for protocol in tuple(a.swarm._answers):
            a.swarm.serve(protocol, garbage)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert set(last.peers) == {b.peer_id}


async def test_a_peer_that_sends_what_was_not_asked_for_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(10)
        await hold_alike(data, a, b)

        async def eager(stream: Stream) -> None:
            frames = FrameStream(stream)
            opened = await frames.receive(blob.FROM_FETCHER)
            assert isinstance(opened, blob.Open)
            known = await a.store.blobs.haves(Sha256(opened.digest))
            assert known is not None
            await frames.send(blob.FROM_SERVER, blob.have_of(known[1]))
            for index in range(1000):
                await frames.send(blob.FROM_SERVER, blob.ChunkPart(index, 0, bytes(blob.PART_BYTES)))

        a.swarm.serve(BLOB, eager)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert a.peer_id not in last.peers or last.peers[a.peer_id].bytes == 0
        assert len(c.swarm.connections()) == 2


async def test_a_blob_that_was_here_and_is_deleted_before_the_model_has_its_name_is_fetched_after_all(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data, extra = model_bytes(4), model_bytes(2, seed=9)
        await a.hold_two_layers(data, extra, NAME)
        await c.hold(data, "mine:latest")
        put = c.store.models.put
        deleted: list[str] = []

        async def put_late(name: ModelName, raw: bytes, record: Signed | None) -> StoredModel:
            if not deleted:
                deleted.append("mine")
                await c.store.models.delete(parse_name("mine"))
                assert not c.store.blobs.whole(sha256_of(data))
            return await put(name, raw, record)

        monkeypatch.setattr(c.store.models, "put", put_late)
        last = (await c.pull())[-1]
        assert (deleted, last.state, last.bytes_done) == (["mine"], "done", last.bytes_total)
        assert c.store.blobs.whole(sha256_of(data))
