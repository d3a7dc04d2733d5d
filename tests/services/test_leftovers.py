"""Interrupted pulls: remembered by name, shown with what is here of them, and freed."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock as Clock

from meshmax.base.errors import InvalidName
from meshmax.base.events import BlobProgress, Transfer, TransferState
from meshmax.base.ids import Sha256
from meshmax.services import leftovers as module
from meshmax.services.leftovers import Leftover, Leftovers, open_leftovers
from meshmax.store.leftovers_file import FILE_NAME, load_leftovers, save_leftovers

BIG, SMALL, OTHER = Sha256("ab" * 32), Sha256("cd" * 32), Sha256("ef" * 32)


def transfer(model: str, state: TransferState, *blobs: Sha256) -> Transfer:
    return Transfer("t", model, "in", state, blobs=tuple(BlobProgress(digest, 1000, 0) for digest in blobs))


class World:
    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.here: dict[Sha256, int] = {}
        self.saved: list[Mapping[str, Mapping[Sha256, int]]] = []
        self.leftovers = Leftovers(lambda: tuple(self.transfers), self.sizes, self.drop, self.save, {})

    async def sizes(self) -> Mapping[Sha256, int]:
        await trio.lowlevel.checkpoint()
        return self.here

    async def drop(self, digest: Sha256, size: int) -> bool:
        await trio.lowlevel.checkpoint()
        return self.here.pop(digest, None) is not None

    async def save(self, begun: Mapping[str, Mapping[Sha256, int]]) -> None:
        await trio.lowlevel.checkpoint()
        self.saved.append(begun)


async def test_what_an_interrupted_pull_left_is_shown_by_its_models_name_and_freed(autojump_clock: Clock) -> None:
    world = World()
    world.here = {BIG: 300, OTHER: 7}
    world.transfers = [transfer("big", "running", BIG, SMALL)]
    world.leftovers.note()
    assert await world.leftovers.list() == ()  # a pull that runs leaves nothing
    assert not await world.leftovers.drop("big")
    world.transfers = [transfer("big@" + "0" * 12, "cancelled", BIG, SMALL)]
    world.leftovers.note()
    assert await world.leftovers.list() == (Leftover("big:latest", 300, 2000),)
    assert not await world.leftovers.drop("other")
    assert not world.leftovers.freed("t")
    assert await world.leftovers.drop("BIG")
    assert world.leftovers.freed("t")
    assert world.here == {OTHER: 7}
    assert await world.leftovers.list() == ()
    with pytest.raises(InvalidName):
        await world.leftovers.drop("../big")


async def test_what_a_pull_that_halts_has_already_is_shown_with_its_pull_and_not_freed(autojump_clock: Clock) -> None:
    world = World()
    world.here = {BIG: 300}
    world.transfers = [transfer("big", "running", BIG, SMALL)]
    world.leftovers.note()
    halted: tuple[TransferState, ...] = ("paused", "waiting")
    for state in halted:
        world.transfers = [transfer("big", state, BIG, SMALL), transfer("big", "cancelled", BIG)]  # newest first
        assert await world.leftovers.list() == (Leftover("big:latest", 300, 2000, "t", state),)
        assert not await world.leftovers.drop("big")
    world.transfers = [transfer("big", "paused")]  # of which, after a restart, no more is known
    assert await world.leftovers.list() == (Leftover("big:latest", 300, 2000, "t", "paused"),)
    world.here = {}
    assert await world.leftovers.list() == ()


async def test_a_pull_that_was_completed_leaves_nothing_and_a_blob_that_another_pull_needs_stays(
    autojump_clock: Clock,
) -> None:
    world = World()
    world.here = {BIG: 300}
    world.transfers = [transfer("big", "done", BIG), transfer("big", "failed", BIG)]  # newest first
    world.leftovers.note()
    assert await world.leftovers.list() == ()
    world.transfers = [transfer("twin", "running", BIG), transfer("old", "failed", BIG)]
    world.leftovers.note()
    assert not await world.leftovers.drop("old")
    assert world.here == {BIG: 300}


async def test_names_are_kept_on_disk_and_bounded(
    autojump_clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 2)
    world = World()
    async with open_leftovers(world.leftovers):
        world.transfers = [transfer(name, "failed", BIG) for name in ("c", "b", "a")]
        world.leftovers.wake()
        await trio.testing.wait_all_tasks_blocked()
    assert list(world.saved[-1]) == ["b:latest", "c:latest"]
    save_leftovers(tmp_path, world.saved[-1])
    assert load_leftovers(tmp_path) == {"b:latest": {BIG: 1000}, "c:latest": {BIG: 1000}}
    for damaged in ("{", '{"../x": {}}', '{"x": {"zz": 1}}'):
        (tmp_path / FILE_NAME).write_text(damaged)
        assert load_leftovers(tmp_path) == {}
