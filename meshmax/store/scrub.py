"""Scrub: read a blob through and say which chunks are good; and what to do with one that is damaged.

A step reads STEP_CHUNKS chunks, so that a slow scrub can be paced, cancelled and shares its thread. Where the sha256 is
to be proved too, a step costs ten times as much. A damaged whole blob becomes a partial that has the good chunks: its
file is renamed (a process that has it mapped keeps the same bytes, and later sees bad ones made good), unless it has
other hard links or is a reference, whose owner's file must not change under him; then the good chunks are copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.store.disk import Disk, read_at
from meshmax.store.layout import Layout
from meshmax.store.maps import MapFiles
from meshmax.store.partials import save_bits
from meshmax.wire.chunkmap import BlobHasher

STEP_CHUNKS: Final = 32  # 32 MiB: under 10 ms of hashing, 100 ms with sha256


class Scrub:
    """One reading of one blob. Afterwards ``bad`` are the chunks that do not match, ``true_map`` the map of the bytes read.

    ``chunk_map`` None: an adopted blob, whose map is to be made. ``haves`` None: a whole blob. ``prove``: compute the
    sha256 as well. All methods block.
    """

    def __init__(self, path: Path, chunk_map: ChunkMap | None, haves: Haves | None, prove: bool) -> None:
        self.chunk_map = chunk_map
        self.bad: list[int] = []
        self.true_map: ChunkMap | None = None
        self._path = path
        self._haves = haves
        self._hasher = BlobHasher() if prove or chunk_map is None else None
        self._work: Iterator[None] | None = None
        self._stat: os.stat_result | None = None

    def step(self) -> bool:
        """Read on; True at the end. Raises OSError."""
        if self._work is None:
            self._work = self._read_through()
        return next(self._work, True) is True

    def is_of_now(self) -> bool:
        """Whether the file that was read is the one that is there now: reading takes long, and others replace files."""
        try:
            now = os.stat(self._path)
        except OSError:
            return False
        read = self._stat
        return read is not None and (read.st_dev, read.st_ino) == (now.st_dev, now.st_ino)

    def good_haves(self, count: int) -> Haves:
        """The chunks of a whole blob that are good."""
        bits = (1 << count) - 1
        for index in self.bad:
            bits &= ~(1 << index)
        return Haves(count, bits.to_bytes(-(-count // 8), "little"))

    def seal(self, maps: MapFiles, digest: Sha256) -> None:
        """Every chunk was good: say so on disk (unless the file has changed since), with the map if it is new."""
        seal = maps.try_seal(digest)
        if self.true_map is not None and self.chunk_map is None:
            maps.save(self.true_map)
        stat = os.stat(self._path)
        if self._stat is not None and (stat.st_size, stat.st_mtime_ns) == (self._stat.st_size, self._stat.st_mtime_ns):
            maps.seal(digest, self._path, proved=self.true_map is not None or bool(seal and seal.proved))

    def _read_through(self) -> Iterator[None]:
        with self._path.open("rb", buffering=0) as file:
            self._stat = os.fstat(file.fileno())
            buffer = bytearray(CHUNK_BYTES)
            count = self.chunk_map.count if self.chunk_map else -(-self._stat.st_size // CHUNK_BYTES)
            for index in range(count):
                if self._haves is None or index in self._haves:
                    self._check(index, _read_chunk(file.fileno(), buffer, index))
                if index % STEP_CHUNKS == STEP_CHUNKS - 1:
                    yield
        if self.chunk_map is not None and self._haves is None and self._stat.st_size > self.chunk_map.size:
            self._mark_bad(max(0, count - 1))  # bytes beyond the end: cut off when the last chunk is fetched again
        if self._hasher is not None:
            self.true_map = self._hasher.chunk_map()

    def _check(self, index: int, data: memoryview) -> None:
        if self.chunk_map is not None:
            right_size = len(data) == self.chunk_map.span(index)[1]
            if not right_size or blake3(data).digest() != self.chunk_map.chunk_hash(index):
                self._mark_bad(index)
        if self._hasher is not None:
            self._hasher.update(data)

    def _mark_bad(self, index: int) -> None:
        self.bad.append(index)
        self._hasher = None  # the whole cannot be right any more


def bad_to_partial(layout: Layout, disk: Disk, maps: MapFiles, chunk_map: ChunkMap, haves: Haves) -> None:
    """Turn a damaged whole blob into a partial with the chunks ``haves``. A crash between leaves it in doubt. Raises OSError."""
    digest = chunk_map.sha256
    blob, partial = layout.blob(digest), layout.partial(digest)
    address = maps.save(chunk_map)
    maps.unseal(digest)
    if not blob.is_symlink() and os.stat(blob).st_nlink == 1:
        save_bits(layout, disk, digest, address, haves)
        disk.move_in(blob, partial)
        return
    disk.unlink(partial)
    fd = disk.create(partial)
    try:
        disk.allocate(fd, chunk_map.size)
        with blob.open("rb", buffering=0) as source:
            buffer = bytearray(CHUNK_BYTES)
            for index in range(chunk_map.count):
                if index in haves:
                    disk.write_at(fd, _read_chunk(source.fileno(), buffer, index), chunk_map.span(index)[0])
        disk.sync(fd)
    finally:
        os.close(fd)
    save_bits(layout, disk, digest, address, haves)
    disk.unlink(blob)


def _read_chunk(fd: int, buffer: bytearray, index: int) -> memoryview:
    view = memoryview(buffer)
    return view[: read_at(fd, view, index * CHUNK_BYTES)]
