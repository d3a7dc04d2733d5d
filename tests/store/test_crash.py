"""A process that dies at any change to the disk leaves the old state or the new one, and nothing half."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from meshmax.base.errors import BlobNotFound
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.names import parse_name
from meshmax.base.units import MIB
from meshmax.store import Store, open_store
from meshmax.testing.gguf import build_gguf
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.store.fakes import DyingDisk, PowerCut, in_place

NAME = parse_name("tiny")
RECORD = Signed(PeerId("12D3KooWx"), b"new", b"s" * 64)
OLD, NEW = build_gguf(tensor_bytes=MIB, seed=1), build_gguf(tensor_bytes=2 * MIB, seed=2)
BLOB = bytes(range(256)) * 4096 + b"tail"
MAP = chunk_map_of_bytes(BLOB)

Deed = Callable[[Store, Path], Awaitable[None]]


async def add(store: Store, folder: Path, data: bytes, record: Signed | None = None) -> None:
    path = folder / "source.gguf"
    path.write_bytes(data)
    manifest = await store.models.ingest(path, False, lambda _done, _size: None)
    await store.models.put(NAME, manifest.raw, record)


async def fetch(store: Store, _folder: Path) -> None:
    partial = await store.blobs.open_partial(MAP)
    await partial.write(0, BLOB[:MIB])
    await partial.sync()
    await partial.write(1, BLOB[MIB:])
    await partial.finish()


async def replace(store: Store, folder: Path) -> None:
    await add(store, folder, NEW, RECORD)


async def delete(store: Store, _folder: Path) -> None:
    await store.models.delete(NAME)


async def run(folder: Path, disk: DyingDisk, deed: Deed) -> bool:
    """Do it on a disk that may die; whether it was done. What the process would not do after its death is not done."""
    try:
        async with open_store(folder / "models", folder / "state", in_place, disk) as store:
            await deed(store, folder)
    except BaseExceptionGroup as group:
        assert group.subgroup(PowerCut) is not None  # noqa: PT017
        return False
    except PowerCut:
        return False
    return True


async def check(folder: Path, before: bytes) -> set[str]:
    """Everything that the store offers after a crash is true; what is under the name."""
    async with open_store(folder / "models", folder / "state", in_place, DyingDisk()) as store:
        names = set()
        for model in await store.models.models():
            for blob in model.manifest.blobs:
                assert (await store.blobs.verify(blob.digest)).whole
                content = (await store.blobs.path(blob.digest)).read_bytes()
                assert len(content) == blob.size
            data = (await store.blobs.path(model.manifest.layers[0].digest)).read_bytes()
            assert data in (before, OLD, NEW)
            assert model.record in ((None, RECORD) if data == NEW else (None,))
            names.add("old" if data == OLD else "new")
        found = await store.blobs.haves(MAP.sha256)
        if found is not None:
            for index in range(MAP.count):
                if index in found[1]:
                    assert await store.blobs.read_chunk(MAP.sha256, index) == BLOB[index * MIB : (index + 1) * MIB]
    assert not [path for path in folder.rglob(".meshmax-tmp-*") if path.is_file()]
    return names


@pytest.mark.parametrize("lossy", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize(
    ("deed", "expected"), [(fetch, [["old"]]), (replace, [["old"], ["new"]]), (delete, [["old"], []])]
)
async def test_a_death_at_any_change_leaves_the_old_or_the_new(
    tmp_path: Path, deed: Deed, expected: list[list[str]], lossy: bool
) -> None:
    outcomes = set()
    for dies_at in range(200):
        folder = tmp_path / str(dies_at)
        folder.mkdir()
        await run(folder, DyingDisk(), lambda store, folder: add(store, folder, OLD))
        done = await run(folder, DyingDisk(dies_at, lossy), deed)
        outcomes.add(frozenset(await check(folder, OLD)))
        if done:
            break
        async with open_store(folder / "models", folder / "state", in_place, DyingDisk()) as store:
            if deed is fetch:
                await resume(store)
            elif deed is replace:
                await replace(store, folder)
        await check(folder, OLD)
    else:
        pytest.fail("the deed was never done")
    assert outcomes == {frozenset(names) for names in expected}


async def resume(store: Store) -> None:
    """What a crash left of a fetch can be gone on from."""
    try:
        path = await store.blobs.path(MAP.sha256)
    except BlobNotFound:
        partial = await store.blobs.open_partial(MAP)
        for index in partial.haves.missing():
            await partial.write(index, BLOB[index * MIB : (index + 1) * MIB])
        await partial.finish()
        path = await store.blobs.path(MAP.sha256)
    assert path.read_bytes() == BLOB


async def test_chunks_synced_before_a_death_are_not_fetched_again(tmp_path: Path, autojump_clock: object) -> None:
    disk = DyingDisk()

    async def half(store: Store, _folder: Path) -> None:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(1, BLOB[MIB:])
        await trio.sleep(1.5)  # the store syncs by itself
        disk.dies_at = disk.changes
        await partial.write(0, BLOB[:MIB])

    assert not await run(tmp_path, disk, half)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        found = await store.blobs.haves(MAP.sha256)
        assert found is not None
        assert found[1].missing() == [0]
        assert await store.blobs.read_chunk(MAP.sha256, 1) == BLOB[MIB:]


async def test_a_chunk_that_was_written_but_not_synced_counts_only_if_it_is_really_there(tmp_path: Path) -> None:
    disk = DyingDisk()

    async def half(store: Store, _folder: Path) -> None:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(1, BLOB[MIB:])
        disk.dies_at = disk.changes
        await partial.sync()

    assert not await run(tmp_path, disk, half)
    (data,) = (tmp_path / "state" / "partials").glob("*.data")
    kept = data.read_bytes()
    for content, total in ((kept, 1), (bytes(len(kept)), 0)):  # killed; or the power went, and the data with it
        data.write_bytes(content)
        async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
            found = await store.blobs.haves(MAP.sha256)
            assert found is not None
            assert found[1].total == total


async def test_a_partial_that_cannot_be_read_does_not_keep_the_store_from_opening(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(0, BLOB[:MIB])
        await partial.aclose()

    def unreadable(*_args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("meshmax.store.blobs.load_marked", unreadable)
        async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
            assert await store.blobs.haves(MAP.sha256) is None
            await add(store, tmp_path, NEW)
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
        known = await store.blobs.haves(MAP.sha256)
        assert known is not None
        assert 0 in known[1]  # nothing of it was thrown away
