"""A pull cancelled at any moment, or left by its last watcher, leaves no task, stream or open partial, and can go on."""

from __future__ import annotations

import trio
import trio.testing

from meshmax.base.ids import PeerId
from tests.cancel.test_router_infer import tasks_after_a_moment
from tests.services.pull_site import Site, SitePeer, model_bytes, open_site, sha256_of

Clock = trio.testing.MockClock
STEP_S = 0.0005  # half of the network's latency, so that every leg of the exchange is hit


async def left_nothing(asker: SitePeer, holder: SitePeer, idle_tasks: int) -> None:
    assert await tasks_after_a_moment() == idle_tasks
    assert asker.store.blobs.open_partials == set()
    assert asker.pulls.partials() == ()
    assert not asker.pulls._jobs
    assert all(c.opened[asker.peer_id] == 0 for c in asker.swarm._connections.of(holder.peer_id))


async def test_a_pull_left_at_any_moment_leaves_nothing_and_the_next_one_goes_on(autojump_clock: Clock) -> None:
    async with open_site() as site:
        a, b = await site.peer(), await site.peer()
        data = model_bytes(6)
        stored = await a.hold(data)
        await b.hold(data, record=a.record_of(stored))
        c = await site.peer()
        idle_tasks = await tasks_after_a_moment()
        steps = cut = 0
        before = 0
        while not c.told and steps < 400:
            steps += 1
            with trio.move_on_after(steps * STEP_S) as scope:
                await c.pull()
            cut += scope.cancelled_caught
            await left_nothing(c, a, idle_tasks)
            known = await c.store.blobs.haves(sha256_of(data))
            assert (known[1].total if known else 0) >= before  # what was fetched is kept
            before = known[1].total if known else 0
        assert c.told
        assert cut > 10
        assert c.store.blobs.content(sha256_of(data)) == data
        states = {transfer.state for transfer in c.pulls.transfers()}
        assert states == {"cancelled", "done"}


async def test_a_source_that_vanishes_at_any_moment_is_replaced(autojump_clock: Clock) -> None:
    for step in range(0, 60, 2):
        async with open_site() as site:
            a, b = await site.peer(), await site.peer()
            data = model_bytes(4)
            stored = await a.hold(data)
            await b.hold(data, record=a.record_of(stored))
            c = await site.peer()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill_after, site, a.peer_id, step * STEP_S)
                last = (await c.pull())[-1]
            assert last.state == "done"
            assert c.store.blobs.content(sha256_of(data)) == data


async def kill_after(site: Site, peer: PeerId, seconds: float) -> None:
    await trio.sleep(seconds)
    site.network.kill(peer)
