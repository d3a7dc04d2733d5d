"""Disk: the few ways in which the store changes files, each safe against a crash, each able to fail on purpose in tests.

Rules: a file appears under its name only when it is whole (temporary file, fsync, rename, fsync of the folder); data is
synced before anything that vouches for it is written. Everything here blocks and is called through `RunSync`. OSErrors
become StoreFull or StoreError in `translated`, which callers put around their work. Not here: which files there are.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

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

    def allocate(self, fd: int, size: int) -> None:
        """Reserve ``size`` bytes, so that later writes cannot meet a full disk; where that is not possible, only set the size."""
        free = os.fstatvfs(fd)
        missing = size - os.fstat(fd).st_blocks * 512
        if missing > free.f_bavail * free.f_frsize:
            have = format_bytes(free.f_bavail * free.f_frsize)
            raise StoreFull(f"{format_bytes(missing)} are needed and {have} are free: make room, then pull again")
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(fd, size)

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

    def write_whole(self, path: Path, data: bytes, temp_folder: Path | None = None) -> None:
        """Write a small file so that its name always stands for the old or the new content, whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = temp_name(temp_folder or path.parent)
        fd = self.create(temp)
        try:
            try:
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
