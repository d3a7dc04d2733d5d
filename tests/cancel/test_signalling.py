"""An attempt at a better path cancelled at any moment leaves no task, port, channel or stream, and the next one goes through."""

import trio
import trio.testing

from meshmax.base.errors import Busy
from meshmax.testing.memory_traversal import MemoryNats
from tests.cancel.test_router_infer import tasks_after_a_moment
from tests.services.test_signalling import two

Clock = trio.testing.MockClock
STEP_S = 0.005  # a quarter of the network's latency


async def test_an_attempt_left_at_any_moment_leaves_nothing_and_the_next_one_goes_through(
    autojump_clock: Clock,
) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        await trio.sleep(5.0)
        idle_tasks = await tasks_after_a_moment()
        cut = 0
        for step in range(100):
            with trio.move_on_after(step * STEP_S) as scope:
                path = await a.signalling.traverse(b.swarm.peer_id)
            if not scope.cancelled_caught:
                assert path == "punched-tcp"
                break
            cut += 1
            await trio.sleep(4.0)
            assert await tasks_after_a_moment() <= idle_tasks
            assert nats.open == 0
            assert not a.signalling._runs and not b.signalling._runs
            if a.path != ["relay"]:  # cut off in the last word: the path was made all the same
                break
        assert cut > 20


async def test_a_lane_left_at_any_moment_leaves_no_open_stream(autojump_clock: Clock) -> None:
    nats = MemoryNats()
    async with two(nats) as (a, b):
        await trio.sleep(5.0)
        idle_tasks = await tasks_after_a_moment()
        for step in range(100):
            with trio.move_on_after(step * STEP_S) as scope:
                try:
                    (await a.signalling.open_lane_stream(b.swarm.peer_id)).close()
                except Busy:
                    raise AssertionError("attempts that were left are over") from None
            for lane in b.lanes:
                lane.close()
            if not scope.cancelled_caught:
                break
            await trio.sleep(4.0)
            assert await tasks_after_a_moment() <= idle_tasks
            assert nats.open == 0
            assert all(end._closed for end in nats.ends[2:]), "but the relay's two"
        assert step > 20
