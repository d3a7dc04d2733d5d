"""A disk that fails to sync: what it may have lost is not vouched for afterwards."""

from __future__ import annotations

import errno
from pathlib import Path

from meshmax.base.units import MIB
from meshmax.store import open_store
from meshmax.store.disk import Disk
from meshmax.wire.chunkmap import chunk_map_of_bytes
from tests.store.fakes import in_place

DATA = bytes(range(256)) * (3 * MIB // 256)
MAP = chunk_map_of_bytes(DATA)


class _BadDisk(Disk):
    bad = full = False

    def write_whole(self, path: Path, data: bytes, temp_folder: Path | None = None, *, private: bool = False) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_whole(path, data, temp_folder, private=private)

    def sync(self, fd: int) -> None:
        if self.bad:
            raise OSError(errno.EIO, "Input/output error")
        super().sync(fd)


async def test_chunks_whose_sync_failed_at_the_end_are_fetched_again(tmp_path: Path) -> None:
    disk = _BadDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(0, DATA[:MIB])
        await partial.aclose()
        partial = await store.blobs.open_partial(MAP)
        await partial.write(1, DATA[MIB : 2 * MIB])
        disk.bad = True
        await partial.aclose()
        known = await store.blobs.haves(MAP.sha256)
        assert known is not None
        assert known[1].missing() == [1, 2]
        disk.bad = False


async def test_chunks_are_kept_where_only_their_bitmap_had_no_room(tmp_path: Path) -> None:
    disk = _BadDisk()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store:
        partial = await store.blobs.open_partial(MAP)
        await partial.write(1, DATA[MIB : 2 * MIB])
        disk.full = True
        await partial.aclose()
        known = await store.blobs.haves(MAP.sha256)
        assert known is not None
        assert known[1].missing() == [0, 2]
        disk.full = False
