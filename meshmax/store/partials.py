"""Partials: blobs being fetched, as a preallocated file and a bitmap that never says more than the disk holds.

Rules: a chunk is verified before it is written and marked after; the data is synced before a bitmap that vouches for it
replaces the old one (in one rename), so neither kill -9 nor a power cut leaves a bitmap that lies. A dirty partial is synced
within SYNC_INTERVAL_S by its store, and when it is closed. What was written since is also in a list of marks, which is
never synced: it survives kill -9 but proves nothing, so the chunks that it names are verified when the partial is taken
up again. Thus a kill costs the chunks in flight, and a power cut one second more. A full disk keeps what is there: whether
there is room is asked before the first chunk, and the space is reserved in steps while chunks come already.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import msgspec
import trio

from meshmax.base.errors import ChunkMismatch, IntegrityError, ManifestInvalid, StoreCorrupt, StoreError
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import MAX_BLOB_BYTES, ChunkMap, Haves
from meshmax.base.units import MIB
from meshmax.ports import RunSync
from meshmax.store.disk import Disk, translated, try_read
from meshmax.store.layout import Layout
from meshmax.store.maps import MapFiles
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import BlobHasher, check_chunk, encode_map, map_address
from meshmax.wire.signed import canonical, decode_canonical

SYNC_INTERVAL_S: Final = 1.0
RESERVE_STEP_BYTES: Final = 16 * MIB  # of space reserved: 5 ms in memory, under 1 ms on a disk
PROVED_AT_ONCE_BYTES: Final = 16 * MIB  # up to this size the sha256 is computed when a blob is finished: under 50 ms
_MARK: Final = struct.Struct("<I")
# A chunk is marked once a run; sixteen runs that were all killed within a second of their end are more than enough.
_MAX_MARKS_BYTES: Final = MAX_BLOB_BYTES // MIB * _MARK.size * 16
_MAX_BITS_BYTES: Final = MAX_BLOB_BYTES // MIB // 8 + 256
_log = get_logger("store")


class _Bits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bitmap file: ``map`` is the address of the chunk map that the bits are of."""

    map: str
    bits: bytes


def load_bits(layout: Layout, digest: Sha256, chunk_map: ChunkMap) -> Haves:
    """The chunks that a partial has by its bitmap file; none of them if that is missing, damaged or of another map."""
    none = Haves.none(chunk_map.count)
    raw = try_read(layout.bits(digest), _MAX_BITS_BYTES)
    if raw is None:
        return none
    try:
        word = decode_canonical(raw, _Bits)
    except ManifestInvalid:
        return none
    if word.map != map_address(encode_map(chunk_map)) or len(word.bits) != len(none.bits):
        return none
    kept = int.from_bytes(word.bits, "little") & ((1 << chunk_map.count) - 1)
    return Haves(chunk_map.count, kept.to_bytes(len(none.bits), "little"))


def load_marked(layout: Layout, digest: Sha256, chunk_map: ChunkMap, haves: Haves) -> Haves:
    """``haves`` and the chunks that the list of marks names, as far as they are really there."""
    raw = try_read(layout.marks(digest), _MAX_MARKS_BYTES) or b""
    marked = {index for (index,) in _MARK.iter_unpack(raw[: len(raw) // _MARK.size * _MARK.size])}
    fd = os.open(layout.partial(digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index in marked:
            if index < chunk_map.count and index not in haves and _is_there(fd, chunk_map, index):
                haves = haves.with_chunk(index)
    finally:
        os.close(fd)
    return haves


def _is_there(fd: int, chunk_map: ChunkMap, index: int) -> bool:
    offset, length = chunk_map.span(index)
    try:
        check_chunk(chunk_map, index, os.pread(fd, length, offset))
    except ChunkMismatch:
        return False
    return True


def save_bits(layout: Layout, disk: Disk, digest: Sha256, address: MapAddress, haves: Haves) -> None:
    """Replace the bitmap file. The data that it vouches for is synced already."""
    disk.write_whole(layout.bits(digest), canonical(_Bits(address, haves.bits)))


class PartialFile:
    """One partial blob, open for writing or at rest. Implements ports.Partial while it is open."""

    def __init__(
        self, layout: Layout, disk: Disk, maps: MapFiles, run_sync: RunSync, chunk_map: ChunkMap, haves: Haves
    ) -> None:
        self.chunk_map = chunk_map
        self.haves = haves
        self.is_open = False
        self.on_dirty: Callable[[], None] = lambda: None
        self.on_gone: Callable[[PartialFile], None] = lambda _partial: None
        self._layout, self._disk, self._maps, self._run_sync = layout, disk, maps, run_sync
        self._fd = -1
        self._marks_fd = -1
        self._synced = self._data_synced = haves  # by the bitmap on disk; by the data on disk
        self._syncing = trio.Lock()
        self._no_room: StoreError | None = None  # the space could not be reserved

    @property
    def digest(self) -> Sha256:
        """Whose partial this is."""
        return self.chunk_map.sha256

    @property
    def dirty(self) -> bool:
        """Whether the bitmap on disk is behind."""
        return self.haves != self._synced

    async def open(self) -> None:
        """Open or make the file and reserve its space. Raises StoreFull (a new file is removed again), StoreError."""
        self.is_open = True  # at once, so that nobody else opens it meanwhile
        self._no_room = None
        try:
            await self._run_sync(self._open_file)
        except BaseException:
            self._close_file()
            raise

    async def write(self, index: int, data: bytes) -> None:
        """See ports.Partial."""
        self._require_open()
        await self._run_sync(lambda: self.write_blocking(index, data))
        self.written(index)

    def write_blocking(self, index: int, data: bytes | memoryview) -> None:
        """See ports.ChunkWriter."""
        check_chunk(self.chunk_map, index, data)
        self._require_open()
        if self._no_room is not None:
            raise self._no_room
        with translated(f"chunk {index} of blob {self.digest[:12]} was not written"):
            self._disk.write_at(self._fd, data, self.chunk_map.span(index)[0])
            os.write(self._marks_fd, _MARK.pack(index))

    def written(self, index: int) -> None:
        """See ports.ChunkWriter."""
        self._require_open()
        self.haves = self.haves.with_chunk(index)
        self.on_dirty()

    async def reserve_ahead(self) -> None:
        """Reserve the space that `open` has left, while chunks are written. That there is none is told by the next write."""
        size, step = self.chunk_map.size, RESERVE_STEP_BYTES
        if size <= step:
            return
        fd = -1
        try:
            with translated(f"no room for blob {self.digest[:12]}"):
                fd = os.dup(self._fd)  # its own, so that no file is closed under a thread
                for offset in range(0, size, step):
                    if not self.is_open:
                        return
                    length = min(step, size - offset)
                    await self._run_sync(partial(self._disk.reserve, fd, offset, length))
        except StoreError as error:
            self._no_room = error
        finally:
            if fd >= 0:
                os.close(fd)

    async def sync(self) -> None:
        """Bring data and then bitmap onto the disk. Raises StoreFull, StoreError."""
        async with self._syncing:
            haves = self.haves
            if haves == self._synced:
                return
            await self._run_sync(lambda: self._sync_file(haves))
            self._synced = haves

    async def finish(self) -> None:
        """See ports.Partial. Raises StoreCorrupt for a small blob whose map was a lie; the partial is then gone."""
        self._require_open()
        if not self.haves.whole:
            raise StoreError(f"blob {self.digest[:12]} is not whole: {len(self.haves.missing())} chunks are missing")
        async with self._syncing:
            true = await self._run_sync(self._try_move_in)
            if true:
                self._let_go()
        if not true:
            await self.discard()
            raise StoreCorrupt(f"the chunk map of blob {self.digest[:12]} is of other bytes; its publisher is wrong")

    async def discard(self) -> None:
        """See ports.Partial."""
        with trio.CancelScope(shield=True):  # a lying map must not be resumed from
            async with self._syncing:
                self._let_go()
                await self._run_sync(self._remove_files)

    async def aclose(self) -> None:
        """See ports.Partial. A bitmap that cannot be saved is logged: its chunks will be fetched again."""
        if not self.is_open:
            return
        # Bounded disk work; without the shield a cancelled pull would forget the last second's chunks.
        with trio.CancelScope(shield=True):
            try:
                await self.sync()
            except StoreError as error:
                _log.warning("bitmap not saved", blob=self.digest[:12], error=error.message)
                # Data that failed to sync may be lost without another word; where only the bitmap has no room, it is all there.
                self.haves = _both(self.haves, self._data_synced)
        self._close_file()

    def drop_chunk(self, index: int) -> None:
        """A chunk turned out bad: offer it no more."""
        bits = bytearray(self.haves.bits)
        bits[index >> 3] &= ~(1 << (index & 7)) & 0xFF
        self.haves = Haves(self.haves.count, bytes(bits))
        self.on_dirty()

    def _require_open(self) -> None:
        if not self.is_open:
            raise StoreError(f"the partial of blob {self.digest[:12]} was closed")

    def _open_file(self) -> None:
        path, size = self._layout.partial(self.digest), self.chunk_map.size
        with translated(f"no room for blob {self.digest[:12]}"):
            new = not path.exists()
            self._fd = self._disk.create(path) if new else os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._disk.allocate(self._fd, size, size if size <= RESERVE_STEP_BYTES else 0)
                self._disk.sync(self._fd)  # the bitmap below vouches for chunks that were only marked
                address = self._maps.save(self.chunk_map)
                save_bits(self._layout, self._disk, self.digest, address, self.haves)
                self._marks_fd = self._disk.restart(self._layout.marks(self.digest))
            except BaseException:
                if new:
                    with suppress(OSError):
                        self._disk.unlink(path)
                raise
            self._synced = self._data_synced = self.haves

    def _sync_file(self, haves: Haves) -> None:
        with translated(f"blob {self.digest[:12]} was not synced"):
            if self._fd >= 0:  # at rest a bitmap only loses chunks, and no data is behind
                self._disk.sync(self._fd)
                self._data_synced = haves
            address = self._maps.save(self.chunk_map)
            save_bits(self._layout, self._disk, self.digest, address, haves)

    def _try_move_in(self) -> bool:
        """Put the whole file in its place; False if it is small and its sha256 turned out wrong."""
        here = self._layout.partial(self.digest)
        with translated(f"blob {self.digest[:12]} was not put in its place"):
            self._disk.sync(self._fd)
            proved = self.chunk_map.size <= PROVED_AT_ONCE_BYTES
            if proved and not self._proves_true():
                return False
            self._maps.save(self.chunk_map)
            self._maps.seal(self.digest, here, proved)
            self._disk.move_in(here, self._layout.blob(self.digest))
            self._disk.unlink(self._layout.bits(self.digest))
            self._disk.unlink(self._layout.marks(self.digest))
        return True

    def _proves_true(self) -> bool:
        hasher = BlobHasher()
        for index in range(self.chunk_map.count):
            offset, length = self.chunk_map.span(index)
            hasher.update(os.pread(self._fd, length, offset))
        try:
            return hasher.chunk_map() == self.chunk_map
        except IntegrityError:
            return False

    def _remove_files(self) -> None:
        with translated(f"blob {self.digest[:12]} was not removed"):
            self._disk.unlink(self._layout.bits(self.digest))
            self._disk.unlink(self._layout.marks(self.digest))
            self._disk.unlink(self._layout.partial(self.digest))
            self._maps.forget(self.digest)

    def _let_go(self) -> None:
        self._close_file()
        self._synced = self.haves  # nothing is left to be synced
        self.on_gone(self)

    def _close_file(self) -> None:
        self.is_open = False
        for fd in (self._fd, self._marks_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._marks_fd = -1


def _both(one: Haves, other: Haves) -> Haves:
    """The chunks that are in both."""
    return Haves(one.count, bytes(a & b for a, b in zip(one.bits, other.bits, strict=True)))
