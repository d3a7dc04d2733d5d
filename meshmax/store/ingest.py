"""Ingest: take a GGUF file into the store as a blob, in one pass, with constant memory.

Rules: the header is checked first, so that a truncated file is refused before anything is copied. The bytes go to a
temporary file (shared blocks where the file system can, else a copy; a hard link only on request) and are hashed as
they are stored, so that what a map vouches for is what lies there. Only then the file gets its blob name. Blocking, in
steps; called through RunSync.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from meshmax.base.errors import InvalidRequest, StoreError
from meshmax.base.model import CHUNK_BYTES, MAX_BLOB_BYTES, ChunkMap
from meshmax.base.units import MIB
from meshmax.store.disk import Disk, temp_name, translated
from meshmax.store.layout import Layout
from meshmax.store.maps import MapFiles
from meshmax.wire.chunkmap import BlobHasher
from meshmax.wire.gguf import MAX_HEADER_BYTES, GgufHeader, try_parse_header

STEP_CHUNKS: Final = 32  # 32 MiB: 0.1 s a step
_FIRST_PREFIX_BYTES: Final = MIB


def read_header(path: Path, whole: bool = False) -> GgufHeader:
    """The header of the GGUF at ``path``, ``whole`` or without long arrays.

    Raises InvalidRequest (not a GGUF, truncated), OSError.
    """
    # Opening a pipe that nobody writes to would hold this thread for ever.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise InvalidRequest("this is not a file")
        size = facts.st_size
        prefix = b""
        while True:
            prefix += file.read(min(max(_FIRST_PREFIX_BYTES, 3 * len(prefix)), MAX_HEADER_BYTES - len(prefix)))
            header = try_parse_header(prefix, size, whole)
            if header is not None:
                return header
            if len(prefix) < size and file.tell() == os.fstat(file.fileno()).st_size:
                raise InvalidRequest("the file became shorter while it was read")


class Ingest:
    """One file being taken in: `start`, `step` until it says True, `place`; `abort` at any time instead."""

    def __init__(self, layout: Layout, disk: Disk, maps: MapFiles, source: Path, link: bool) -> None:
        self.header: GgufHeader | None = None
        self.size = 0
        self.done = 0
        self._layout, self._disk, self._maps = layout, disk, maps
        self._source, self._link = source, link
        self._temp = temp_name(layout.partials)
        self._source_fd = self._temp_fd = -1
        self._copying = True
        self._hasher = BlobHasher()
        self._buffer = bytearray(CHUNK_BYTES)
        self._before: os.stat_result | None = None

    def start(self) -> None:
        """Check the file and make room. Raises InvalidRequest, StoreFull, StoreError."""
        try:
            self.header = read_header(self._source)
            self._source_fd = os.open(self._source, os.O_RDONLY | os.O_CLOEXEC)
            self._before = os.fstat(self._source_fd)
        except InvalidRequest as error:
            raise InvalidRequest(f"{self._source.name}: {error.message}") from None
        except OSError as error:
            raise InvalidRequest(f"{self._source} cannot be read: {error.strerror}") from None
        self.size = self._before.st_size
        if not stat.S_ISREG(self._before.st_mode) or self.size > MAX_BLOB_BYTES:
            raise InvalidRequest(f"{self._source} is not a file, or larger than {MAX_BLOB_BYTES} bytes")
        with translated(f"no room for {self._source.name}"):
            self._make_temp()

    def step(self) -> bool:
        """Copy and hash on; True at the end. Raises InvalidRequest if the file changes meanwhile, StoreFull, StoreError."""
        with translated(f"{self._source.name} was not taken in"):
            for _ in range(STEP_CHUNKS):
                if self.done >= self.size:
                    self._check_unchanged()
                    return True
                self._one_chunk()
        return False

    def place(self) -> ChunkMap:
        """Give the file its blob name, map and seal. Raises StoreFull, StoreError."""
        chunk_map = self._hasher.chunk_map()
        with translated(f"{self._source.name} was not put in its place"):
            if self._temp_fd >= 0:
                self._disk.sync(self._temp_fd)
            self._maps.save(chunk_map)
            self._maps.seal(chunk_map.sha256, self._temp, proved=True)
            self._disk.move_in(self._temp, self._layout.blob(chunk_map.sha256))
            self._disk.unlink(self._temp)  # renaming a hard link over another name of the same file leaves both
        self.abort()
        return chunk_map

    def abort(self) -> None:
        """Let go, and remove what is not in its place; idempotent, never raises."""
        for fd in (self._source_fd, self._temp_fd):
            if fd >= 0:
                os.close(fd)
        self._source_fd = self._temp_fd = -1
        with suppress(OSError):
            self._disk.unlink(self._temp)

    def _make_temp(self) -> None:
        if self._link:
            try:
                self._disk.link(self._source, self._temp)
            except OSError as error:
                raise StoreError(
                    f"{self._source.name} cannot be hard linked ({error.strerror}): it must be on the store's file system; "
                    "leave out --link to copy it"
                ) from None
            self._copying = False
            return
        self._temp_fd = self._disk.create(self._temp)
        self._copying = not self._disk.try_clone(self._source_fd, self._temp_fd)
        if self._copying:
            self._disk.allocate(self._temp_fd, self.size)

    def _one_chunk(self) -> None:
        fd = self._source_fd if self._copying or self._link else self._temp_fd
        view = memoryview(self._buffer)[: min(CHUNK_BYTES, self.size - self.done)]
        got = 0
        while got < len(view):
            count = os.preadv(fd, [view[got:]], self.done + got)
            if count == 0:
                raise InvalidRequest(f"{self._source.name} became shorter while it was read")
            got += count
        self._hasher.update(view)
        if self._copying:
            self._disk.write_at(self._temp_fd, view, self.done)
        self.done += len(view)

    def _check_unchanged(self) -> None:
        before, after = self._before, os.fstat(self._source_fd)
        if before is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InvalidRequest(f"{self._source.name} was changed while it was read; try again when it is complete")
