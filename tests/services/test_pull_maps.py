"""Blobs of which only the sha256 is known: chunk maps on trial, true ones and lies."""

from __future__ import annotations

import msgspec
import trio.testing

from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, StoredModel
from meshmax.base.names import parse_name
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.services.pull_site import NAME, SitePeer, model_bytes, open_site, sha256_of

Clock = trio.testing.MockClock
CHUNKS = 20


async def lie(peer: SitePeer, stored: StoredModel, digest: Sha256, index: int) -> None:
    """Let ``peer`` have, and swear by, other bytes in one chunk of the blob ``digest``, its sha256 claimed to be right."""
    blob = peer.store.blobs.blobs[digest]
    blob.data[index * CHUNK_BYTES] ^= 1
    blob.chunk_map = msgspec.structs.replace(chunk_map_of_bytes(bytes(blob.data)), sha256=digest)
    await peer.store.models.put(parse_name(NAME), stored.manifest.raw, None)


async def test_a_model_that_nobody_signed_is_pulled_by_a_holders_map(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(CHUNKS)
        await a.hold(data, signed=False)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert c.store.blobs.content(sha256_of(data)) == data
        assert c.told[0].record is None


async def test_a_signed_record_is_preferred_to_none(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(CHUNKS)
        await a.hold(data, signed=False)
        await b.hold(data)
        assert (await c.pull())[-1].state == "done"
        assert c.told[0].record is not None


async def test_a_false_map_is_condemned_with_its_provider_and_what_both_maps_agree_on_is_kept(
    autojump_clock: Clock,
) -> None:
    async with open_site() as site:
        liar, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(CHUNKS)
        stored = await liar.hold(data, signed=False)
        await b.hold(data, signed=False)
        digest = sha256_of(data)
        await lie(liar, stored, digest, 7)
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert c.store.blobs.content(digest) == data
        assert last.peers[liar.peer_id].strikes >= 1
        assert last.peers[b.peer_id].strikes == 0  # it sent what the false map did not know, which was true
        served = sorted(liar.served(digest) + b.served(digest))
        assert served.count(7) <= 4  # by each map: once of whom it makes a liar, and once of the other
        assert len(served) <= CHUNKS + 4


async def test_a_false_map_whose_provider_vanishes_is_put_aside_for_another(autojump_clock: Clock) -> None:
    async with open_site() as site:
        liar, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(CHUNKS)
        stored = await liar.hold(data, signed=False)
        await b.hold(data, signed=False)
        digest = sha256_of(data)
        for index in range(1, CHUNKS):
            await lie(liar, stored, digest, index)
        last = None
        async with c.pulls.open_pull(NAME) as values:
            async for last in values:
                if last.phase == f"pulling {digest[:12]}" and not liar.swarm.closed:
                    site.network.kill(liar.peer_id)
        assert last is not None
        assert last.state == "done"
        assert c.store.blobs.content(digest) == data
        assert trio.current_time() < 60


async def test_when_every_map_is_false_the_pull_ends_and_keeps_nothing_of_the_blob(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b, c = await site.peer(), await site.peer(), await site.peer()
        data = model_bytes(CHUNKS)
        digest = sha256_of(data)
        for index, peer in enumerate((a, b)):
            stored = await peer.hold(data, signed=False)
            await lie(peer, stored, digest, index)
        last = (await c.pull())[-1]
        assert (last.state, last.error_code) == ("failed", "integrity")
        assert "digest mismatch" in last.reason
        assert await c.store.blobs.haves(digest) is None
        assert c.store.blobs.open_partials == set()
        d = await site.peer()
        await d.hold(data, signed=False)
        assert (await c.pull())[-1].state == "done"


async def test_a_true_map_among_sources_that_lie_about_chunks_is_not_given_up(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(CHUNKS)
        await a.hold(data, signed=False)
        digest = sha256_of(data)
        late = await site.peer()
        await late.hold(data, signed=False)
        late.state = None
        liar = await site.peer()
        await liar.hold(data, signed=False)
        blob = liar.store.blobs.blobs[digest]
        for index in range(CHUNKS):
            blob.data[index * CHUNK_BYTES] ^= 1
        liar.store.blobs.blobs[digest].chunk_map = chunk_map_of_bytes(bytes(blob.data))  # serves what is not the blob
        last = None
        async with c.pulls.open_pull(NAME) as values:
            async for last in values:
                if last.bytes_done > 5 * CHUNK_BYTES and not a.swarm.closed:
                    site.network.kill(a.peer_id)
                if last.state == "waiting":
                    late.state = "disk"
        assert last is not None
        assert last.state == "done"
        assert c.store.blobs.content(digest) == data
