"""What takes room in the store: blobs and partials as the disk counts them, and how much is free. Reads alone; blocking.

A blob that other programs share with us (a symbolic link, a file with further hard links) would free nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from meshmax.base.ids import HEX64, Sha256
from meshmax.store.disk import translated
from meshmax.store.layout import Layout
from meshmax.store.staging import DATA_SUFFIX

_BLOB_PREFIX: Final = "sha256-"
_SECTOR_BYTES: Final = 512  # st_blocks counts these, whatever the file system's blocks


class PartialUse(msgspec.Struct, frozen=True):
    """A partial: bytes that it takes, and when it was last written to (Unix time)."""

    digest: Sha256
    size: int
    touched_s: float


class Usage(msgspec.Struct, frozen=True):
    """``blobs``: what removing each one would free; ``staged``: bytes of each blob on its way from a registry."""

    free_bytes: int
    blobs: dict[Sha256, int] = {}
    partials: tuple[PartialUse, ...] = ()
    staged: dict[Sha256, int] = {}

    @property
    def used_bytes(self) -> int:
        """All of it."""
        partials = sum(partial.size for partial in self.partials)
        return sum(self.blobs.values()) + partials + sum(self.staged.values())

    def coming(self, blobs: dict[Sha256, int]) -> int:
        """Bytes that are still to be written until ``blobs`` (sizes by digest) are whole here."""
        begun = {partial.digest: partial.size for partial in self.partials}
        begun.update(self.staged)
        lacking = {digest: size for digest, size in blobs.items() if digest not in self.blobs}
        return sum(max(size - begun.get(digest, 0), 0) for digest, size in lacking.items())


def read_usage(layout: Layout) -> Usage:
    """Look at every file. Raises StoreError."""
    with translated("the store's size was not read"):
        free = os.statvfs(layout.blobs)
        blobs = {
            digest: 0 if stat.st_nlink > 1 or entry.is_symlink() else _size(stat)
            for digest, entry, stat in _files(layout.blobs, _BLOB_PREFIX, "")
        }
        partials = tuple(
            PartialUse(digest, _size(stat), _touched_s(layout, digest, stat.st_mtime))
            for digest, _, stat in _files(layout.partials, "", ".data")
        )
        staged = {digest: _size(stat) for digest, _, stat in _files(layout.partials, "", DATA_SUFFIX)}
    return Usage(free.f_bavail * free.f_frsize, blobs, partials, staged)


def _files(folder: Path, prefix: str, suffix: str) -> Iterator[tuple[Sha256, os.DirEntry[str], os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not (name.startswith(prefix) and name.endswith(suffix)):
                continue
            digest = name[len(prefix) : len(name) - len(suffix)]
            if not HEX64.fullmatch(digest):
                continue
            try:
                yield Sha256(digest), entry, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # gone since


def _size(stat: os.stat_result) -> int:
    return stat.st_blocks * _SECTOR_BYTES


def _touched_s(layout: Layout, digest: Sha256, written_s: float) -> float:
    """When it was last fetched: opening it renews its marks."""
    try:
        return max(written_s, layout.marks(digest).stat().st_mtime)
    except OSError:
        return written_s
