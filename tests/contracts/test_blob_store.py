"""What every ports.BlobStore does, on disk and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from meshmax.base.errors import BlobNotFound, ChunkMismatch, StoreCorrupt, StoreError, StoreFull
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import ChunkMap, Haves
from meshmax.base.units import MIB
from meshmax.ports import BlobStore
from meshmax.store import open_store
from meshmax.testing.memory_store import MemoryBlobStore
from meshmax.wire.chunkmap import chunk_map_of_bytes, encode_map, map_address
from tests.store.fakes import FullDisk, blob_file, flip, in_place

DATA = b"".join(bytes([65 + index]) * MIB for index in range(3)) + b"the end"
MAP = chunk_map_of_bytes(DATA)
UNKNOWN = Sha256("0" * 64)


class Subject:
    """A store under test, and the faults that its adapter can be given."""

    def __init__(self, blobs: BlobStore, fill: Callable[[bool], None], rot: Callable[[Sha256, int], None]) -> None:
        self.blobs = blobs
        self.fill = fill
        self.rot = rot


@pytest.fixture(params=["memory", "files"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    if request.param == "memory":
        memory = MemoryBlobStore()

        yield Subject(memory, lambda full: setattr(memory, "full", full), memory.corrupt)
        return
    disk = FullDisk()

    def rot_file(digest: Sha256, index: int) -> None:
        flip(blob_file(tmp_path / "models", digest), index * MIB)

    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        yield Subject(store.blobs, lambda full: setattr(disk, "full", full), rot_file)


def chunk(index: int) -> bytes:
    offset, length = MAP.span(index)
    return DATA[offset : offset + length]


async def fetch(blobs: BlobStore, indexes: range = range(MAP.count), chunk_map: ChunkMap = MAP) -> None:
    partial = await blobs.open_partial(chunk_map)
    for index in indexes:
        await partial.write(index, chunk(index))
    if partial.haves.whole:
        await partial.finish()
    else:
        await partial.aclose()


async def test_of_an_unknown_blob_there_is_nothing(subject: Subject) -> None:
    assert await subject.blobs.haves(UNKNOWN) is None
    assert await subject.blobs.read_map(MapAddress("0" * 64)) is None
    for question in (subject.blobs.path, subject.blobs.verify):
        with pytest.raises(BlobNotFound):
            await question(UNKNOWN)
    with pytest.raises(BlobNotFound):
        await subject.blobs.read_chunk(UNKNOWN, 0)


async def test_a_blob_fetched_in_any_order_is_whole_and_reads_as_it_was(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    for index in (3, 0, 2, 1):
        await partial.write(index, chunk(index))
    await partial.finish()
    assert await subject.blobs.haves(MAP.sha256) == (MAP, Haves.all(4))
    assert [await subject.blobs.read_chunk(MAP.sha256, index) for index in range(4)] == [chunk(i) for i in range(4)]
    assert (await subject.blobs.path(MAP.sha256)).name == f"sha256-{MAP.sha256}"
    assert (await subject.blobs.verify(MAP.sha256)).whole


async def test_what_is_there_is_served_while_the_rest_is_missing(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    await partial.write(2, chunk(2))
    assert await subject.blobs.haves(MAP.sha256) == (MAP, Haves.none(4).with_chunk(2))
    assert await subject.blobs.read_chunk(MAP.sha256, 2) == chunk(2)
    assert await subject.blobs.read_map(map_address(encode_map(MAP))) == encode_map(MAP)
    with pytest.raises(BlobNotFound):
        await subject.blobs.read_chunk(MAP.sha256, 1)
    with pytest.raises(BlobNotFound):
        await subject.blobs.path(MAP.sha256)
    await partial.aclose()


@pytest.mark.parametrize("index", [-1, 4, 1 << 40])
async def test_a_chunk_that_cannot_be_is_not_found(subject: Subject, index: int) -> None:
    await fetch(subject.blobs)
    with pytest.raises(BlobNotFound):
        await subject.blobs.read_chunk(MAP.sha256, index)


async def test_a_map_is_found_at_its_address(subject: Subject) -> None:
    await fetch(subject.blobs)
    assert await subject.blobs.read_map(map_address(encode_map(MAP))) == encode_map(MAP)


async def test_a_bad_chunk_is_refused_and_changes_nothing(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    for bad in (chunk(1), chunk(0)[:-1], b""):
        with pytest.raises(ChunkMismatch):
            await partial.write(0, bad)
    with pytest.raises(ChunkMismatch):
        await partial.write(4, chunk(3))
    assert partial.haves == Haves.none(4)
    await partial.aclose()


async def test_a_blob_is_fetched_by_one_at_a_time(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    with pytest.raises(StoreError):
        await subject.blobs.open_partial(MAP)
    await partial.aclose()
    await fetch(subject.blobs)
    with pytest.raises(StoreError):
        await subject.blobs.open_partial(MAP)


async def test_of_many_who_open_a_partial_at_once_one_has_it(subject: Subject) -> None:
    opened, refused = [], []

    async def try_open() -> None:
        try:
            opened.append(await subject.blobs.open_partial(MAP))
        except StoreError as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(try_open)
    assert (len(opened), len(refused)) == (1, 4)
    await opened[0].aclose()


async def test_a_partial_goes_on_where_it_was_left(subject: Subject) -> None:
    await fetch(subject.blobs, range(2))
    partial = await subject.blobs.open_partial(MAP)
    assert partial.haves.missing() == [2, 3]
    with pytest.raises(StoreError):
        await partial.finish()
    for index in (2, 3):
        await partial.write(index, chunk(index))
    await partial.finish()
    assert await subject.blobs.read_chunk(MAP.sha256, 0) == chunk(0)


async def test_a_closed_partial_takes_nothing_more(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    await partial.aclose()
    await partial.aclose()
    with pytest.raises(StoreError):
        await partial.write(0, chunk(0))
    with pytest.raises(StoreError):
        await partial.finish()


async def test_a_discarded_partial_leaves_nothing(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    await partial.write(0, chunk(0))
    await partial.discard()
    assert await subject.blobs.haves(MAP.sha256) is None
    await fetch(subject.blobs)
    assert (await subject.blobs.verify(MAP.sha256)).whole


async def test_chunks_on_which_two_maps_agree_are_kept(subject: Subject) -> None:
    lie = chunk_map_of_bytes(DATA[:MIB] + b"X" * MIB + DATA[2 * MIB :])
    wrong = ChunkMap(MAP.sha256, MAP.size, lie.blake3, lie.hashes)
    partial = await subject.blobs.open_partial(wrong)
    await partial.write(0, chunk(0))
    await partial.write(1, b"X" * MIB)
    await partial.aclose()
    partial = await subject.blobs.open_partial(MAP)
    assert partial.haves.missing() == [1, 2, 3]
    await partial.aclose()
    assert await subject.blobs.read_map(map_address(encode_map(MAP))) == encode_map(MAP)


async def test_a_full_disk_keeps_what_is_there(subject: Subject) -> None:
    await fetch(subject.blobs, range(1))
    partial = await subject.blobs.open_partial(MAP)
    subject.fill(True)
    with pytest.raises(StoreFull):
        await partial.write(1, chunk(1))
    assert partial.haves.missing() == [1, 2, 3]
    subject.fill(False)
    await partial.aclose()
    await fetch(subject.blobs, range(1, 4))
    assert await subject.blobs.read_chunk(MAP.sha256, 0) == chunk(0)


async def test_a_blob_that_cannot_fit_is_refused_at_once(subject: Subject) -> None:
    subject.fill(True)
    with pytest.raises(StoreFull):
        await subject.blobs.open_partial(MAP)
    assert await subject.blobs.haves(MAP.sha256) is None
    subject.fill(False)
    await fetch(subject.blobs)


async def test_a_rotten_chunk_is_never_served_and_offered_no_more(subject: Subject) -> None:
    await fetch(subject.blobs)
    subject.rot(MAP.sha256, 1)
    with pytest.raises(StoreCorrupt):
        await subject.blobs.read_chunk(MAP.sha256, 1)
    found = await subject.blobs.haves(MAP.sha256)
    assert found is not None
    assert found[1].missing() == [1]
    with pytest.raises(BlobNotFound):
        await subject.blobs.read_chunk(MAP.sha256, 1)
    assert await subject.blobs.read_chunk(MAP.sha256, 2) == chunk(2)


async def test_a_blob_in_doubt_is_not_handed_to_an_engine_and_can_be_repaired(subject: Subject) -> None:
    await fetch(subject.blobs)
    subject.rot(MAP.sha256, 1)
    with pytest.raises(StoreCorrupt):
        await subject.blobs.read_chunk(MAP.sha256, 1)
    with pytest.raises(StoreCorrupt):
        await subject.blobs.path(MAP.sha256)
    with pytest.raises(BlobNotFound):
        await subject.blobs.path(MAP.sha256)
    partial = await subject.blobs.open_partial(MAP)
    assert partial.haves.missing() == [1]
    await partial.write(1, chunk(1))
    await partial.finish()
    assert await subject.blobs.path(MAP.sha256)
    assert await subject.blobs.read_chunk(MAP.sha256, 1) == chunk(1)


async def test_verifying_finds_what_nobody_asked_for(subject: Subject) -> None:
    await fetch(subject.blobs)
    subject.rot(MAP.sha256, 0)
    subject.rot(MAP.sha256, 3)
    assert (await subject.blobs.verify(MAP.sha256)).missing() == [0, 3]
    with pytest.raises(BlobNotFound):
        await subject.blobs.path(MAP.sha256)
    await fetch_missing(subject.blobs, [0, 3])
    assert (await subject.blobs.verify(MAP.sha256)).whole


async def fetch_missing(blobs: BlobStore, indexes: list[int]) -> None:
    partial = await blobs.open_partial(MAP)
    for index in indexes:
        await partial.write(index, chunk(index))
    await partial.finish()


async def test_an_empty_blob_is_whole_at_once(subject: Subject) -> None:
    empty = chunk_map_of_bytes(b"")
    partial = await subject.blobs.open_partial(empty)
    await partial.finish()
    assert await subject.blobs.haves(empty.sha256) == (empty, Haves.all(0))
    assert await subject.blobs.path(empty.sha256)


def in_thread_read(blobs: BlobStore, index: int, digest: Sha256 = MAP.sha256) -> bytes:
    buffer = bytearray(b"!" * MIB)
    length = blobs.read_chunk_into(digest, index, memoryview(buffer))
    return bytes(buffer[:length])


async def test_threads_read_whole_and_partial_blobs_into_a_buffer_of_theirs(subject: Subject) -> None:
    await fetch(subject.blobs, range(1, 3))
    assert await trio.to_thread.run_sync(in_thread_read, subject.blobs, 2) == chunk(2)
    with pytest.raises(BlobNotFound):
        await trio.to_thread.run_sync(in_thread_read, subject.blobs, 0)
    await fetch_missing(subject.blobs, [0, 3])
    assert await trio.to_thread.run_sync(in_thread_read, subject.blobs, 3) == chunk(3)
    for index in (-1, 4):
        with pytest.raises(BlobNotFound):
            await trio.to_thread.run_sync(in_thread_read, subject.blobs, index)
    with pytest.raises(BlobNotFound):
        await trio.to_thread.run_sync(in_thread_read, subject.blobs, 0, UNKNOWN)


async def test_a_rotten_chunk_that_a_thread_read_is_offered_no_more(subject: Subject) -> None:
    await fetch(subject.blobs)
    subject.rot(MAP.sha256, 1)
    with pytest.raises(StoreCorrupt):
        await trio.to_thread.run_sync(in_thread_read, subject.blobs, 1)
    found = await subject.blobs.haves(MAP.sha256)
    assert found is not None
    assert found[1].missing() == [1]
    with pytest.raises(StoreCorrupt):
        await subject.blobs.path(MAP.sha256)


async def test_what_threads_wrote_is_there_once_the_owner_says_so(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    async with trio.open_nursery() as nursery:
        for index in range(4):
            nursery.start_soon(trio.to_thread.run_sync, partial.write_blocking, index, memoryview(chunk(index)))
    assert partial.haves == Haves.none(4)
    for index in range(4):
        partial.written(index)
    await partial.finish()
    assert [await subject.blobs.read_chunk(MAP.sha256, index) for index in range(4)] == [chunk(i) for i in range(4)]


async def test_a_bad_chunk_and_a_full_disk_stop_a_thread_too(subject: Subject) -> None:
    partial = await subject.blobs.open_partial(MAP)
    with pytest.raises(ChunkMismatch):
        await trio.to_thread.run_sync(partial.write_blocking, 0, chunk(1))
    subject.fill(True)
    with pytest.raises(StoreFull):
        await trio.to_thread.run_sync(partial.write_blocking, 0, chunk(0))
    subject.fill(False)
    await partial.aclose()
    with pytest.raises(StoreError):
        await trio.to_thread.run_sync(partial.write_blocking, 0, chunk(0))
    with pytest.raises(StoreError):
        partial.written(0)


async def test_a_cancelled_reader_harms_nobody(subject: Subject) -> None:
    await fetch(subject.blobs)
    with trio.CancelScope() as scope:
        scope.cancel()
        await subject.blobs.read_chunk(MAP.sha256, 0)
    assert await subject.blobs.read_chunk(MAP.sha256, 0) == chunk(0)
