"""Writing a bundle: its parts one after the other, with constant memory, so that an interrupted export goes on.

Rules: a part has its name only when it is whole and synced; until then it is ``<name>.incomplete``. What lies there
already, under either name, is read and kept as far as it is what belongs there; only the rest is written. So a second
export of the same does nothing but verify. Every chunk is verified by the store as it is read. Blocking, in steps; called
through RunSync. Not here: what the parts hold (wire.bundle), which models and chunks go in (services.export).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blake3 import blake3

from meshmax.base.errors import InvalidRequest, ManifestInvalid, StoreCorrupt, StoreError, StoreFull
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap
from meshmax.base.units import MIB, format_bytes
from meshmax.store.bundle_read import read_envelope, read_header
from meshmax.store.disk import Disk, read_at, translated
from meshmax.wire.bundle import (
    SUFFIX,
    BundleIndex,
    Part,
    Piece,
    bundle_id,
    chunks_of,
    encode_header,
    lay_out,
    open_index,
    part_name,
)
from meshmax.wire.chunkmap import decode_map

INCOMPLETE: Final = ".incomplete"
STEP_CHUNKS: Final = 32  # 32 MiB: under 0.1 s a step, but on a slow stick
SYNC_BYTES: Final = (
    64 * MIB
)  # written between two syncs, so that progress is the stick's and not the cache's; 10 s if slow

ReadChunk = Callable[[Sha256, int, memoryview], int]  # ports.ChunkReader.read_chunk_into
ReadMap = Callable[[MapAddress], bytes | None]


class BundleWriter:
    """One export: `start`, `step` until it says True; `close` in any case. ``done`` of ``size`` bytes are in place."""

    def __init__(self, disk: Disk, folder: Path, stem: str, read_chunk: ReadChunk, read_map: ReadMap) -> None:
        self.done = self.size = self.kept = 0
        self.names: list[str] = []
        self._disk, self._folder, self._stem = disk, folder, stem
        self._read_chunk, self._read_map = read_chunk, read_map
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._fd = -1
        self._unsynced = 0
        self._work: Iterator[None] | None = None

    def earlier(self) -> list[BundleIndex]:
        """The indexes of bundles that lie here under this name, whole or not. Raises StoreError."""
        found: dict[bytes, BundleIndex] = {}
        with self._words("the folder was not read"):
            files = [path for path in sorted(self._folder.glob("*")) if self._is_ours(path.name)]
            for path in files[:100]:
                with suppress(ManifestInvalid):
                    header = read_header(path)
                    if header.bundle not in found:
                        found[header.bundle] = open_index(read_envelope(path, header))
        return list(found.values())

    def start(self, index: BundleIndex, envelope: bytes) -> None:
        """Plan the parts and look whether there is room. Raises InvalidRequest, StoreFull, StoreError."""
        parts = lay_out(index, len(envelope))
        self.names = [part_name(self._stem, part.number, len(parts)) for part in parts]
        self.size = sum(part.size for part in parts)
        with self._words("the bundle was not begun"):
            self._folder.mkdir(exist_ok=True)  # its own parents may be a stick that is not there
            here = sum(self._size_of(name) for name in self.names)
            free = os.statvfs(self._folder)
            if self.size - here > free.f_bavail * free.f_frsize:
                raise StoreFull(
                    f"the bundle needs {format_bytes(self.size - here)} in {self._folder} and "
                    f"{format_bytes(free.f_bavail * free.f_frsize)} are free: make room, then export again"
                )
        self._work = self._write_all(parts, envelope)

    def step(self) -> bool:
        """Write on; True at the end. Raises StoreFull, StoreError, BlobNotFound, StoreCorrupt, InvalidRequest."""
        assert self._work is not None
        with self._words("the bundle was not written"):
            return next(self._work, True) is True

    def close(self) -> None:
        """Let go; what is not whole stays and is taken up by the next export. Idempotent, never raises."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    # --- one part ----------------------------------------------------------------------------------------------------

    def _write_all(self, parts: tuple[Part, ...], envelope: bytes) -> Iterator[None]:
        for part, name in zip(parts, self.names, strict=True):
            final, temp = self._folder / name, self._folder / (name + INCOMPLETE)
            head = encode_header(part.number, len(parts), envelope) + envelope
            self._open(final, temp, bundle_id(envelope))
            self._put(0, head)
            for piece in part.pieces:
                chunk_map = self._map(piece)
                for count, (offset, index) in enumerate(_places(piece), 1):
                    self._chunk(chunk_map, offset, index)
                    if count % STEP_CHUNKS == 0:
                        yield
            os.ftruncate(self._fd, part.size)
            self._disk.sync(self._fd)
            self.close()
            self._disk.move_in(temp, final)
            yield

    def _open(self, final: Path, temp: Path, bundle: bytes) -> None:
        """Have what may lie there already as the incomplete file, open."""
        if final.exists():
            with suppress(ManifestInvalid):
                if read_header(final).bundle != bundle:
                    raise InvalidRequest(f"{final} is of another bundle: remove it, or export to another place")
            self._disk.replace(final, temp)
        try:
            self._fd = os.open(temp, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._fd = self._disk.create(temp)

    def _put(self, offset: int, data: bytes) -> None:
        if os.pread(self._fd, len(data), offset) == data:
            self._kept(len(data))
        else:
            self._write(offset, data)

    def _map(self, piece: Piece) -> ChunkMap:
        encoding = self._read_map(piece.blob.address)
        if encoding is None or len(encoding) != piece.blob.map_bytes:
            raise StoreCorrupt(
                f"the chunk map of blob {piece.blob.digest[:12]} changed while it was exported; try again"
            )
        self._put(piece.offset, encoding)
        return decode_map(encoding)

    def _chunk(self, chunk_map: ChunkMap, offset: int, index: int) -> None:
        data = self._buffer[: chunk_map.span(index)[1]]
        if read_at(self._fd, data, offset) == len(data) and blake3(data).digest() == chunk_map.chunk_hash(index):
            self._kept(len(data))
            return
        length = self._read_chunk(chunk_map.sha256, index, self._buffer)
        if length != len(data):
            raise StoreCorrupt(f"blob {chunk_map.sha256[:12]} changed while it was exported; try again")
        self._write(offset, data)

    def _kept(self, size: int) -> None:
        self.kept += size
        self.done += size

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        self._disk.write_at(self._fd, data, offset)
        self.done += len(data)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._disk.sync(self._fd)

    # --- files -------------------------------------------------------------------------------------------------------

    def _is_ours(self, name: str) -> bool:
        whole = name.removesuffix(INCOMPLETE)
        return whole == f"{self._stem}{SUFFIX}" or (whole.startswith(f"{self._stem}.") and whole.endswith(SUFFIX))

    def _size_of(self, name: str) -> int:
        for path in (self._folder / name, self._folder / (name + INCOMPLETE)):
            with suppress(OSError):
                return path.stat().st_size
        return 0

    @contextmanager
    def _words(self, what: str) -> Iterator[None]:
        try:
            with translated(what):
                yield
        except StoreFull as error:
            raise StoreFull(
                error.message
                if "needs" in error.message
                else f"there is no room left in {self._folder}; what was written is kept: make room, then export again"
            ) from None
        except StoreError as error:
            if os.strerror(errno.EFBIG) in error.message:
                raise StoreError(
                    f"the file system of {self._folder} takes no file of this size: export with --split 4GB"
                ) from None
            raise


def _places(piece: Piece) -> Iterator[tuple[int, int]]:
    """Each chunk of a piece: where it lies in the part, and its index in the blob."""
    for at, index in enumerate(chunks_of(piece)):
        yield piece.chunks_offset + at * CHUNK_BYTES, index
