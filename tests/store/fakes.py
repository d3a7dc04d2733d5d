"""How tests run the store: blocking work in place, a disk that dies or fills up on purpose, files damaged by hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from meshmax.base.ids import Sha256
from meshmax.store.disk import Disk

T = TypeVar("T")


async def in_place(work: Callable[[], T], /) -> T:
    """ports.RunSync without threads."""
    await trio.lowlevel.checkpoint()
    return work()


class PowerCut(BaseException):
    """The process is dead: not an error that anybody may catch and clean up after."""


class DyingDisk(Disk):
    """Dies before its change number ``dies_at`` (counted from 0) and does nothing from then on. ``changes`` counts them.

    ``lossy``: the machine dies, not only the process, and everything that was written and not synced is lost.
    """

    def __init__(self, dies_at: int | None = None, lossy: bool = False) -> None:
        self.changes = 0
        self.dies_at = dies_at
        self._lossy = lossy
        self._unsynced: dict[int, list[tuple[bytes, int]]] = {}  # by inode

    def _change(self) -> None:
        if self.dies_at is not None and self.changes >= self.dies_at:
            raise PowerCut
        self.changes += 1

    def create(self, path: Path) -> int:
        self._change()
        return super().create(path)

    def allocate(self, fd: int, size: int, at_once: int | None = None) -> None:
        self._change()
        super().allocate(fd, size, at_once)

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        self._change()
        if self.changes == self.dies_at:  # the last one before the end is torn
            data = memoryview(data)[: len(data) // 2]
        if self._lossy:
            self._unsynced.setdefault(os.fstat(fd).st_ino, []).append((bytes(data), offset))
        else:
            super().write_at(fd, data, offset)

    def replace(self, source: Path, destination: Path) -> None:
        self._change()
        super().replace(source, destination)

    def link(self, source: Path, destination: Path) -> None:
        self._change()
        super().link(source, destination)

    def unlink(self, path: Path) -> None:
        self._change()
        super().unlink(path)

    def sync(self, fd: int) -> None:
        for data, offset in self._unsynced.pop(os.fstat(fd).st_ino, []):
            super().write_at(fd, data, offset)

    def sync_folder(self, folder: Path) -> None:
        """Names are taken to be on the disk in the order in which they were given."""

    def try_clone(self, source_fd: int, destination_fd: int) -> bool:
        return False


class FullDisk(Disk):
    """Has no room while ``full``."""

    def __init__(self) -> None:
        self.full = False

    def _require_room(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def allocate(self, fd: int, size: int, at_once: int | None = None) -> None:
        self._require_room()
        super().allocate(fd, size, at_once)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        self._require_room()
        super().reserve(fd, offset, length)

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        self._require_room()
        super().write_at(fd, data, offset)


def blob_file(models: Path, digest: Sha256) -> Path:
    return models / "blobs" / f"sha256-{digest}"


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file and leave its time stamp, as a rotten disk does."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
