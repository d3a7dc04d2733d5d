"""The real swarm against peers that keep to no limit, on a simulated cable in simulated time."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.config import Config
from meshmax.base.errors import MeshmaxError, PeerGone
from meshmax.base.status import PeerStatus
from meshmax.net import limits
from meshmax.net.swarm import LibrarySwarm
from meshmax.ports import Stream
from meshmax.services.ladder import Ladder
from meshmax.services.presence import open_presence
from meshmax.testing.garbage import collector_off
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import CONTROL_PORT, SimNetwork

ECHO = "/meshmax/echo/1.0.0"
Clock = trio.testing.MockClock


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1000):
        await stream.send_all(data)


async def dial_again(swarm: LibrarySwarm, peer: LibrarySwarm) -> None:
    """Make one more connection, as a peer that moved does."""

    async def finish(link: Any) -> None:
        await link.wait_agreed()
        swarm._gate.open(link.passage)

    await swarm._dialler.dial(peer.peer_id, peer.addresses, lambda: False, finish)


@asynccontextmanager
async def open_swarms(count: int) -> AsyncIterator[list[LibrarySwarm]]:
    """Swarms of which the first serves ECHO and the others are connected to it."""
    network = SimNetwork()
    async with trio.open_nursery() as nursery:
        swarms: list[LibrarySwarm] = []
        ready, done = trio.Event(), trio.Event()

        async def one(seed: int) -> None:
            async with network.open_swarm(SeededSigner(seed).private_bytes) as swarm:
                swarms.append(swarm)
                if len(swarms) == count:
                    ready.set()
                await done.wait()

        for seed in range(1, count + 1):
            nursery.start_soon(one, seed)
        await ready.wait()
        swarms[0].serve(ECHO, echo)
        for swarm in swarms[1:]:
            await swarm.dial(swarms[0].peer_id, swarms[0].addresses)
        try:
            yield swarms
        finally:
            done.set()


async def says_back(stream: Stream) -> bytes:
    await stream.send_all(b"hello")
    return await stream.receive_some(100)


async def open_and_use(swarm: LibrarySwarm, peer: LibrarySwarm) -> bytes:
    return await says_back(await swarm.open_stream(peer.peer_id, ECHO))


async def test_streams_that_one_peer_opens_are_bounded_by_the_one_that_serves_them(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_STREAMS_PER_PEER", 5)
    async with open_swarms(3) as (server, greedy, other):
        streams = [await greedy.open_stream(server.peer_id, ECHO) for _ in range(5)]
        greedy._opened.clear()  # as one does who does not count
        with pytest.raises(MeshmaxError):
            await open_and_use(greedy, server)
        assert [await says_back(stream) for stream in streams] == [b"hello"] * 5
        assert await open_and_use(other, server) == b"hello"
        for stream in streams:
            await stream.aclose()
        await trio.sleep(1)
        assert await open_and_use(greedy, server) == b"hello"


async def test_streams_of_all_peers_together_are_bounded(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_STREAMS", 6)
    async with open_swarms(3) as (server, one, two):
        streams = [await swarm.open_stream(server.peer_id, ECHO) for swarm in (one, two) for _ in range(3)]
        with pytest.raises(MeshmaxError):
            await open_and_use(two, server)
        assert [await says_back(stream) for stream in streams] == [b"hello"] * 6
        await streams[0].reset()
        await trio.sleep(1)
        assert await open_and_use(two, server) == b"hello"


async def test_a_stream_that_never_names_its_protocol_does_not_stay(autojump_clock: Clock) -> None:
    async with open_swarms(2) as (server, mute):
        (link,) = mute._links.of(server.peer_id)
        for _ in range(20):
            stream = await link.connection.new_stream()
            await stream.muxed_stream.write(b"\x13/multi")
        await trio.sleep(1)
        assert server._served[mute.peer_id] == 20
        await trio.sleep(60)
        assert not server._served
        assert await open_and_use(mute, server) == b"hello"


async def test_a_peer_that_reads_nothing_costs_its_streams_and_no_more(autojump_clock: Clock) -> None:
    async def pour(stream: Stream) -> None:
        while True:
            await stream.send_all(bytes(65536))

    async with open_swarms(2) as (server, lazy):
        server.serve("/meshmax/pour/1.0.0", pour)
        for _ in range(10):
            await lazy.open_stream(server.peer_id, "/meshmax/pour/1.0.0")
        await trio.sleep(60)
        assert not server._served
        with pytest.raises(PeerGone):
            await lazy.open_stream(SeededSigner(99).peer_id, ECHO)
        assert await open_and_use(lazy, server) == b"hello"


@pytest.mark.parametrize("machines", [1, 1000], ids=["from one machine", "from a thousand"])
async def test_ten_thousand_half_open_dials_stay_within_bounds_and_honest_peers_get_in(
    machines: int, autojump_clock: Clock
) -> None:
    network = SimNetwork()
    async with (
        network.open_swarm(SeededSigner(1).private_bytes) as server,
        network.open_swarm(SeededSigner(2).private_bytes) as honest,
    ):
        ip = server.addresses[0].split("/")[2]
        tasks_before, most_half_open, most_tasks, dialled = trio.lowlevel.current_statistics().tasks_living, 0, 0, 0
        for number in range(10_000):
            source = f"10.{1 + number % machines // 250}.0.{number % machines % 250}"
            with suppress(OSError):  # the backlog is full
                await network.wires.connect(source, ip, CONTROL_PORT)
            if number % 500 == 250:
                most_half_open = max(most_half_open, server.door.half_open)
                most_tasks = max(most_tasks, trio.lowlevel.current_statistics().tasks_living - tasks_before)
                with suppress(MeshmaxError), trio.move_on_after(5):
                    await honest.dial(server.peer_id, server.addresses)
                    dialled += 1
                    await honest.disconnect(server.peer_id)
        assert limits.MAX_HALF_OPEN_PER_IP // 2 < most_half_open <= limits.MAX_HALF_OPEN
        assert most_tasks < 12 * limits.MAX_HALF_OPEN
        assert dialled >= 5  # of 20; the backlog is full for the rest
        await trio.sleep(2 * limits.HANDSHAKE_TIMEOUT_S)
        assert not server.door.half_open
        assert trio.lowlevel.current_statistics().tasks_living - tasks_before < 20


async def test_only_the_connection_that_failed_is_cut_where_the_peer_has_made_a_new_one(autojump_clock: Clock) -> None:
    async with open_swarms(2) as (server, mover):
        old = mover.connections()[server.peer_id]
        await trio.sleep(1)
        await dial_again(mover, server)  # as from a new network
        new = mover.connections()[server.peer_id]
        assert new != old
        async with mover.subscribe() as events:
            assert (await events.receive()).kind == "connected"
            await mover.disconnect(server.peer_id, old)
            assert await open_and_use(mover, server) == b"hello"
            await mover.disconnect(server.peer_id, old)  # gone already: nothing else is cut for it
            assert mover.connections() == {server.peer_id: new}
            with pytest.raises(trio.WouldBlock):
                events.receive_nowait()
            await mover.disconnect(server.peer_id, new)
            assert (await events.receive()).kind == "disconnected"


async def test_a_peer_that_moved_is_not_lost_when_its_old_connection_dies(autojump_clock: Clock) -> None:
    async def nothing(data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async with AsyncExitStack() as stack:
        server, mover = await stack.enter_async_context(open_swarms(2))
        presences = [
            await stack.enter_async_context(
                open_presence(
                    swarm,
                    SeededSigner(seed),
                    Config(),
                    partial(PeerStatus, swarm.peer_id, 0, 0, "x", "0"),
                    Ladder((), random.Random(seed)),
                    lambda: 1e9 + trio.current_time(),
                    random.Random(seed),
                )
            )
            for seed, swarm in sorted((1 if s.peer_id == SeededSigner(1).peer_id else 2, s) for s in (server, mover))
        ]
        await trio.sleep(5)
        old = [swarm._links.of(other.peer_id)[0] for swarm, other in ((server, mover), (mover, server))]
        await dial_again(mover, server)
        for link in old:
            link.wire.write = nothing  # type: ignore[method-assign]  # the network that it left takes nothing any more
        async with server.subscribe() as events:
            assert (await events.receive()).kind == "connected"
            await trio.sleep(30 + limits.LINK_ASK_TIMEOUT_S)
            with pytest.raises(trio.WouldBlock):
                events.receive_nowait()
        assert all(link.wire.cut_off for link in old)
        for presence in presences:
            assert [view.state for view in presence.peers()] == ["self", "online"]
            assert (
                trio.current_time() - (presence.peers()[1].last_seen_s - 1e9) < 10
            )  # it is beaten with on the new one


async def test_a_stream_that_has_ended_leaves_no_ring_of_references(autojump_clock: Clock) -> None:
    async with open_swarms(2) as (server, other):
        await open_and_use(other, server)
        with collector_off() as left:
            for close in ("aclose", "reset"):
                stream = await other.open_stream(server.peer_id, ECHO)
                assert await says_back(stream) == b"hello"
                await getattr(stream, close)()
                del stream
            await trio.sleep(1)
    assert not left.rings


@pytest.mark.parametrize("ends", ["by_us", "by_the_peer", "while_in_use", "in_order"])
async def test_a_connection_that_was_lost_leaves_no_ring_of_references(autojump_clock: Clock, ends: str) -> None:
    async with open_swarms(2) as (server, other):

        async def lose_one() -> None:
            if ends == "while_in_use":
                stream = await other.open_stream(server.peer_id, ECHO)
                assert await says_back(stream) == b"hello"
                await other.disconnect(server.peer_id)
                with pytest.raises(PeerGone):
                    await says_back(stream)
            elif ends == "in_order":
                await dial_again(other, server)  # beside which the older one is spare, and ends
            else:
                one, peer = (server, other) if ends == "by_the_peer" else (other, server)
                await one.disconnect(peer.peer_id)
            await trio.sleep(12)
            if ends != "in_order":
                await other.dial(server.peer_id, server.addresses)
            assert await open_and_use(other, server) == b"hello"
            await trio.sleep(12)

        await lose_one()  # what is made once is made
        with collector_off() as left:
            for _ in range(3):
                await lose_one()
    assert not {name: n for name, n in left.rings.items() if not name.startswith("meshmax.testing.")}
