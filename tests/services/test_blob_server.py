"""The blob protocol's server against fetchers good and bad, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.services import blob_server
from meshmax.services.blob_server import BlobServer
from meshmax.services.frames import FrameStream
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire import blob as wire
from meshmax.wire.failure import Failure
from meshmax.wire.protocols import BLOB

Clock = trio.testing.MockClock
DATA = b"".join(bytes([n]) * CHUNK_BYTES for n in range(20)) + b"tail"


class Bench:
    """A server with one blob, and a client that speaks the protocol by hand."""

    def __init__(self, network: MemoryNetwork, swarm: MemorySwarm, server: BlobServer, blobs: MemoryBlobStore) -> None:
        self.network, self.swarm, self.server, self.blobs = network, swarm, server, blobs
        self.map: ChunkMap = blobs.add(DATA)
        self.peer = SeededSigner(1).peer_id
        self.addresses: tuple[str, ...] = ()

    async def stream(self) -> FrameStream:
        return FrameStream(await self.swarm.open_stream(self.peer, BLOB))

    async def opened(self, digest: Sha256 | None = None) -> tuple[FrameStream, wire.FromServer]:
        frames = await self.stream()
        await frames.send(wire.FROM_FETCHER, wire.Open(digest or self.map.sha256))
        return frames, await frames.receive(wire.FROM_SERVER)

    async def chunk(self, frames: FrameStream, index: int) -> bytes:
        """The next chunk that comes, which must be ``index``."""
        data = b""
        while len(data) < self.map.span(index)[1]:
            part = await frames.receive(wire.FROM_SERVER)
            assert isinstance(part, wire.ChunkPart)
            assert (part.index, part.offset) == (index, len(data))
            data += part.data
        return data

    async def is_ended(self, frames: FrameStream) -> bool:
        """Whether the server has reset the stream, possibly after some more messages."""
        with trio.move_on_after(1):
            try:
                while await frames.try_receive(wire.FROM_SERVER) is not None:
                    pass
            except PeerGone:
                return True
        return False


@asynccontextmanager
async def open_bench() -> AsyncIterator[Bench]:
    network = MemoryNetwork()
    async with network.open_swarm(SeededSigner(1)) as serving, network.open_swarm(SeededSigner(2)) as asking:
        blobs = MemoryBlobStore()
        server = BlobServer(blobs)
        server.register(serving)
        await asking.dial(serving.peer_id, serving.addresses)
        bench = Bench(network, asking, server, blobs)
        bench.addresses = serving.addresses
        yield bench


async def test_chunks_are_sent_in_the_order_asked_and_in_bounded_parts(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        frames, have = await bench.opened()
        assert have == wire.have_of(Haves.all(21))
        for index in (20, 3, 7):
            await frames.send(wire.FROM_FETCHER, wire.Want(index))
        assert await bench.chunk(frames, 20) == b"tail"
        assert await bench.chunk(frames, 3) == bytes([3]) * CHUNK_BYTES
        assert await bench.chunk(frames, 7) == bytes([7]) * CHUNK_BYTES
        await frames.stream.send_eof()
        assert await frames.try_receive(wire.FROM_SERVER) is None


async def test_a_blob_that_is_not_here_is_a_failure_that_says_so(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        _, answer = await bench.opened(Sha256("ab" * 32))
        assert isinstance(answer, Failure)
        assert answer.code == "blob_not_found"


async def test_a_cancelled_chunk_is_answered_and_the_next_one_comes(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        frames, _ = await bench.opened()
        for message in (wire.Want(1), wire.Want(2), wire.Want(3), wire.Cancel(2), wire.Cancel(19)):
            await frames.send(wire.FROM_FETCHER, message)
        assert await bench.chunk(frames, 1) == bytes([1]) * CHUNK_BYTES
        assert await frames.receive(wire.FROM_SERVER) == wire.Cancelled(2)
        assert await bench.chunk(frames, 3) == bytes([3]) * CHUNK_BYTES
        await frames.send(wire.FROM_FETCHER, wire.Want(2))
        assert await bench.chunk(frames, 2) == bytes([2]) * CHUNK_BYTES


async def test_a_cancel_in_the_middle_of_a_chunk_stops_it(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        frames, _ = await bench.opened()
        await frames.send(wire.FROM_FETCHER, wire.Want(1))
        first = await frames.receive(wire.FROM_SERVER)
        assert isinstance(first, wire.ChunkPart)
        await frames.send(wire.FROM_FETCHER, wire.Cancel(1))
        await trio.sleep(1)
        rest: list[wire.FromServer] = [await frames.receive(wire.FROM_SERVER)]
        while isinstance(rest[-1], wire.ChunkPart):
            rest.append(await frames.receive(wire.FROM_SERVER))
        assert rest[-1] == wire.Cancelled(1)


async def test_a_rotten_or_absent_chunk_is_not_there_and_the_session_goes_on(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        bench.blobs.corrupt(bench.map.sha256, 4)
        frames, _ = await bench.opened()
        for index in (4, 500, 5):
            await frames.send(wire.FROM_FETCHER, wire.Want(index))
        assert await frames.receive(wire.FROM_SERVER) == wire.NotHave(4)
        assert await frames.receive(wire.FROM_SERVER) == wire.NotHave(500)
        assert await bench.chunk(frames, 5) == bytes([5]) * CHUNK_BYTES
        assert len(bench.server._sessions) == 1


async def grow(bench: Bench, indexes: range) -> None:
    """More chunks of the blob arrive at the server."""
    partial = await bench.blobs.open_partial(bench.map)
    for index in indexes:
        await partial.write(index, DATA[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
    await partial.aclose()


async def test_what_a_growing_blob_gained_is_told_soon_and_only_that(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        bench.blobs.remove(bench.map.sha256)
        bench.blobs.add_partial(DATA, {1})
        frames, have = await bench.opened()
        assert have == wire.have_of(Haves.none(21).with_chunk(1))
        await trio.sleep(10)
        for first in (2, 9):
            began_s = trio.current_time()
            await grow(bench, range(first, first + 5))
            assert await frames.receive(wire.FROM_SERVER) == wire.Gained(tuple(range(first, first + 5)))
            assert trio.current_time() - began_s < (0.3 if first == 2 else 0.06)
        with trio.move_on_after(5) as scope:
            await frames.receive(wire.FROM_SERVER)
        assert scope.cancelled_caught  # nothing new, nothing said


async def test_few_new_chunks_are_told_together_but_soon(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        bench.blobs.remove(bench.map.sha256)
        bench.blobs.add_partial(DATA, {0})
        frames, _ = await bench.opened()
        told: list[tuple[int, ...]] = []

        async def hear() -> None:
            while True:
                news = await frames.receive(wire.FROM_SERVER)
                assert isinstance(news, wire.Gained)
                told.append(news.indexes)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            for index in range(1, 9):
                await grow(bench, range(index, index + 1))
                await trio.sleep(0.1)
            await trio.sleep(0.3)
            nursery.cancel_scope.cancel()
        assert [index for indexes in told for index in indexes] == list(range(1, 9))
        assert len(told[0]) <= 3
        assert len(told) <= 5


async def test_what_a_blob_lost_is_told_too_and_the_news_end_when_it_is_whole(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        bench.blobs.remove(bench.map.sha256)
        bench.blobs.add_partial(DATA, {1, 2})
        frames, _ = await bench.opened()
        bench.blobs.blobs[bench.map.sha256].haves = Haves.none(21).with_chunk(2)
        assert await frames.receive(wire.FROM_SERVER) == wire.have_of(Haves.none(21).with_chunk(2))
        await grow(bench, range(21))
        news = await frames.receive(wire.FROM_SERVER)
        assert isinstance(news, wire.Gained)
        assert len(news.indexes) == 20
        bench.blobs.remove(bench.map.sha256)
        with trio.move_on_after(5) as scope:
            await frames.receive(wire.FROM_SERVER)
        assert scope.cancelled_caught


async def test_news_come_between_the_parts_of_a_chunk_that_has_to_wait_for_bandwidth(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        bench.blobs.remove(bench.map.sha256)
        bench.blobs.add_partial(DATA, {1})
        bench.server._throttle = Drip(0.5)
        frames, _ = await bench.opened()
        await frames.send(wire.FROM_FETCHER, wire.Want(1))
        await grow(bench, range(5, 6))
        kinds = [type(await frames.receive(wire.FROM_SERVER)) for _ in range(5)]
        assert kinds.count(wire.Gained) == 1
        assert kinds[-1] is wire.ChunkPart


class Drip:
    """A throttle that lets one part through every ``pause_s``, whoever gets it."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.free_s = 0.0
        self.reserved: list[int] = []

    def piece(self, direction: str) -> int:
        return CHUNK_BYTES

    def reserve(self, peer: PeerId, direction: str, size: int) -> float:
        assert direction == "out"
        self.reserved.append(size)
        now = trio.current_time()
        self.free_s = max(self.free_s, now) + self.pause_s
        return self.free_s - now


async def test_each_part_of_a_chunk_waits_for_its_bandwidth(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        throttle = bench.server._throttle = Drip(1.0)
        frames, _ = await bench.opened()
        began_s = trio.current_time()
        await frames.send(wire.FROM_FETCHER, wire.Want(3))
        assert await bench.chunk(frames, 3) == bytes([3]) * CHUNK_BYTES
        assert trio.current_time() - began_s == pytest.approx(4.0, abs=0.1)
        assert sum(throttle.reserved) == CHUNK_BYTES


async def test_a_chunk_on_its_way_to_one_fetcher_is_not_sent_to_another_who_gets_the_others_meanwhile(
    autojump_clock: Clock,
) -> None:
    async with open_bench() as bench, bench.network.open_swarm(SeededSigner(3)) as third:
        bench.server._throttle = Drip(0.1)
        await third.dial(bench.peer, bench.addresses)
        first, _ = await bench.opened()
        other = Bench(bench.network, third, bench.server, bench.blobs)
        second, _ = await other.opened()
        await first.send(wire.FROM_FETCHER, wire.Want(1))
        await trio.sleep(0.05)
        await second.send(wire.FROM_FETCHER, wire.Want(1))
        await second.send(wire.FROM_FETCHER, wire.Want(2))
        busy = await second.receive(wire.FROM_SERVER)
        assert isinstance(busy, wire.Busy)
        assert busy.index == 1
        assert 0.1 <= busy.retry_after_s <= 10
        assert await bench.chunk(second, 2) == bytes([2]) * CHUNK_BYTES
        assert await bench.chunk(first, 1) == bytes([1]) * CHUNK_BYTES
        await trio.sleep(busy.retry_after_s)
        await second.send(wire.FROM_FETCHER, wire.Want(1))
        assert await bench.chunk(second, 1) == bytes([1]) * CHUNK_BYTES


async def test_a_fetcher_that_is_lost_in_the_middle_frees_what_it_was_promised(autojump_clock: Clock) -> None:
    async with open_bench() as bench, bench.network.open_swarm(SeededSigner(3)) as third:
        bench.server._throttle = Drip(0.1)
        await third.dial(bench.peer, bench.addresses)
        lost, _ = await Bench(bench.network, third, bench.server, bench.blobs).opened()
        frames, _ = await bench.opened()
        await lost.send(wire.FROM_FETCHER, wire.Want(1))
        await trio.sleep(0.15)
        await lost.stream.reset()
        await trio.sleep(0.15)
        await frames.send(wire.FROM_FETCHER, wire.Want(1))
        assert await bench.chunk(frames, 1) == bytes([1]) * CHUNK_BYTES


@pytest.mark.parametrize(
    "messages",
    [
        [wire.Want(1)],
        [wire.Open("ab" * 32), wire.Want(1)],
        [wire.Open("{digest}"), wire.Open("{digest}")],
        [wire.Open("{digest}"), wire.Want(1), wire.Want(2), wire.Want(2)],
        [wire.Open("{digest}"), *(wire.Want(index) for index in range(wire.MAX_WANTS + 5))],
    ],
)
async def test_a_fetcher_that_breaks_the_protocol_loses_its_stream_and_nobody_else_does(
    messages: list[wire.FromFetcher], autojump_clock: Clock
) -> None:
    async with open_bench() as bench:
        good, _ = await bench.opened()
        frames = await bench.stream()
        for message in messages:
            sent = wire.Open(bench.map.sha256) if message == wire.Open("{digest}") else message
            await frames.send(wire.FROM_FETCHER, sent)
        answers = 0
        with trio.move_on_after(1):
            try:
                while await frames.try_receive(wire.FROM_SERVER) is not None:
                    answers += 1
            except PeerGone:
                pass
        assert answers < 4 * 4
        await good.send(wire.FROM_FETCHER, wire.Want(0))
        assert await bench.chunk(good, 0) == bytes(CHUNK_BYTES)
        assert bench.server._sessions.total() == 1


@pytest.mark.parametrize(
    "garbage", [b"\x00\x00\x00\x00", b"\xff" * 64, b"\x00\x00\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x10"]
)
async def test_garbage_ends_the_stream_and_costs_nothing_more(garbage: bytes, autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        for opened in (False, True):
            frames = (await bench.opened())[0] if opened else await bench.stream()
            await frames.stream.send_all(garbage)
            await frames.stream.send_eof()
            assert await bench.is_ended(frames)
        assert bench.server._sessions.total() == 0
        assert len(bench.server._sessions) == 0


async def test_who_opens_a_stream_and_says_nothing_is_sent_away(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        frames = await bench.stream()
        with pytest.raises(PeerGone):
            await frames.receive(wire.FROM_SERVER)
        assert trio.current_time() >= blob_server.OPEN_TIMEOUT_S


async def test_who_asks_for_nothing_for_long_is_sent_away_in_order(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        frames, _ = await bench.opened()
        assert await frames.try_receive(wire.FROM_SERVER) is None
        assert trio.current_time() >= blob_server.IDLE_TIMEOUT_S
        assert bench.server._sessions.total() == 0


async def test_a_reader_that_stops_reading_loses_its_session(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        frames, _ = await bench.opened()
        for index in range(4):
            await frames.send(wire.FROM_FETCHER, wire.Want(index))
        await trio.sleep(blob_server.SEND_TIMEOUT_S + 5)
        assert bench.server._sessions.total() == 0


async def test_sessions_a_peer_are_bounded_and_those_beyond_are_told_to_wait(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        for _ in range(blob_server.MAX_SESSIONS_PER_PEER):
            _, answer = await bench.opened()
            assert isinstance(answer, wire.Have)
        _, answer = await bench.opened()
        assert isinstance(answer, Failure)
        assert (answer.code, answer.retry_after_s) == ("busy", blob_server.BUSY_RETRY_S)
