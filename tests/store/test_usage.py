"""What the store takes, as the disk counts it; and forgetting partials."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from meshmax.base.ids import Sha256
from meshmax.base.units import MIB
from meshmax.store import Store, open_store
from meshmax.store.usage import PartialUse, Usage, read_usage
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.store.fakes import blob_file, in_place

DATA = os.urandom(2 * MIB) + b"tail"
MAP = chunk_map_of_bytes(DATA)
A, B, C = (Sha256(letter * 64) for letter in "abc")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as opened:
        yield opened


async def test_blobs_of_our_own_count_and_shared_ones_free_nothing(store: Store, tmp_path: Path) -> None:
    await trio.lowlevel.checkpoint()
    folder = tmp_path / "models"
    blob_file(folder, A).write_bytes(DATA)
    blob_file(folder, B).write_bytes(DATA)
    os.link(blob_file(folder, B), tmp_path / "elsewhere")
    blob_file(folder, C).symlink_to(tmp_path / "elsewhere")
    (folder / "blobs" / "sha256-short").write_bytes(b"x")
    usage = read_usage(store.blobs.layout)
    assert usage.blobs.keys() == {A, B, C}
    assert usage.blobs[A] >= 2 * MIB
    assert usage.blobs[B] == usage.blobs[C] == 0
    assert usage.used_bytes == usage.blobs[A]
    assert usage.free_bytes > 0


async def test_a_partial_counts_what_it_takes_and_can_be_forgotten_once_it_is_at_rest(store: Store) -> None:
    partial = await store.blobs.open_partial(MAP)
    await partial.write(0, DATA[:MIB])
    assert not await store.blobs.drop_partial(MAP.sha256)
    await partial.aclose()
    (found,) = read_usage(store.blobs.layout).partials
    assert found.digest == MAP.sha256
    assert found.size >= MIB
    assert await store.blobs.drop_partial(MAP.sha256)
    assert read_usage(store.blobs.layout).partials == ()
    assert await store.blobs.haves(MAP.sha256) is None
    assert not await store.blobs.drop_partial(MAP.sha256)


async def test_a_partial_that_was_forgotten_can_be_begun_anew(store: Store) -> None:
    for _ in range(2):
        partial = await store.blobs.open_partial(MAP)
        assert partial.haves.total == 0
        await partial.write(0, DATA[:MIB])
        await partial.aclose()
        await store.blobs.drop_partial(MAP.sha256)


async def test_what_a_registrys_download_takes_counts(store: Store) -> None:
    await trio.lowlevel.checkpoint()
    (store.blobs.layout.partials / f"{A}.download").write_bytes(DATA)
    usage = read_usage(store.blobs.layout)
    assert usage.staged[A] >= 2 * MIB
    assert usage.partials == ()


def test_what_is_still_to_come_leaves_out_what_is_here() -> None:
    usage = Usage(0, {A: 10}, (PartialUse(B, 30, 0.0),), {C: 5})
    assert usage.used_bytes == 45
    assert usage.coming({A: 100, B: 100, C: 100, Sha256("d" * 64): 7}) == 70 + 95 + 7
    assert usage.coming({B: 20}) == 0
