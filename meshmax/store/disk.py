"""Disk: the few ways in which the store changes files, each safe against a crash, each able to fail on purpose in tests.

Rules: a file appears under its name only when it is whole (temporary file, fsync, rename, fsync of the folder); data is
synced before anything that vouches for it is written. Everything here blocks and is called through `RunSync`. OSErrors
become StoreFull or StoreError in `translated`, which callers put around their work. Not here: which files there are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, cast

from meshmax.base.errors import StoreError, StoreFull
from meshmax.base.units import format_bytes

TEMP_PREFIX: Final = ".meshmax-tmp-"  # a leading dot: neither a blob nor a part of a model's name
_FICLONE: Final = 0x40049409  # linux/fs.h, _IOW(0x94, 9, int)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_CLONE: Final = (
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.EBADF,
)


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    # Not os.posix_fallocate: where the file system cannot reserve, the C library plays it by writing a zero into each
    # block, which takes as long as writing the file, and may undo what another thread writes there.
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(None, use_errno=True).fallocate64
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return cast("Callable[[int, int, int, int], int]", found)


_fallocate: Final = _find_fallocate()


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn an OSError inside into StoreFull (no space, quota) or a StoreError that says ``what`` failed and why."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"{what}: {StoreFull.sentence()}") from None
        raise StoreError(f"{what}: {error.strerror or error}") from None


class Disk:
    """Changes to files. Tests replace single methods to play a full or a dying disk."""

    def create(self, path: Path) -> int:
        """A new, empty file of mode 0644, open for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def restart(self, path: Path) -> int:
        """An empty file to append to, made anew."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def allocate(self, fd: int, size: int, at_once: int | None = None) -> None:
        """Give the file its size and reserve its space, so that later writes cannot meet a full disk.

        Whether there is room for all of it is asked at once; with ``at_once``, only so many bytes are reserved now, and
        `reserve` is for the rest. Where space cannot be reserved, only the size is set.
        """
        free = os.fstatvfs(fd)
        missing = size - os.fstat(fd).st_blocks * 512
        if missing > free.f_bavail * free.f_frsize:
            have = format_bytes(free.f_bavail * free.f_frsize)
            raise StoreFull(f"{format_bytes(missing)} are needed and {have} are free: make room")
        os.ftruncate(fd, size)
        self.reserve(fd, 0, size if at_once is None else min(size, at_once))

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """Reserve space inside the file's size; others may be writing there. Nothing where the file system cannot."""
        if length and _fallocate is not None and _fallocate(fd, 0, offset, length):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EINTR):
                raise OSError(number, os.strerror(number))

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def sync(self, fd: int) -> None:
        """Data and size are on the disk when this returns."""
        os.fsync(fd)

    def sync_folder(self, folder: Path) -> None:
        """Names in ``folder`` are on the disk when this returns."""
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, source: Path, destination: Path) -> None:
        """Rename, over what was there."""
        os.replace(source, destination)

    def link(self, source: Path, destination: Path) -> None:
        """A second name for the same file."""
        os.link(source, destination, follow_symlinks=True)

    def refer(self, source: Path, destination: Path) -> None:
        """A symbolic link to ``source``, which stays where it is."""
        os.symlink(source, destination)

    def unlink(self, path: Path) -> None:
        """Remove a name; no error if it is gone already."""
        with suppress(FileNotFoundError):
            os.unlink(path)

    def try_clone(self, source_fd: int, destination_fd: int) -> bool:
        """Share the source's blocks (reflink); False where the file system cannot."""
        try:
            import fcntl

            fcntl.ioctl(destination_fd, _FICLONE, source_fd)
        except ImportError:
            return False
        except OSError as error:
            if error.errno in _CANNOT_CLONE:
                return False
            raise
        return True

    def move_in(self, source: Path, destination: Path) -> None:
        """Rename a synced file to where it belongs, durably."""
        self.replace(source, destination)
        self.sync_folder(destination.parent)

    def write_whole(self, path: Path, data: bytes, temp_folder: Path | None = None, *, private: bool = False) -> None:
        """Write a small file so that its name always stands for the old or the new content, whole.

        ``private``: nobody but the owner may read it (mode 0600), from before there is anything in it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = temp_name(temp_folder or path.parent)
        fd = self.create(temp)
        try:
            try:
                if private:
                    os.fchmod(fd, 0o600)
                self.write_at(fd, data, 0)
                self.sync(fd)
            finally:
                os.close(fd)
            self.move_in(temp, path)
        except OSError:
            with suppress(OSError):
                self.unlink(temp)
            raise


def temp_name(folder: Path) -> Path:
    """A name for a temporary file that `sweep_temps` will know."""
    return folder / f"{TEMP_PREFIX}{secrets.token_hex(8)}"


def sweep_temps(folder: Path) -> None:
    """Remove temporary files that a crash left in ``folder`` (of ours alone: nobody else is writing there)."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        with suppress(OSError):
            path.unlink()


def try_read(path: Path, limit: int) -> bytes | None:
    """The content of a small file; None if it is not there or has over ``limit`` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return data if len(data) <= limit else None


def same_device(one: Path, other: Path) -> bool:
    """Whether a file can be renamed from one folder to the other."""
    return one.stat().st_dev == other.stat().st_dev


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on; how much of it, where the file is too short."""
    got = 0
    while got < len(buffer):
        count = os.preadv(fd, [buffer[got:]], offset + got)
        if count == 0:
            break
        got += count
    return got
