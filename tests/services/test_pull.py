"""Pulls over a network in memory, in virtual time."""

from __future__ import annotations

import pytest
import trio.testing

from meshmax.base.errors import InvalidName, NoProviders
from meshmax.base.model import CHUNK_BYTES
from tests.services.pull_site import NAME, model_bytes, open_site, sha256_of


async def test_a_model_is_pulled_from_one_source_and_told_in_ollamas_words(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        data = model_bytes(6)
        stored = await a.hold(data)
        values = await c.pull()
        last = values[-1]
        assert (last.state, last.phase) == ("done", "success")
        assert last.bytes_done == last.bytes_total == stored.manifest.size
        assert c.store.blobs.content(sha256_of(data)) == data
        phases = list(dict.fromkeys(value.phase for value in values))
        blobs = [stored.manifest.config, *stored.manifest.layers]  # small ones first
        assert phases == [
            "pulling manifest",
            *(f"pulling {blob.digest[:12]}" for blob in blobs),
            "verifying sha256 digest",
            "writing manifest",
            "success",
        ]
        assert last.peers[a.peer_id].bytes == stored.manifest.size
        assert [(model.name, model.manifest.digest) for model in c.told] == [(NAME, stored.manifest.digest)]
        assert c.told[0].record == a.record_of(stored)
        assert c.pulls.transfers()[0] == last
        assert c.pulls.partials() == ()


async def test_three_sources_share_the_work(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        sources = [await site.peer() for _ in range(3)]
        data = model_bytes(60)
        stored = await sources[0].hold(data)
        for source in sources[1:]:
            await source.hold(data, record=sources[0].record_of(stored))
        c = await site.peer()
        last = (await c.pull())[-1]
        assert last.state == "done"
        assert all(last.peers[source.peer_id].bytes >= 10 * CHUNK_BYTES for source in sources)
        assert last.bytes_wasted <= 2 * CHUNK_BYTES


async def test_a_model_that_nobody_has_is_refused_in_ollamas_words_before_anything_begins(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        with pytest.raises(NoProviders, match="pull model manifest: file does not exist"):
            await c.pull("nothing:latest")
        await a.hold(model_bytes(2))
        a.state = None
        with pytest.raises(NoProviders, match="no peer that can be reached"):
            await c.pull()
        with pytest.raises(InvalidName):
            await c.pull("../etc")
        assert c.pulls.transfers() == ()


async def test_a_model_that_is_here_is_done_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        await a.hold(model_bytes(2))
        await c.pull()
        site.network.kill(a.peer_id)
        (value,) = await c.pull()
        assert (value.state, value.phase) == ("done", "success")
        assert value.bytes_done == value.bytes_total > 0
