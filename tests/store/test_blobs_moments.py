"""Blobs whose files are replaced while they are read through: what was found of the old one is not said of the new one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import Sha256
from meshmax.store import Store, open_store, scrub
from tests.store.fakes import blob_file, flip, in_place
from tests.store.test_blobs import DATA, adopt, fetch

T = TypeVar("T")
MOMENTS = range(24)


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    monkeypatch.setattr(scrub, "STEP_CHUNKS", 1)  # so that something can happen between two chunks
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as opened:
        yield opened


async def beside(work: Callable[[], object], change: Callable[[], object], moment: int) -> None:
    """``change`` at a checkpoint of ``work``, whose error is of the file as it was and does not matter."""

    async def runs() -> None:
        with suppress(MeshmaxError):
            await work()  # type: ignore[misc]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(runs)
        for _ in range(moment):
            await trio.lowlevel.checkpoint()
        await change()  # type: ignore[misc]


async def is_good(store: Store, digest: Sha256) -> bool:
    with suppress(MeshmaxError):
        await store.blobs.path(digest)
        known = await store.blobs.haves(digest)
        return known is not None and known[1].whole
    return False


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("adopted", [True, False])
async def test_a_damaged_blob_that_is_put_in_place_anew_while_it_is_read_stays(
    adopted: bool, moment: int, store: Store, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    digest = adopt(models) if adopted else (await fetch(store)).sha256
    file = blob_file(models, digest)
    flip(file, 5)

    async def replace() -> None:
        new = tmp_path / "new"
        new.write_bytes(DATA)
        os.replace(new, file)
        await store.blobs.placed(digest)

    await beside(lambda: store.blobs.haves(digest) if adopted else store.blobs.verify(digest), replace, moment)
    assert await is_good(store, digest)
    assert file.read_bytes() == DATA
