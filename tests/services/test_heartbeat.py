"""Who is given up for silence, and who is only slow, in virtual time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from meshmax.base.config import Config
from meshmax.core.liveness import STUCK
from meshmax.ports import Stream, SwarmEvent
from meshmax.wire.protocols import STATUS
from tests.services.presence_site import Mesh, Peer, open_mesh, until

Clock = trio.testing.MockClock
TIMEOUT_S = Config().heartbeat_timeout_s


async def never_answers(stream: Stream) -> None:
    while await stream.receive_some(1000):
        pass


async def meet_one_that_never_echoes(mesh: Mesh) -> None:
    """Two peers; the second beats as it should, and answers no beat."""
    first, second = await mesh.peer(), await mesh.peer()
    second.swarm.serve(STATUS, never_answers)
    await first.swarm.dial(second.swarm.peer_id, second.swarm.addresses)
    await until(lambda: first.sees() == {"peer1"})


@asynccontextmanager
async def losses(of: Peer) -> AsyncIterator[list[float]]:
    """When it lost a peer, in this block; of each first change of a peer it has been told already."""
    lost: list[float] = []

    async def watch(events: trio.MemoryReceiveChannel[SwarmEvent]) -> None:
        async for event in events:
            lost.extend([trio.current_time()] * (event.kind == "disconnected"))

    async with of.swarm.subscribe() as events, trio.open_nursery() as nursery:
        nursery.start_soon(watch, events)
        yield lost
        nursery.cancel_scope.cancel()


async def test_a_peer_that_is_heard_of_is_not_given_up_because_an_echo_is_late(autojump_clock: Clock) -> None:
    async with open_mesh() as mesh:
        await meet_one_that_never_echoes(mesh)
        async with losses(mesh.peers[0]) as lost:
            await trio.sleep((STUCK - 1) * TIMEOUT_S)
            assert not lost
            await trio.sleep(TIMEOUT_S + 1)
            assert lost


async def test_one_that_is_frozen_meanwhile_is_given_up_as_soon_as_any_other(autojump_clock: Clock) -> None:
    async with open_mesh() as mesh:
        await meet_one_that_never_echoes(mesh)
        await trio.sleep(2 * TIMEOUT_S)
        mesh.freeze(mesh.peers[1])
        assert await until(lambda: not mesh.peers[0].sees()) <= TIMEOUT_S + 1


async def test_time_in_which_we_were_held_up_ourselves_speaks_against_nobody(autojump_clock: Clock) -> None:
    async with open_mesh() as mesh:
        mesh.network.latency_s = 0.4  # so that beats are under way most of the time
        first, second = await mesh.peer(), await mesh.peer()
        await first.swarm.dial(second.swarm.peer_id, second.swarm.addresses)
        await until(lambda: first.sees() == {"peer1"} and second.sees() == {"peer0"})
        async with losses(first) as lost:
            for _ in range(20):
                await trio.sleep(0.37)
                autojump_clock.jump(3 * TIMEOUT_S)
            await trio.sleep(2 * TIMEOUT_S)
            assert not lost
        assert first.sees() == {"peer1"}


async def test_nothing_is_kept_of_those_who_went_away(autojump_clock: Clock) -> None:
    async with open_mesh() as mesh:
        first = await mesh.peer()
        for number in range(1, 6):
            other = await mesh.peer()
            await other.swarm.dial(first.swarm.peer_id, first.swarm.addresses)
            await until(lambda: first.sees() == {f"peer{number}"})  # noqa: B023
            await other.leave()
            await until(lambda: not first.swarm.connections())
        await trio.sleep(1.0)
        heartbeat = first.presence.heartbeat
        assert [len(kept) for kept in (heartbeat._beats, heartbeat._over, heartbeat._hurries)] == [0, 0, 0]
