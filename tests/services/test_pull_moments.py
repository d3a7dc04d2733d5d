"""Pulls that are steered, joined and left at whatever moment of what they do, in virtual time."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy
from meshmax.base.model import ChunkMap
from meshmax.services.pull import open_pulls
from meshmax.testing.memory_store import MemoryPartial
from tests.services.pull_site import NAME, Site, SitePeer, in_place, model_bytes, open_site, sha256_of
from tests.services.test_pull_jobs import ended, fetched, shown, until

Clock = trio.testing.MockClock


def closes_slowly(peer: SitePeer, takes_s: float) -> None:
    """Its disk takes a while to sync a partial that is let go of."""
    blobs = peer.store.blobs
    opens = blobs.open_partial

    async def open_partial(chunk_map: ChunkMap) -> MemoryPartial:
        partial = await opens(chunk_map)
        closes = partial.aclose

        async def aclose() -> None:
            await trio.sleep(takes_s)
            await closes()

        partial.aclose = aclose  # type: ignore[method-assign]
        return partial

    blobs.open_partial = open_partial  # type: ignore[method-assign]


async def holder_and_puller(site: Site, chunks: int) -> tuple[SitePeer, SitePeer, bytes]:
    a, c = await site.peer(), await site.peer()
    data = model_bytes(chunks)
    await a.hold(data)
    closes_slowly(c, 2.0)
    return a, c, data


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
async def test_who_pulls_what_was_just_cancelled_gets_it_at_whatever_moment_it_comes(
    after_s: float, watched: bool, autojump_clock: Clock
) -> None:
    async with open_site() as site:
        _, c, data = await holder_and_puller(site, 40)
        begun = await c.pulls.start_download(NAME)
        await fetched(c, begun.id, 10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(c.pulls.steer, begun.id, "cancel")
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(after_s)
            if watched:
                assert (await c.pull())[-1].state == "done"
            else:
                again = await c.pulls.start_download(NAME)
                assert (await ended(c, again.id)).state == "done"
        assert c.store.blobs.content(sha256_of(data)) == data
        assert shown(c, begun.id).state == "cancelled"
        await until(lambda: c.kept == ())


async def test_a_peer_that_asks_for_a_pull_while_this_one_ends_hears_so(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, c = await site.peer(), await site.peer()
        stored = await a.hold(model_bytes(2))
        digest = stored.manifest.digest
        async with open_pulls(
            c.swarm, c.store, c, c, random=random.Random(1), run_sync=in_place, on_stored=c.on_stored
        ) as pulls:
            pass
        # Its streams outlive its pulls by a moment.
        with pytest.raises(Busy, match="shutting down"):
            await pulls.accept(a.peer_id, NAME, digest)
        with pytest.raises(Busy, match="shutting down"):
            async with pulls.open_asked(a.peer_id, NAME, digest):
                pass
