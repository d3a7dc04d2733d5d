"""Blobs on disk: doubt, damage, repair, and folders that are shared with Ollama."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import BlobNotFound, ConfigError, StoreCorrupt, StoreError, StoreFull
from meshmax.base.ids import Sha256
from meshmax.base.model import ChunkMap, Haves
from meshmax.base.units import MIB
from meshmax.store import Store, open_store
from meshmax.store.partials import PROVED_AT_ONCE_BYTES, RESERVE_STEP_BYTES
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.store.fakes import FullDisk, blob_file, flip, in_place

DATA = b"a" * MIB + b"b" * MIB + b"c"
MAP = chunk_map_of_bytes(DATA)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as opened:
        yield opened


async def fetch(store: Store, data: bytes = DATA) -> ChunkMap:
    chunk_map = chunk_map_of_bytes(data)
    partial = await store.blobs.open_partial(chunk_map)
    for index in partial.haves.missing():
        offset, length = chunk_map.span(index)
        await partial.write(index, data[offset : offset + length])
    await partial.finish()
    return chunk_map


def adopt(models: Path, data: bytes = DATA) -> Sha256:
    """A blob as Ollama leaves it: a file, and nothing of ours."""
    digest = chunk_map_of_bytes(data).sha256
    blob_file(models, digest).write_bytes(data)
    return digest


async def test_a_blob_that_was_touched_is_verified_and_used_if_it_is_right(store: Store, tmp_path: Path) -> None:
    await fetch(store)
    file = blob_file(tmp_path / "models", MAP.sha256)
    os.utime(file, (1, 1))
    assert await store.blobs.path(MAP.sha256) == file
    seal = tmp_path / "state" / "seals" / MAP.sha256
    assert msgspec.json.decode(seal.read_bytes())["mtime_ns"] == 10**9


@pytest.mark.parametrize("change", [b"", DATA[:-1], DATA + b"x", DATA[:MIB], b"A" + DATA[1:]])
async def test_a_blob_that_was_changed_is_refused_and_becomes_what_is_good_of_it(
    store: Store, tmp_path: Path, change: bytes
) -> None:
    await fetch(store)
    file = blob_file(tmp_path / "models", MAP.sha256)
    file.write_bytes(change)
    os.utime(file, (1, 1))
    with pytest.raises(StoreCorrupt):
        await store.blobs.path(MAP.sha256)
    assert not file.exists()
    found = await store.blobs.haves(MAP.sha256)
    assert found is not None
    assert [index for index in range(3) if index in found[1]] == [
        index for index in range(3) if change[index * MIB : (index + 1) * MIB] == DATA[index * MIB : (index + 1) * MIB]
    ][: 2 if len(change) > len(DATA) else 3]
    await fetch(store)
    assert (await store.blobs.path(MAP.sha256)).read_bytes() == DATA


async def test_doubt_survives_a_restart(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        await fetch(store)
        flip(blob_file(tmp_path / "models", MAP.sha256), 5)
        with pytest.raises(StoreCorrupt):
            await store.blobs.read_chunk(MAP.sha256, 0)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        with pytest.raises(StoreCorrupt):
            await store.blobs.path(MAP.sha256)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        assert await store.blobs.haves(MAP.sha256) == (MAP, Haves.none(3).with_chunk(1).with_chunk(2))


async def test_repairing_a_damaged_hard_link_leaves_its_owners_file_alone(store: Store, tmp_path: Path) -> None:
    await fetch(store)
    file = blob_file(tmp_path / "models", MAP.sha256)
    theirs = tmp_path / "theirs.gguf"
    os.link(file, theirs)
    flip(file, MIB)
    damaged = theirs.read_bytes()
    assert (await store.blobs.verify(MAP.sha256)).missing() == [1]
    await fetch(store)
    assert (await store.blobs.path(MAP.sha256)).read_bytes() == DATA
    assert theirs.read_bytes() == damaged


async def test_a_process_that_has_a_damaged_blob_open_keeps_its_bytes(store: Store, tmp_path: Path) -> None:
    await fetch(store)
    file = blob_file(tmp_path / "models", MAP.sha256)
    flip(file, MIB)
    with file.open("rb") as reader:
        await store.blobs.verify(MAP.sha256)
        assert len(reader.read()) == len(DATA)


async def test_an_adopted_blob_gets_its_map_when_somebody_asks(store: Store, tmp_path: Path) -> None:
    digest = adopt(tmp_path / "models")
    assert await store.blobs.path(digest) == blob_file(tmp_path / "models", digest)
    assert not list((tmp_path / "state" / "maps").iterdir())
    assert await store.blobs.haves(digest) == (MAP, Haves.all(3))
    assert await store.blobs.read_chunk(digest, 2) == b"c"


async def test_reading_a_chunk_is_asking_too(store: Store, tmp_path: Path) -> None:
    assert await store.blobs.read_chunk(adopt(tmp_path / "models"), 1) == b"b" * MIB


async def test_many_who_ask_for_a_map_wait_for_one_reading(store: Store, tmp_path: Path) -> None:
    digest = adopt(tmp_path / "models")
    found = []

    async def ask() -> None:
        found.append(await store.blobs.haves(digest))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert found == [(MAP, Haves.all(3))] * 20


async def test_a_caller_who_gives_up_does_not_throw_the_map_away(store: Store, tmp_path: Path) -> None:
    digest = adopt(tmp_path / "models", bytes(80 * MIB))
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.blobs.haves, digest)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            scope.cancel()
    for _ in range(50):
        await trio.lowlevel.checkpoint()
    assert list((tmp_path / "state" / "maps").iterdir())


async def test_an_adopted_blob_that_is_not_what_its_name_says_is_never_served(store: Store, tmp_path: Path) -> None:
    digest = Sha256("a" * 64)
    blob_file(tmp_path / "models", digest).write_bytes(DATA)
    assert await store.blobs.haves(digest) is None
    with pytest.raises(StoreCorrupt):
        await store.blobs.path(digest)
    with pytest.raises(BlobNotFound):
        await store.blobs.read_chunk(digest, 0)
    with pytest.raises(StoreCorrupt, match="removed"):
        await store.blobs.verify(digest)
    assert not blob_file(tmp_path / "models", digest).exists()


async def test_an_adopted_blob_that_is_wrong_can_be_pulled_over(store: Store, tmp_path: Path) -> None:
    blob_file(tmp_path / "models", MAP.sha256).write_bytes(b"wrong")
    assert await store.blobs.haves(MAP.sha256) is None
    await fetch(store)
    assert (await store.blobs.path(MAP.sha256)).read_bytes() == DATA


async def test_a_blob_that_vanishes_is_not_found_and_not_half_there(store: Store, tmp_path: Path) -> None:
    await fetch(store)
    blob_file(tmp_path / "models", MAP.sha256).unlink()
    assert await store.blobs.haves(MAP.sha256) is None
    for question in (store.blobs.path, store.blobs.verify):
        with pytest.raises(BlobNotFound):
            await question(MAP.sha256)
    with pytest.raises(BlobNotFound):
        await store.blobs.read_chunk(MAP.sha256, 0)
    await fetch(store)


async def test_a_map_that_lies_about_a_small_blob_is_found_out_when_it_is_whole(store: Store) -> None:
    lie = ChunkMap(Sha256("b" * 64), MAP.size, MAP.blake3, MAP.hashes)
    partial = await store.blobs.open_partial(lie)
    for index in range(3):
        await partial.write(index, DATA[index * MIB : (index + 1) * MIB])
    with pytest.raises(StoreCorrupt, match="publisher"):
        await partial.finish()
    assert await store.blobs.haves(lie.sha256) is None


async def test_a_map_that_lies_about_a_large_blob_is_found_out_by_verifying(store: Store, tmp_path: Path) -> None:
    data = bytes(PROVED_AT_ONCE_BYTES + 1)
    true = chunk_map_of_bytes(data)
    lie = ChunkMap(Sha256("b" * 64), true.size, true.blake3, true.hashes)
    partial = await store.blobs.open_partial(lie)
    for index in range(lie.count):
        await partial.write(index, bytes(lie.span(index)[1]))
    await partial.finish()
    with pytest.raises(StoreCorrupt, match="removed"):
        await store.blobs.verify(lie.sha256)
    assert await store.blobs.haves(lie.sha256) is None
    assert not blob_file(tmp_path / "models", lie.sha256).exists()


async def test_a_true_large_blob_is_proved_once(store: Store, tmp_path: Path) -> None:
    chunk_map = await fetch(store, bytes(PROVED_AT_ONCE_BYTES + 1))
    seal = tmp_path / "state" / "seals" / chunk_map.sha256
    assert not msgspec.json.decode(seal.read_bytes())["proved"]
    assert (await store.blobs.verify(chunk_map.sha256)).whole
    assert msgspec.json.decode(seal.read_bytes())["proved"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xa0"])
async def test_a_damaged_bitmap_vouches_for_nothing(tmp_path: Path, content: bytes) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(0, DATA[:MIB])
    (tmp_path / "state" / "partials" / f"{MAP.sha256}.bits").write_bytes(content)
    (tmp_path / "state" / "partials" / f"{MAP.sha256}.marks").write_bytes(content * 3)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        assert await store.blobs.haves(MAP.sha256) == (MAP, Haves.none(3))
        await fetch(store)


async def test_marks_name_chunks_that_are_then_verified(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(0, DATA[:MIB])
    marks = tmp_path / "state" / "partials" / f"{MAP.sha256}.marks"
    marks.write_bytes(b"".join(index.to_bytes(4, "little") for index in (0, 1, 2, 3, 2**32 - 1)) + b"xx")
    (tmp_path / "state" / "partials" / f"{MAP.sha256}.bits").write_bytes(b"lost")
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        assert await store.blobs.haves(MAP.sha256) == (MAP, Haves.none(3).with_chunk(0))


async def test_a_damaged_map_file_counts_as_none(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        await fetch(store)
    (file,) = (tmp_path / "state" / "maps").iterdir()
    flip(file, 40)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        assert await store.blobs.haves(MAP.sha256) == (MAP, Haves.all(3))


async def test_leftovers_are_swept_and_files_of_others_left(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place):
        pass
    ours = [tmp_path / "state" / folder / ".meshmax-tmp-1" for folder in ("maps", "seals", "partials", "records")]
    ours += [tmp_path / "state" / "partials" / f"{'a' * 64}.data", tmp_path / "state" / "partials" / f"{'b' * 64}.bits"]
    ours += [tmp_path / "state" / "seals" / ("c" * 64)]
    theirs = [tmp_path / "models" / "blobs" / f"sha256-{'d' * 64}-partial", tmp_path / "models" / "manifests" / "note"]
    for path in ours + theirs:
        path.write_bytes(b"x")
    async with open_store(tmp_path / "models", tmp_path / "state", in_place):
        assert not [path for path in ours if path.exists()]
        assert all(path.exists() for path in theirs)


async def test_a_bitmap_that_finds_no_room_is_saved_when_there_is_some(tmp_path: Path, autojump_clock: object) -> None:
    disk = FullDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(0, DATA[:MIB])
        disk.full = True
        with pytest.raises(StoreFull):
            await partial.sync()
        await trio.sleep(3)
        assert partial.dirty
        disk.full = False
        await trio.sleep(2)
        assert not partial.dirty


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be used for models"):
        async with open_store(tmp_path / "file", tmp_path / "state", in_place):
            pass


async def test_a_failing_read_is_an_error_of_the_tree(store: Store, tmp_path: Path) -> None:
    await fetch(store)
    file = blob_file(tmp_path / "models", MAP.sha256)
    file.unlink()
    file.mkdir()
    with pytest.raises(StoreError):
        await store.blobs.read_chunk(MAP.sha256, 0)


LARGE = chunk_map_of_bytes(bytes(RESERVE_STEP_BYTES + 3 * MIB))


async def test_the_space_of_a_large_blob_is_reserved_while_chunks_come(store: Store, tmp_path: Path) -> None:
    partial = await store.blobs.open_partial(LARGE)
    await partial.write(0, bytes(MIB))
    await trio.testing.wait_all_tasks_blocked()
    (file,) = (tmp_path / "state" / "partials").glob("*.data")
    assert file.stat().st_blocks * 512 >= LARGE.size
    assert file.stat().st_size == LARGE.size
    await partial.aclose()


async def test_a_large_blob_for_which_there_is_no_room_in_all_is_refused_at_once(store: Store) -> None:
    huge = ChunkMap(LARGE.sha256, 1 << 41, LARGE.blake3, bytes(32 << 21))
    with pytest.raises(StoreFull, match="are free"):
        await store.blobs.open_partial(huge)


async def test_space_that_somebody_else_took_meanwhile_is_told_by_the_next_write(tmp_path: Path) -> None:
    disk = FullDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        partial = await store.blobs.open_partial(LARGE)
        disk.full = True
        await trio.testing.wait_all_tasks_blocked()
        disk.full = False
        with pytest.raises(StoreFull):
            await partial.write(1, bytes(MIB))
        await partial.aclose()
        partial = await store.blobs.open_partial(LARGE)
        await partial.write(1, bytes(MIB))
        await partial.aclose()


async def test_chunks_may_turn_out_bad_in_threads_while_it_is_asked_what_is_here(store: Store) -> None:
    chunk_map = await fetch(store)
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        numbers = range(100_000, 102_000)  # of no chunk there is: only the table grows
        threads = [threading.Thread(target=_doubt, args=(store, chunk_map, numbers)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            store.blobs._without_bad(chunk_map.sha256, Haves.all(200_000))
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before_s)
    assert len(store.blobs._bad[chunk_map.sha256]) == len(numbers)


def _doubt(store: Store, chunk_map: ChunkMap, numbers: range) -> None:
    for number in numbers:
        store.blobs._doubt(chunk_map.sha256, number)
