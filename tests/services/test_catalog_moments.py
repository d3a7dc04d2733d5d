"""The catalog over a slow store, where names and lists change while it reads: at whatever moment, nothing is lost by it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from meshmax.base.errors import ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.model import ChunkMap, Haves, Signed, StoredModel
from meshmax.base.names import ModelName, parse_name
from meshmax.core.catalog import FirstSeen
from meshmax.services.catalog import CatalogService, open_catalog
from meshmax.testing.memory_store import MemoryBlobStore, MemoryModelStore
from tests.services.test_catalog import OWN, World

Clock = trio.testing.MockClock
MOMENTS = [each / 4 for each in range(14)]


class SlowBlobs(MemoryBlobStore):
    """What a blob consists of is found out in ``takes_s``, as where it has to be read first."""

    takes_s = 0.0

    async def haves(self, digest: Sha256) -> tuple[ChunkMap, Haves] | None:
        await trio.sleep(self.takes_s)
        return await super().haves(digest)


class SlowModels(MemoryModelStore):
    """Lists are read in a second, and are of when that began; names change in half of one."""

    takes_s = 0.0

    async def models(self) -> tuple[StoredModel, ...]:
        found = await super().models()
        await trio.sleep(self.takes_s)
        return found

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        await trio.sleep(self.takes_s / 2)
        return await super().put(name, raw_manifest, record)

    async def delete(self, name: ModelName) -> None:
        await trio.sleep(self.takes_s / 2)
        await super().delete(name)


@asynccontextmanager
async def slow_catalog(*names: tuple[str, bytes]) -> AsyncIterator[tuple[CatalogService, SlowModels, SlowBlobs]]:
    """A catalog of these models, none of which has a record yet."""
    world = World()
    blobs = SlowBlobs()
    models = SlowModels(blobs)
    for name, data in names:
        await models.add_model(name, data)
    models.takes_s = 1.0
    service = CatalogService(
        models, blobs, OWN, lambda: 1000.0, world.peers, dict, world.ask, FirstSeen(), world.changed
    )
    async with open_catalog(service) as catalog:
        yield catalog, models, blobs


def meanings(catalog: CatalogService) -> dict[str, Sha256]:
    return {stored.name: stored.manifest.digest for stored in catalog.local()}


async def in_store(models: SlowModels) -> dict[str, Sha256]:
    return {stored.name: stored.manifest.digest for stored in await MemoryModelStore.models(models)}


@pytest.mark.parametrize("at_s", MOMENTS)
@pytest.mark.parametrize("deletes", [False, True])
async def test_a_list_that_was_read_before_a_change_does_not_hide_it(
    deletes: bool, at_s: float, autojump_clock: Clock
) -> None:
    async with slow_catalog(("old", b"old")) as (catalog, models, _):
        new = models._manifest(b"new")
        await trio.sleep(10)  # until the records are signed

        async def looks() -> None:
            await trio.sleep(2.0)
            await catalog.refresh_if_changed()  # as now and then

        async with trio.open_nursery() as nursery:
            nursery.start_soon(looks)
            await trio.sleep(at_s)
            if deletes:
                await catalog.delete("old")
                assert meanings(catalog) == {}
            else:
                await catalog.publish(parse_name("new"), new)
                assert "new:latest" in meanings(catalog)
        assert meanings(catalog) == await in_store(models)


@pytest.mark.parametrize("at_s", MOMENTS)
async def test_a_model_that_a_sweep_takes_is_offered_no_more_from_its_first_moment_on(
    at_s: float, autojump_clock: Clock
) -> None:
    async with slow_catalog(("old", b"old"), ("older", b"old")) as (catalog, _, _):
        await trio.sleep(10)
        digest = catalog.local()[0].manifest.digest

        async def watch() -> None:
            while True:
                await trio.lowlevel.checkpoint()
                assert digest not in meanings(catalog).values()
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.refresh)
            await trio.sleep(at_s)
            nursery.start_soon(catalog.drop, digest)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(watch)
            await trio.sleep(5)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("at_s", [each / 4 for each in range(40)])
@pytest.mark.parametrize("then", ["deleted", "another"])
async def test_a_record_that_is_made_meanwhile_gives_a_name_no_meaning_that_it_has_lost(
    then: str, at_s: float, autojump_clock: Clock
) -> None:
    async with slow_catalog(("a", b"adopted"), ("b", b"adopted")) as (catalog, models, blobs):
        blobs.takes_s = 1.0
        adopted, new = catalog.local()[0].manifest.digest, models._manifest(b"new")
        await trio.sleep(at_s)
        if then == "deleted":
            await catalog.delete("a")
        else:
            await catalog.publish(parse_name("a"), new)
        await trio.sleep(30)
        left = {"b:latest": adopted} | ({} if then == "deleted" else {"a:latest": new.digest})
        assert await in_store(models) == left
        assert meanings(catalog) == left
        assert all(stored.record is not None for stored in catalog.local())


@pytest.mark.parametrize("apart_s", MOMENTS)
async def test_of_two_that_get_one_name_at_once_the_last_copy_of_the_other_is_kept(
    apart_s: float, autojump_clock: Clock
) -> None:
    async with slow_catalog(("a", b"first")) as (catalog, models, blobs):
        await trio.sleep(10)
        blobs.takes_s = 0.25
        one, other = models._manifest(b"one"), models._manifest(b"other")
        digests = {catalog.local()[0].manifest.digest, one.digest, other.digest}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.publish, parse_name("a"), one)
            await trio.sleep(apart_s)
            nursery.start_soon(catalog.publish, parse_name("a"), other)
        assert set((await in_store(models)).values()) == digests
        assert set(meanings(catalog).values()) == digests


@pytest.mark.parametrize("at_s", MOMENTS)
@pytest.mark.parametrize("then", ["deleted", "another"])
async def test_a_sweep_takes_no_name_that_means_another_model_by_then(
    then: str, at_s: float, autojump_clock: Clock
) -> None:
    async with slow_catalog(("a", b"old"), ("b", b"old")) as (catalog, models, _):
        await trio.sleep(10)
        old, new = catalog.local()[0].manifest.digest, models._manifest(b"new")

        async def change() -> None:
            if then == "another":
                await catalog.put(parse_name("a"), new.raw, None)
            else:
                with suppress(ModelNotFound):  # where the sweep was first
                    await catalog.delete("a")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.sleep(at_s)
            await catalog.drop(old)
        await trio.sleep(10)
        assert await in_store(models) == ({"a:latest": new.digest} if then == "another" else {})
        assert meanings(catalog) == await in_store(models)
