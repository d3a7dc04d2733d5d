"""The blob protocol's server against fetchers good and bad, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.errors import PeerGone
from meshmax.base.ids import Sha256
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
        yield Bench(network, asking, server, blobs)


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


async def test_a_growing_blob_is_announced_again_but_not_more_than_once_a_second(autojump_clock: Clock) -> None:
    async with open_bench() as bench:
        digest = bench.map.sha256
        bench.blobs.remove(digest)
        bench.blobs.add_partial(DATA, {1})
        frames, have = await bench.opened()
        assert have == wire.have_of(Haves.none(21).with_chunk(1))
        partial = await bench.blobs.open_partial(bench.map)
        for index in range(2, 12):
            await partial.write(index, DATA[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        began_s = trio.current_time()
        again = await frames.receive(wire.FROM_SERVER)
        assert isinstance(again, wire.Have)
        assert Haves(again.count, again.bits).total == 11
        assert trio.current_time() - began_s < 2.5
        with trio.move_on_after(5) as scope:
            await frames.receive(wire.FROM_SERVER)
        assert scope.cancelled_caught  # nothing new, nothing said


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
