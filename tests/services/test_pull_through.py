"""Readers of a model that is still being pulled: they share the pull, wait for chunks, and end it by leaving."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from meshmax.base.errors import BlobNotFound, NoProviders, StoreError
from meshmax.base.events import Transfer, TransferState
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.services.pull_through import LINGER_S, POLL_S, PullThrough, open_pull_through
from meshmax.services.repositories import chunks_of
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.wire.chunkmap import chunk_map_of_bytes

DATA = bytes(3 * CHUNK_BYTES + 5)
MAP = chunk_map_of_bytes(DATA)
MODEL = Sha256("ab" * 32)


class SteppedPulls:
    """Pulls that bring a chunk a second, and end as ``ends`` says."""

    def __init__(self, blobs: MemoryBlobStore) -> None:
        self.blobs = blobs
        self.names: list[str] = []
        self.running = 0
        self.ends: TransferState = "done"
        self.refuses = False
        self.endless = False
        self.ending_s = 0.0  # that letting go of a pull takes

    @asynccontextmanager
    async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
        await trio.lowlevel.checkpoint()
        self.names.append(name)
        if self.refuses:
            raise NoProviders("nobody has it")
        self.running += 1
        send, receive = trio.open_memory_channel[Transfer](10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._bring, send)
            try:
                yield receive
            finally:
                self.running -= 1
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.sleep(self.ending_s)

    async def _bring(self, send: trio.MemorySendChannel[Transfer]) -> None:
        if self.endless:
            await trio.sleep_forever()
        partial = await self.blobs.open_partial(MAP)
        async with send:
            for index in range(MAP.count):
                await trio.sleep(1)
                offset, length = MAP.span(index)
                await partial.write(index, DATA[offset : offset + length])
                if self.ends == "failed" and index == 1:
                    break
            await partial.aclose()
            await send.send(Transfer("t", "m", "in", self.ends, reason="no luck", error_code=StoreError.code))

    def transfers(self) -> tuple[Transfer, ...]:
        return ()

    async def start_download(self, name: str) -> Transfer:
        raise NotImplementedError

    async def steer(self, transfer_id: str, action: object) -> Transfer:
        raise NotImplementedError


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[PullThrough, SteppedPulls]]:
    blobs = MemoryBlobStore()
    pulls = SteppedPulls(blobs)
    async with open_pull_through(pulls, blobs) as through:
        yield through, pulls


async def test_a_reader_gets_each_chunk_when_it_is_here(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        began = trio.current_time()
        with through.hold(MODEL, "m:latest") as hold:
            for index in range(MAP.count):
                chunk = await through.read_chunk(hold, MAP.sha256, index)
                assert len(chunk) == MAP.span(index)[1]
                assert trio.current_time() - began <= index + 1 + 2 * POLL_S
        assert pulls.names == [f"m:latest@{MODEL}"]


async def test_readers_of_one_model_share_one_pull(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):

        async def read() -> None:
            with through.hold(MODEL, "m:latest") as hold:
                await through.read_chunk(hold, MAP.sha256, 3)

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(read)
        assert len(pulls.names) == 1


async def test_the_pull_ends_a_while_after_the_last_reader_left(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        with trio.move_on_after(0.5):
            with through.hold(MODEL, "m:latest") as hold:
                await through.read_chunk(hold, MAP.sha256, 3)
        assert pulls.running == 1
        pulls.ends = "running"  # it would go on
        await trio.sleep(LINGER_S + 0.1)
        assert pulls.running == 0


async def test_a_reader_that_comes_back_in_time_keeps_the_pull(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        for _ in range(2):
            with through.hold(MODEL, "m:latest"):
                await trio.sleep(0.5)
            await trio.sleep(0.5)
        with through.hold(MODEL, "m:latest") as hold:
            await trio.sleep(2 * LINGER_S)
            await through.read_chunk(hold, MAP.sha256, 3)
        assert len(pulls.names) == 1


async def test_each_leaving_of_the_last_reader_begins_the_wait_anew(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        pulls.endless = True
        with through.hold(MODEL, "m:latest"):
            await trio.sleep(0.1)
        await trio.sleep(LINGER_S - 1)
        with through.hold(MODEL, "m:latest"):
            await trio.sleep(0.5)
        await trio.sleep(LINGER_S - 1)
        assert pulls.running == 1
        await trio.sleep(1.1)
        assert pulls.running == 0


async def test_who_comes_while_a_pull_is_being_ended_begins_anew(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        pulls.endless = True
        pulls.ending_s = 5.0
        with through.hold(MODEL, "m:latest"):
            await trio.sleep(0.1)
        await trio.sleep(LINGER_S + 0.1)
        pulls.ending_s, pulls.endless = 0.0, False
        with through.hold(MODEL, "m:latest") as hold:
            await through.read_chunk(hold, MAP.sha256, 3)
        assert len(pulls.names) == 2


async def test_a_pull_that_fails_fails_its_readers_and_the_next_begins_anew(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        pulls.ends = "failed"
        with through.hold(MODEL, "m:latest") as hold:
            assert await through.read_chunk(hold, MAP.sha256, 1)
            with pytest.raises(StoreError, match="no luck"):
                await through.read_chunk(hold, MAP.sha256, 3)
            assert await through.read_chunk(hold, MAP.sha256, 0)  # what is here can still be had
        pulls.ends = "done"
        with through.hold(MODEL, "m:latest") as again:
            assert await through.read_chunk(again, MAP.sha256, 3)
        assert len(pulls.names) == 2


async def test_a_pull_that_cannot_begin_fails_its_readers(autojump_clock: MockClock) -> None:
    async with opened() as (through, pulls):
        pulls.refuses = True
        with through.hold(MODEL, "m:latest") as hold:
            with pytest.raises(NoProviders):
                await through.read_chunk(hold, MAP.sha256, 0)


async def test_a_pull_that_ends_without_the_blob_does_not_leave_readers_waiting(autojump_clock: MockClock) -> None:
    async with opened() as (through, _):
        with through.hold(MODEL, "m:latest") as hold:
            with pytest.raises(BlobNotFound):
                await through.read_chunk(hold, Sha256("cd" * 32), 0)


def test_the_chunks_of_a_range_are_those_that_hold_its_bytes() -> None:
    assert list(chunks_of(0, 1)) == [0]
    assert list(chunks_of(CHUNK_BYTES - 1, CHUNK_BYTES + 1)) == [0, 1]
    assert list(chunks_of(CHUNK_BYTES, 2 * CHUNK_BYTES)) == [1]
    assert list(chunks_of(0, 0)) == []
