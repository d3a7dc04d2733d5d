"""Blobs from outside, put together at places: what survives, what is believed, what is swept."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshmax.base.errors import BlobNotFound, IntegrityError, StoreError, StoreFull
from meshmax.base.ids import Sha256
from meshmax.base.units import MIB
from meshmax.store import Store, open_store
from meshmax.store.disk import TEMP_PREFIX
from meshmax.store.staging import KEPT_S, MAX_SPANS, SPANS_SUFFIX, load_spans
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.store.fakes import DyingDisk, FullDisk, PowerCut, in_place

DATA = random.Random(5).randbytes(3 * MIB + 77)
MAP = chunk_map_of_bytes(DATA)
DIGEST = MAP.sha256


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as opened:
        yield opened


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "state" / "partials").iterdir())


async def test_bytes_in_any_order_become_a_blob_with_its_map(store: Store, tmp_path: Path) -> None:
    staged = await store.staging.open_download(DIGEST, len(DATA))
    for start in (2 * MIB, 0, MIB):
        await staged.write(start, DATA[start : start + MIB])
        await staged.hash_on()
    await staged.write(3 * MIB, DATA[3 * MIB :])
    assert await staged.finish(DIGEST) == MAP
    assert (await store.blobs.path(DIGEST)).read_bytes() == DATA
    known = await store.blobs.haves(DIGEST)
    assert known is not None
    assert known[0] == MAP
    assert known[1].whole
    assert leftovers(tmp_path) == []


async def test_the_digests_follow_what_is_there_without_a_gap(store: Store) -> None:
    staged = await store.staging.open_download(DIGEST, len(DATA))
    await staged.write(MIB, DATA[MIB : 2 * MIB])
    assert not await staged.hash_on()
    await staged.write(0, DATA[: MIB - 1])
    assert not await staged.hash_on()
    await staged.write(MIB - 1, DATA[MIB - 1 : MIB])
    assert await staged.hash_on()
    assert staged.hashed_bytes == 2 * MIB
    await staged.aclose()


async def test_bytes_that_are_not_the_blob_are_thrown_away_and_named(store: Store, tmp_path: Path) -> None:
    staged = await store.staging.open_download(DIGEST, len(DATA))
    await staged.write(0, DATA[:-1] + b"?")
    with pytest.raises(IntegrityError, match=f"want sha256:{DIGEST}, got sha256:"):
        await staged.finish(DIGEST)
    with pytest.raises(BlobNotFound):
        await store.blobs.path(DIGEST)
    assert leftovers(tmp_path) == []


async def test_what_is_there_is_never_overwritten(store: Store) -> None:
    staged = await store.staging.open_download(DIGEST, len(DATA))
    await staged.write(MIB, DATA[MIB : 2 * MIB])
    await staged.write(0, DATA[:MIB] + bytes(MIB) + DATA[2 * MIB :])
    assert await staged.finish(DIGEST) == MAP


async def test_a_blob_with_a_gap_is_not_finished(store: Store) -> None:
    staged = await store.staging.open_download(DIGEST, len(DATA))
    await staged.write(0, DATA[:MIB])
    with pytest.raises(StoreError, match="bytes are missing"):
        await staged.finish(DIGEST)
    await staged.aclose()


async def test_a_download_goes_on_where_it_was_left(tmp_path: Path) -> None:
    for start in (0, MIB, 2 * MIB):
        async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
            staged = await store.staging.open_download(DIGEST, len(DATA))
            assert staged.have.total == start
            await staged.write(start, DATA[start : start + MIB])
            await staged.aclose()
            await staged.aclose()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        staged = await store.staging.open_download(DIGEST, len(DATA))
        await staged.write(3 * MIB, DATA[3 * MIB :])
        assert await staged.finish(DIGEST) == MAP


async def test_wherever_a_power_cut_comes_what_is_noted_is_there(tmp_path: Path) -> None:
    for dies_at in range(40):
        folder = tmp_path / str(dies_at)
        disk = DyingDisk(dies_at, lossy=True)
        try:
            async with open_store(folder / "models", folder / "state", in_place, disk) as store:
                staged = await store.staging.open_download(DIGEST, len(DATA))
                for start in range(0, len(DATA), MIB):
                    await staged.write(start, DATA[start : start + MIB])
                    await staged.sync()
                await staged.finish(DIGEST)
                await staged.aclose()
            assert dies_at > 10
            break
        except BaseExceptionGroup as group:
            if group.split(PowerCut)[1] is not None:
                raise
        except PowerCut:
            pass
        async with open_store(folder / "models", folder / "state", in_place) as store:
            if (folder / "models" / "blobs" / f"sha256-{DIGEST}").exists():
                assert (await store.blobs.path(DIGEST)).read_bytes() == DATA
                continue
            staged = await store.staging.open_download(DIGEST, len(DATA))
            for start, end in staged.have.gaps(0, len(DATA)):
                await staged.write(start, DATA[start:end])
            assert await staged.finish(DIGEST) == MAP
    else:
        raise AssertionError("it never came to its end")


async def test_one_at_a_time_puts_a_blob_together(store: Store) -> None:
    staged = await store.staging.open_download(DIGEST, len(DATA))
    with pytest.raises(StoreError, match="being fetched already"):
        await store.staging.open_download(DIGEST, len(DATA))
    await staged.aclose()
    again = await store.staging.open_download(DIGEST, len(DATA))
    await again.aclose()
    with pytest.raises(StoreError, match="closed"):
        await again.write(0, b"x")


async def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    disk = FullDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        staged = await store.staging.open_download(DIGEST, len(DATA))
        await staged.write(0, DATA[:MIB])
        disk.full = True
        with pytest.raises(StoreFull):
            await staged.write(MIB, DATA[MIB:])
        assert staged.have.total == MIB
        disk.full = False
        await staged.write(MIB, DATA[MIB:])
        assert await staged.finish(DIGEST) == MAP


async def test_what_a_full_disk_did_not_let_us_note_is_still_taken_up(tmp_path: Path) -> None:
    disk = FullDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        staged = await store.staging.open_download(DIGEST, len(DATA))
        await staged.write(0, DATA[:MIB])
        disk.full = True
        await staged.aclose()
        disk.full = False
        again = await store.staging.open_download(DIGEST, len(DATA))
        assert again.have.total == MIB
        await again.discard()
        anew = await store.staging.open_download(DIGEST, len(DATA))
        assert anew.have.total == 0
        await anew.aclose()


async def test_a_full_disk_at_the_beginning_leaves_nothing(tmp_path: Path) -> None:
    disk = FullDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        disk.full = True
        with pytest.raises(StoreFull):
            await store.staging.open_download(DIGEST, len(DATA))
        assert leftovers(tmp_path) == []


async def test_an_upload_has_its_digest_at_the_end_and_no_size_before(store: Store, tmp_path: Path) -> None:
    staged = await store.staging.open_upload()
    await staged.write(0, DATA[: MIB + 5])
    await staged.hash_on()
    await staged.write(MIB + 5, DATA[MIB + 5 :])
    assert await staged.finish(DIGEST) == MAP
    assert leftovers(tmp_path) == []


async def test_an_upload_that_is_closed_or_killed_is_gone(tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        staged = await store.staging.open_upload()
        await staged.write(0, DATA)
        await staged.aclose()
        assert leftovers(tmp_path) == []
        killed = await store.staging.open_upload()
        await killed.write(0, DATA)
        assert [name.startswith(TEMP_PREFIX) for name in leftovers(tmp_path)] == [True]
        await killed.sync()
        os.close(killed._fd)
        killed._fd = -1
    async with open_store(tmp_path / "models", tmp_path / "state", in_place):
        assert leftovers(tmp_path) == []


async def test_an_upload_has_no_more_places_than_a_client_needs(store: Store) -> None:
    staged = await store.staging.open_upload()
    for at in range(MAX_SPANS):
        await staged.write(2 * at, b"x")
    with pytest.raises(StoreError, match=str(MAX_SPANS)):
        await staged.write(2 * MAX_SPANS, b"x")
    await staged.aclose()


async def test_an_empty_blob_is_a_blob(store: Store) -> None:
    empty = chunk_map_of_bytes(b"")
    staged = await store.staging.open_download(empty.sha256, 0)
    assert await staged.finish(empty.sha256) == empty
    assert (await store.blobs.path(empty.sha256)).read_bytes() == b""


async def test_a_start_sweeps_what_is_of_no_use(tmp_path: Path) -> None:
    partials = tmp_path / "state" / "partials"
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        for digest in ("aa" * 32, "bb" * 32):
            staged = await store.staging.open_download(Sha256(digest), len(DATA))
            await staged.write(0, DATA[:MIB])
            await staged.aclose()
        (partials / f"{'cc' * 32}.download").write_bytes(b"without spans")
        (partials / f"{'dd' * 32}{SPANS_SUFFIX}").write_bytes(b"without data")
        old = time.time() - KEPT_S - 5
        os.utime(partials / f"{'bb' * 32}{SPANS_SUFFIX}", (old, old))
    async with open_store(tmp_path / "models", tmp_path / "state", in_place):
        assert leftovers(tmp_path) == [f"{'aa' * 32}.download", f"{'aa' * 32}.spans"]


@pytest.mark.parametrize("raw", [b"", b"x", b"\xa0", b"\x80" * 200_000])
def test_damaged_spans_mean_that_nothing_is_there(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.spans").write_bytes(raw)
    assert load_spans(tmp_path / "x.spans", 100).total == 0
