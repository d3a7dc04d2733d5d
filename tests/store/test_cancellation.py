"""A caller who is cancelled at any await leaves nothing half done: the store goes on, and a later call ends the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from meshmax.base.units import MIB
from meshmax.store import Store, open_store
from tests.store.fakes import DyingDisk, blob_file
from tests.store.test_crash import BLOB, MAP, NAME, OLD, Deed, add, check, delete, replace, resume

T = TypeVar("T")


class CancellingRunSync:
    """Runs work in place; just before call ``at`` of those that count it cancels ``scope``."""

    def __init__(self) -> None:
        self.scope: trio.CancelScope | None = None
        self.at = self.calls = 0

    async def __call__(self, work: Callable[[], T], /) -> T:
        if self.scope is not None:
            if self.calls == self.at:
                self.scope.cancel()
            self.calls += 1
        await trio.lowlevel.checkpoint()
        return work()


async def fetch_politely(store: Store, _folder: Path) -> None:
    partial = await store.blobs.open_partial(MAP)
    try:
        await partial.write(0, BLOB[:MIB])
        await partial.sync()
        await partial.write(1, BLOB[MIB:])
        await partial.finish()
    finally:
        await partial.aclose()


async def copy_and_look(store: Store, _folder: Path) -> None:
    await store.models.copy(NAME, NAME)
    for model in await store.models.models():
        for blob in model.manifest.blobs:
            await store.blobs.haves(blob.digest)
            await store.blobs.verify(blob.digest)


async def map_adopted(store: Store, folder: Path) -> None:
    blob_file(folder / "models", MAP.sha256).write_bytes(BLOB)
    await store.blobs.read_chunk(MAP.sha256, 0)


@pytest.mark.parametrize("deed", [fetch_politely, replace, delete, copy_and_look, map_adopted])
async def test_cancelling_at_any_await_leaves_the_store_in_order(tmp_path: Path, deed: Deed) -> None:
    for at in range(200):
        folder = tmp_path / str(at)
        folder.mkdir()
        run_sync = CancellingRunSync()
        async with open_store(folder / "models", folder / "state", run_sync, DyingDisk()) as store:
            await add(store, folder, OLD)
            with trio.CancelScope() as scope:
                run_sync.scope, run_sync.at = scope, at
                await deed(store, folder)
            run_sync.scope = None
            assert not list((folder / "state" / "partials").glob(".meshmax-tmp-*"))
            if run_sync.calls <= at:
                return  # it was done before its end came
            if deed is delete and not await store.models.models():
                assert not list((folder / "models" / "blobs").iterdir())
                continue
            if not scope.cancelled_caught:
                pass  # the rest was shielded
            elif deed is fetch_politely:
                await resume(store)
            else:
                await deed(store, folder)
        await check(folder, OLD)
    pytest.fail("the deed was never done")
