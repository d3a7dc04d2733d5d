"""A peer's streams while its connections change: real libp2p swarms on a simulated cable, in simulated time."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.status import Path
from meshmax.net import limits
from meshmax.net.swarm import LibrarySwarm
from meshmax.ports import ByteStream, Stream
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.memory_transport import MemoryWires
from meshmax.testing.sim_network import SimNetwork

Clock = trio.testing.MockClock
TELL = "/meshmax/tell/1.0.0"
STEP_BYTES = 1000
RUNS = 60  # lives; 200 were looked at when this was written


class Slow:
    """A byte stream that takes ``per_s`` bytes a second, as a relay with a limit does; satisfies ports.ByteStream."""

    def __init__(self, stream: ByteStream, per_s: float, latency_s: float) -> None:
        self._stream, self._per_s, self._latency_s, self.remote = stream, per_s, latency_s, stream.remote

    async def send_all(self, data: bytes) -> None:
        for start in range(0, len(data), 4096):
            part = data[start : start + 4096]
            await trio.sleep(len(part) / self._per_s + self._latency_s)
            await self._stream.send_all(part)

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._stream.receive_some(max_bytes)

    def close(self) -> None:
        self._stream.close()


class Site:
    """Two peers on a cable of their own; connections between them are made by hand."""

    def __init__(self, a: LibrarySwarm, b: LibrarySwarm, wires: MemoryWires) -> None:
        self.a, self.b, self.wires = a, b, wires

    async def join(self, path: Path, per_s: float = 1e7, a_leads: bool = True, latency_s: float = 0.0) -> ByteStream:
        """A connection over ``path``, ``latency_s`` longer than the cable; the end of its leader."""
        leader, follower = (self.a, self.b) if a_leads else (self.b, self.a)
        near, far = self.wires.attach(), self.wires.attach()
        listener = await far.listen(far.ip, 0)
        leading = await near.connect(*listener.local)
        following = await listener.accept()
        listener.close()
        address = f"/ip4/203.0.113.1/tcp/1/{path}"
        async with trio.open_nursery() as nursery:
            far_end = Slow(following, per_s, latency_s)
            nursery.start_soon(partial(follower.adopt, far_end, leader.peer_id, "in", path, address))
            await leader.adopt(Slow(leading, per_s, latency_s), follower.peer_id, "out", path, address)
        return leading

    def partition(self, stream: Any) -> None:
        """From now on nothing passes on a connection that was made here."""
        self.wires.partition(stream.ip, stream.remote[0])

    def links(self, swarm: LibrarySwarm) -> list[str]:
        other = self.b if swarm is self.a else self.a
        return [link.view.path for link in swarm._links.of(other.peer_id)]


@asynccontextmanager
async def open_site(answer: Callable[[Stream], Awaitable[None]], latency_s: float = 0.02) -> AsyncIterator[Site]:
    network = SimNetwork(latency_s)
    async with (
        network.open_swarm(SeededSigner(1).private_bytes) as a,
        network.open_swarm(SeededSigner(2).private_bytes) as b,
    ):
        for swarm in (a, b):
            swarm.serve(TELL, answer)
        with trio.fail_after(3600):
            await trio.lowlevel.checkpoint()
            yield Site(a, b, network.wires)


async def echo_nothing(stream: Stream) -> None:
    await stream.receive_some(1)


async def tell(stream: Stream, tokens: int = 50, pause_s: float = 0.2) -> None:
    """An answer that takes its time."""
    await stream.receive_some(100)
    for number in range(tokens):
        await stream.send_all(bytes([number % 256]) * STEP_BYTES)
        await trio.sleep(pause_s)
    await stream.send_eof()
    await stream.receive_some(1)  # its end, however slowly it reads


async def hear(stream: Stream, tokens: int = 50, pause_s: float = 0.0) -> None:
    """Read such an answer whole."""
    received = bytearray()
    while part := await stream.receive_some(STEP_BYTES):
        received += part
        await trio.sleep(pause_s)
    assert bytes(received) == b"".join(bytes([number % 256]) * STEP_BYTES for number in range(tokens))
    await stream.aclose()


async def hear_whole(site: Site) -> None:
    """A new stream works."""
    stream = await site.a.open_stream(site.b.peer_id, TELL)
    await stream.send_all(b"?")
    await hear(stream)


async def test_an_answer_goes_on_over_the_relay_while_new_streams_go_directly_and_then_the_relay_is_let_go(
    autojump_clock: Clock,
) -> None:
    async with open_site(tell) as site, trio.open_nursery() as nursery:
        a, b = site.a, site.b
        await site.join("relay")
        old = await a.open_stream(b.peer_id, TELL)
        await old.send_all(b"?")
        nursery.start_soon(hear, old)
        await trio.sleep(1.0)
        await site.join("punched-tcp")
        new = await b.open_stream(a.peer_id, TELL)
        await new.send_all(b"?")
        assert new.address.endswith("punched-tcp")
        nursery.start_soon(hear, new)
        await trio.sleep(8.5)  # the answer takes ten seconds in all
        assert site.links(a) == site.links(b) == ["relay", "punched-tcp"]
        await trio.sleep(2.0 + limits.LINK_IDLE_S)
        assert site.links(a) == site.links(b) == ["punched-tcp"]
        await trio.sleep(10 * limits.LINK_IDLE_S)
        assert site.links(a) == site.links(b) == ["punched-tcp"]


async def test_a_relay_is_kept_until_the_slow_reader_of_an_answer_has_read_it(autojump_clock: Clock) -> None:
    async def pour(stream: Stream) -> None:
        await stream.send_all(bytes(200_000))

    async with open_site(pour) as site:
        await site.join("relay", per_s=20_000.0)
        stream = await site.a.open_stream(site.b.peer_id, TELL)
        await stream.send_eof()  # from here on the other side has nothing to wait for
        await site.join("direct")
        received = 0
        while part := await stream.receive_some(1000):
            received += len(part)
            await trio.sleep(0.5)
        assert received == 200_000
        await stream.aclose()
        await trio.sleep(3 * limits.LINK_IDLE_S)
        assert site.links(site.a) == site.links(site.b) == ["direct"]


async def test_a_relay_that_fell_silent_is_let_go_too(autojump_clock: Clock) -> None:
    async with open_site(tell) as site:
        relay = await site.join("relay")
        await site.join("direct")
        site.partition(relay)
        await trio.sleep(2 * limits.LINK_IDLE_S + limits.LINK_ASK_TIMEOUT_S)
        assert site.links(site.a) == site.links(site.b) == ["direct"]


async def test_a_dead_connection_is_cut_soon_after_the_peer_came_by_a_worse_one(autojump_clock: Clock) -> None:
    async with open_site(tell) as site:
        direct = await site.join("direct")
        await trio.sleep(10)
        site.partition(direct)
        await site.join("relay")
        await trio.sleep(limits.LINK_PROBE_S + 0.1)
        assert site.links(site.a) == site.links(site.b) == ["relay"]
        await hear_whole(site)


async def test_a_connection_that_is_slow_to_answer_and_yet_carries_something_is_kept(autojump_clock: Clock) -> None:
    async def pour(stream: Stream) -> None:
        await stream.send_all(bytes(2_000_000))

    async def wait_behind_much(_: object) -> bool:
        await trio.sleep_forever()

    async with open_site(pour) as site, trio.open_nursery() as nursery:
        for swarm in (site.a, site.b):
            swarm._draining._ask = wait_behind_much
        await site.join("direct", per_s=200_000.0)
        stream = await site.a.open_stream(site.b.peer_id, TELL)
        nursery.start_soon(read_all, stream)
        await trio.sleep(5)
        await site.join("relay")
        await trio.sleep(2 * limits.LINK_PROBE_S)
        assert site.links(site.a) == site.links(site.b) == ["relay", "direct"]
        nursery.cancel_scope.cancel()


async def read_all(stream: Stream) -> None:
    while await stream.receive_some(65536):
        pass


async def test_the_only_connection_and_the_best_one_are_never_let_go(autojump_clock: Clock) -> None:
    async with open_site(tell) as site:
        await site.join("relay")
        await trio.sleep(600)
        assert site.links(site.a) == site.links(site.b) == ["relay"]
        direct = await site.join("direct")
        await trio.sleep(600)
        assert site.links(site.a) == site.links(site.b) == ["direct"]
        direct.close()
        await trio.sleep(1)
        assert not site.a.connections()


async def test_what_a_connection_holds_unread_is_bounded_by_us(autojump_clock: Clock) -> None:
    async with open_site(tell) as site:
        await site.join("direct")
        (link,) = site.a._links.of(site.b.peer_id)
        assert link.connection.muxed_conn.allowed_bytes == limits.MAX_CONNECTION_BUFFER_BYTES
        assert type(link.connection.muxed_conn).__name__ == "BoundedYamux"


async def test_an_answer_is_read_whole_however_slowly(autojump_clock: Clock) -> None:
    async def pour(stream: Stream) -> None:
        await stream.send_all(bytes(200_000))

    async with open_site(pour) as site:
        await site.join("direct")
        stream = await site.a.open_stream(site.b.peer_id, TELL)
        await stream.send_eof()
        received = 0
        while part := await stream.receive_some(1000):
            received += len(part)
            await trio.sleep(1.0)
        assert received == 200_000
        await stream.aclose()


async def test_two_connections_that_each_side_takes_for_the_best_both_stay(autojump_clock: Clock) -> None:
    async with open_site(tell) as site:
        await site.join("punched-tcp")
        await site.join("punched-tcp", a_leads=False)
        links = site.b._links.of(site.a.peer_id)
        site.b._links._links[site.a.peer_id].reverse()  # as where two dials cross
        await trio.sleep(600)
        assert set(site.b._links.of(site.a.peer_id)) == set(links)
        assert len(site.links(site.a)) == 2


async def one_life(seed: int) -> None:
    """Streams of any pace open all the time while paths of any kind come, and those that are not needed go."""
    chance = random.Random(seed)
    tokens, asked = chance.randint(1, 60), chance.randint(3, 8)
    answer = partial(tell, tokens=tokens, pause_s=chance.choice([0.0, 0.01, 0.3]))
    async with open_site(answer, chance.choice([0.001, 0.04, 0.3])) as site:
        better: list[Path] = ["punched-udp", "punched-tcp", "direct"]
        paths: list[Path] = ["relay", *chance.sample(better, chance.randint(1, 2))]
        if chance.random() < 0.3:
            chance.shuffle(paths)
        await site.join(paths[0], per_s=chance.choice([2e4, 1e6]), a_leads=chance.random() < 0.5)

        async def ask(swarm: LibrarySwarm, other: LibrarySwarm, start_s: float, pause_s: float, eof: bool) -> None:
            await trio.sleep(start_s)
            stream = await swarm.open_stream(other.peer_id, TELL)
            await stream.send_all(b"?")
            if eof:
                await stream.send_eof()
            await hear(stream, tokens, pause_s)

        async def improve() -> None:
            for path in paths[1:]:
                await trio.sleep(chance.random() * 6)
                await site.join(path, per_s=chance.choice([1e5, 1e7]), a_leads=chance.random() < 0.5)

        async with trio.open_nursery() as nursery:
            for _ in range(asked):
                pair = chance.sample([site.a, site.b], 2)
                pace = chance.choice([0.0, 0.05, 1.0])
                nursery.start_soon(ask, *pair, chance.random() * 12, pace, chance.random() < 0.5)
            nursery.start_soon(improve)
        await trio.sleep(4 * limits.LINK_IDLE_S)
        assert len(site.links(site.a)) == len(site.links(site.b)) == 1
        assert site.links(site.a) == site.links(site.b)
        assert not site.a._opened + site.a._served + site.b._opened + site.b._served


@pytest.mark.parametrize("block", range(10))
async def test_no_stream_is_broken_by_a_move(block: int, autojump_clock: Clock) -> None:
    for seed in range(block, RUNS, 10):
        try:
            await one_life(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
