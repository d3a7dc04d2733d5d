"""Pinning at work, and names that sweeps take away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from meshmax.base.errors import InvalidName, InvalidRequest, ModelNotFound, StoreFull
from meshmax.base.ids import Sha256
from meshmax.base.names import parse_name
from meshmax.base.status import ModelPresence, PeerStatus, PeerView
from meshmax.core.catalog import FirstSeen
from meshmax.core.pins import Pins
from meshmax.services.catalog import CatalogService, open_catalog
from meshmax.services.pins import Pinning
from meshmax.testing.gguf import build_gguf
from tests.services.test_catalog import KITCHEN, OWN, World

NEW = Sha256("e" * 64)


class Place:
    """A catalog with pins; ``saved`` is what is kept, ``full``: the disk is."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.pins = Pins()
        self.saved: list[dict[str, Sha256]] = []
        self.full = False
        self.catalog = CatalogService(
            world.models,
            world.blobs,
            OWN,
            lambda: 1000.0,
            world.peers,
            dict,
            world.ask,
            FirstSeen(),
            world.changed,
            self.pins,
        )
        self.pinning = Pinning(self.pins, self.catalog, self._save)

    async def _save(self, pins: Mapping[str, Sha256]) -> None:
        await trio.lowlevel.checkpoint()
        if self.full:
            raise StoreFull
        self.saved.append(dict(pins))

    async def add(self, name: str, tensor_bytes: int = 4096) -> Sha256:
        path = self.folder / "model.gguf"
        path.write_bytes(build_gguf(tensor_bytes=tensor_bytes))
        return (await self.catalog.add(name, path, False, lambda done, total: None)).manifest.digest

    def offer(self, name: str, *digests: Sha256) -> None:
        models = tuple(ModelPresence(digest, (parse_name(name).full,), "disk", 7) for digest in digests)
        self.world.views = (PeerView(KITCHEN, "online", "direct", PeerStatus(KITCHEN, 1, 0, "x", "0", models=models)),)


@asynccontextmanager
async def open_place(folder: Path) -> AsyncIterator[Place]:
    place = Place(World(), folder)
    async with open_catalog(place.catalog):
        yield place


async def test_a_pin_is_kept_before_it_counts(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        digest = await place.add("m")
        place.full = True
        with pytest.raises(StoreFull):
            await place.pinning.pin("m")
        assert not place.pins.keeps(digest)
        place.full = False
        assert (await place.pinning.pin("M")).pinned
        assert place.saved == [{parse_name("m").key: digest}]
        await place.pinning.pin("m")
        assert len(place.saved) == 1
        place.full = True
        with pytest.raises(StoreFull):
            await place.pinning.unpin("m")
        assert place.pins.keeps(digest)


async def test_a_pinned_model_is_shown_as_such_under_every_name(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        await place.add("m")
        await place.catalog.copy("m", "other")
        await place.add("third", 8192)
        await place.pinning.pin("m")
        assert {entry.name: entry.pinned for entry in place.catalog.entries()} == {
            "m:latest": True,
            "other:latest": True,
            "third:latest": False,
        }


async def test_a_pinned_name_can_neither_be_deleted_nor_mean_another_model(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        digest = await place.add("m")
        await place.pinning.pin("m")
        with pytest.raises(InvalidRequest, match="unpin"):
            await place.catalog.delete("m")
        with pytest.raises(InvalidRequest, match="unpin"):
            await place.add("M", 8192)
        await place.add("other", 8192)
        with pytest.raises(InvalidRequest, match="unpin"):
            await place.catalog.copy("other", "m")
        assert place.catalog.resolve("m").digest == digest
        await place.pinning.unpin("m")
        await place.catalog.delete("m")


async def test_a_pinned_name_means_its_digest_whatever_the_mesh_offers(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        old = Sha256("d" * 64)
        place.offer("far", old, NEW)
        assert (await place.pinning.pin(f"far@{NEW[:12]}")).digest == NEW
        assert place.catalog.resolve("far").digest == NEW
        assert place.catalog.resolve(f"far@{old[:12]}").digest == old
        place.offer("far", old)
        with pytest.raises(ModelNotFound, match="meshmax unpin far:latest"):
            place.catalog.resolve("far")
        assert not (await place.pinning.unpin("far")).pinned
        assert place.catalog.resolve("far").digest == old


async def test_names_that_are_no_model_or_no_name_are_not_pinned(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        for change in (place.pinning.pin, place.pinning.unpin):
            with pytest.raises(ModelNotFound):
                await change("nobody-has-it")
            with pytest.raises(InvalidName):
                await change("../x")
        digest = await place.add("m")
        assert await place.pinning.unpin("m") == await place.pinning.unpin("m@" + digest[:12])
        await place.pinning.pin("m")
        with pytest.raises(ModelNotFound):
            await place.pinning.unpin("m@" + "0" * 12)
        assert place.pins.keeps(digest)


async def test_a_model_that_a_sweep_takes_goes_under_all_its_names_and_they_mean_it_still(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        digest = await place.add("m")
        await place.catalog.copy("m", "other")
        kept = await place.add("third", 8192)
        await place.catalog.drop(digest)
        assert [stored.manifest.digest for stored in place.catalog.local()] == [kept]
        assert not any(place.world.blobs.whole(blob) for blob in (digest,))
        place.offer("m", NEW)
        with pytest.raises(ModelNotFound, match="first seen"):
            place.catalog.resolve("m")
        place.offer("m", NEW, digest)
        assert place.catalog.resolve("m").digest == digest
