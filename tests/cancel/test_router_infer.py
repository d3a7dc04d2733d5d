"""Cancelled at any moment, a request leaves no task, stream, slot or count behind, here or at the serving peer."""

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from meshmax.base.errors import MeshmaxError
from meshmax.base.inference import EmbedRequest, GenerateRequest
from meshmax.core.breaker import MAX_BACKOFF_S
from meshmax.services.infer_client import open_remote_answer
from tests.services.infer_site import WORDS, Site, ask, open_site

Clock = trio.testing.MockClock
STEP_S = 0.0005  # half of the network's latency, so that every leg of the exchange is hit


async def directly(site: Site) -> None:
    async with open_remote_answer(site[0].swarm, site[1].peer_id, ask()) as events:
        async for _ in events:
            pass


async def routed(site: Site) -> None:
    async with site[0].router.open_answer(ask()) as answer:
        async for _ in answer.events:
            pass


async def large(site: Site) -> None:
    async with site[0].router.open_answer(ask(GenerateRequest("x" * 1_600_000, raw=True))) as answer:
        async for _ in answer.events:
            pass


async def vectors(site: Site) -> None:
    async with site[0].router.open_answer(ask(EmbedRequest(tuple(WORDS.split())))) as answer:
        async for _ in answer.events:
            pass


async def moving(site: Site) -> None:
    """The engine that answers crashes in the middle, and another peer goes on."""
    count = 0
    async with site[0].router.open_answer(ask()) as answer:
        async for _ in answer.events:
            count += 1
            if count == 5:
                serving = next(node for node in site.nodes if node.peer_id == answer.route.peer_id)
                serving.engine.models[0].crash()


async def tasks_after_a_moment() -> int:
    await trio.sleep(1)
    root = trio.lowlevel.current_root_task()
    assert root is not None
    pending, count = [root], 0
    while pending:
        task = pending.pop()
        count += 1
        for nursery in task.child_nurseries:
            pending += nursery.child_tasks
    return count


async def leaves_nothing(site: Site, work: Callable[[Site], Awaitable[None]], after_s: float, idle_tasks: int) -> bool:
    """Cancel ``work`` after ``after_s``; whether it was cut short."""
    with trio.move_on_after(after_s) as scope:
        await work(site)
    assert await tasks_after_a_moment() == idle_tasks
    serving = site[1]
    produced = serving.produced
    assert not serving.server.active
    assert serving.server.held_bytes == 0
    for node in site.nodes:
        assert (node.residency.load().running, node.residency.load().queued) == (0, 0)
        assert all(node.router.outstanding.count(other.peer_id) == 0 for other in site.nodes)
    await trio.sleep(2)
    assert serving.produced == produced
    return scope.cancelled_caught


@pytest.mark.parametrize("work", [directly, routed, large, vectors])
async def test_a_request_cancelled_at_any_moment_leaves_nothing(
    work: Callable[[Site], Awaitable[None]], autojump_clock: Clock
) -> None:
    async with open_site(2, echo_tokens_per_s=5000) as site:
        site[0].has.clear()
        with trio.move_on_after(5):  # loads the model
            await routed(site)
        idle_tasks = await tasks_after_a_moment()
        steps = 0
        while steps < 100 and await leaves_nothing(site, work, steps * STEP_S, idle_tasks):
            steps += 1
        assert steps > 5


async def test_a_request_cancelled_at_any_moment_of_going_on_elsewhere_leaves_nothing(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=5000) as site:
        site[0].has.clear()
        steps, cut = 1, True
        while steps < 100 and cut:
            with trio.move_on_after(steps * STEP_S) as scope:
                await moving(site)
            cut = scope.cancelled_caught
            await trio.sleep(MAX_BACKOFF_S + 1)  # longer than breakers keep a peer out
            produced = [node.produced for node in site.nodes]
            await trio.sleep(2)
            assert [node.produced for node in site.nodes] == produced
            for node in site.nodes:
                assert not node.server.active
                assert (node.residency.load().running, node.residency.load().queued) == (0, 0)
                assert site[0].router.outstanding.count(node.peer_id) == 0
            steps += 1
        assert steps > 20


async def test_a_request_cancelled_while_the_model_loads_leaves_nothing(autojump_clock: Clock) -> None:
    async with open_site(2, load_s=0.01) as site:
        site[0].has.clear()
        idle_tasks = await tasks_after_a_moment()
        for step in range(1, 30):
            with trio.move_on_after(step * STEP_S):
                await routed(site)
            await trio.sleep(1)
            await site[1].residency.unload(ask().digest)
            assert await tasks_after_a_moment() == idle_tasks
            assert not site[1].server.active


async def test_a_peer_that_vanishes_at_any_moment_leaves_nothing_here(autojump_clock: Clock) -> None:
    for step in range(40):
        async with open_site(2, echo_tokens_per_s=5000) as site:
            site[0].has.clear()
            idle_tasks = await tasks_after_a_moment()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ends, site)
                await trio.sleep(step * STEP_S)
                site.network.kill(site[1].peer_id)
            assert await tasks_after_a_moment() <= idle_tasks + 1  # the model that was loaded there
            assert site[0].router.outstanding.count(site[1].peer_id) == 0
            assert not site[1].server.active


async def ends(site: Site) -> None:
    """The request ends, well or with an error of ours."""
    with contextlib.suppress(MeshmaxError):
        await routed(site)
