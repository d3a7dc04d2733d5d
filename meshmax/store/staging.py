"""Staging: blobs whose chunk map nobody knows yet, because they come from outside the mesh, as bytes at places.

A download from a registry (its digest and size are known) lies in a preallocated file with a small file of spans, which
is synced after the data that it vouches for, at least every SYNC_INTERVAL_S and when it is closed; so kill -9 and power
cuts cost a second. An upload to us (its digest comes last) is a temporary file that a restart sweeps. The sha256 and the
chunk map are made in one pass that follows what is there without a gap; when both are known the file becomes a blob of
the store, or is thrown away if it is not what was said. Blocking work goes through RunSync in steps.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshmax.base.errors import IntegrityError, ManifestInvalid, StoreError
from meshmax.base.ids import HEX64, Sha256
from meshmax.base.model import CHUNK_BYTES, MAX_BLOB_BYTES, ChunkMap
from meshmax.core.spans import Spans
from meshmax.store.blobs import FileBlobStore
from meshmax.store.disk import TEMP_PREFIX, temp_name, translated, try_read
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import BlobHasher
from meshmax.wire.signed import canonical, decode_canonical

SYNC_INTERVAL_S: Final = 1.0
HASH_STEP_CHUNKS: Final = 32  # 32 MiB: 0.1 s of sha256 a step
MAX_SPANS: Final = 4096  # of one file; a download adds at a dozen places
MAX_SPANS_BYTES: Final = 128 << 10
MAX_LEFT: Final = 64  # closed downloads that are remembered
KEPT_S: Final = 14 * 86400.0  # a download that nobody took up again for so long is removed at start
DATA_SUFFIX: Final = ".download"
SPANS_SUFFIX: Final = ".spans"
_log = get_logger("store")


class _SpansFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    spans: list[tuple[int, int]]


class Staged:
    """One blob being put together. Several tasks may write, each at another place. Every method that touches the disk raises
    StoreFull or StoreError."""

    def __init__(self, store: FileBlobStore, path: Path, digest: Sha256 | None, size: int | None) -> None:
        self.size = size  # bytes that it will have; None: not known before `finish`
        self.have = Spans()
        self._store, self._disk, self._run_sync = store, store.disk, store.run_sync
        self._path = path
        self._spans_path = path.with_suffix(SPANS_SUFFIX) if digest else None
        self._digest = digest
        self._fd = -1
        self._claimed = True
        self.left = False  # closed with bytes that are worth taking up, whether or not that could be noted
        self._synced_s = time.monotonic()
        self._hasher = BlobHasher()
        self._hashing = trio.Lock()
        self._syncing = trio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether somebody is putting it together now."""
        return self._claimed

    @property
    def hashed_bytes(self) -> int:
        """How far the digests have come."""
        return self._hasher.size

    async def open(self, have: Spans | None = None) -> None:
        """Make the file, or take up what an earlier run left. ``have``: what is known to be in it, noted or not."""
        await self._run_sync(lambda: self._open(have))

    async def write(self, offset: int, data: bytes) -> None:
        """Put bytes in their place; now and then sync them and say so on disk. What is there already stays as it is,
        since it may be in the digests by now."""
        if self._fd < 0:
            raise StoreError("what is being fetched was closed")
        end = offset + len(data)
        if end > (MAX_BLOB_BYTES if self.size is None else self.size):
            raise StoreError(f"a blob cannot have a byte {end}")
        gaps = self.have.gaps(offset, end)
        await self._run_sync(lambda: self._write(offset, data, gaps))
        self.have.add(offset, end)
        if len(self.have) > MAX_SPANS:
            raise StoreError(f"a blob is put together from {MAX_SPANS} places at most")
        if self._spans_path and time.monotonic() - self._synced_s >= SYNC_INTERVAL_S and not self._syncing.locked():
            await self.sync()

    async def sync(self) -> None:
        """What is there survives a power cut when this returns."""
        async with self._syncing:
            have = list(self.have)
            await self._run_sync(lambda: self._sync(have))
            self._synced_s = time.monotonic()

    async def hash_on(self) -> bool:
        """Take the next chunks that are there without a gap into the digests; False if there was nothing to take."""
        async with self._hashing:
            before = self._hasher.size
            prefix = self.have.prefix
            whole = prefix - prefix % CHUNK_BYTES if prefix != self.size else prefix
            await self._run_sync(lambda: self._hash(whole))
            return self._hasher.size > before

    async def finish(self, digest: Sha256) -> ChunkMap:
        """Every byte is there: check the digest and give the store the blob. Raises IntegrityError, and throws it away."""
        size = max((end for _, end in self.have), default=0) if self.size is None else self.size
        if self.have.total != size:
            raise StoreError(f"blob {digest[:12]} is not whole: {size - self.have.total} bytes are missing")
        self.size = size
        while self._hasher.size < self.size:
            await self.hash_on()
        chunk_map = self._hasher.chunk_map()
        if chunk_map.sha256 != digest:
            await self.discard()
            raise IntegrityError(
                f"digest mismatch, file must be downloaded again: want sha256:{digest}, got sha256:{chunk_map.sha256}"
            )
        with trio.CancelScope(shield=True):  # moved, but not known to the store: that must not be
            await self._run_sync(lambda: self._place(chunk_map))
            await self._store.placed(digest)
        return chunk_map

    async def discard(self) -> None:
        """Throw away what is there; idempotent."""
        with trio.CancelScope(shield=True):
            await self._run_sync(self._remove)

    async def aclose(self) -> None:
        """Let go; a download can be taken up again later, an upload is gone. Idempotent, never raises."""
        if self._fd < 0:
            return
        with trio.CancelScope(shield=True):
            if self._spans_path is None:
                await self._run_sync(self._remove)
                return
            self.left = True
            try:
                await self.sync()
            except StoreError as error:
                _log.warning("what was fetched was not noted", error=error.message)
            await self._run_sync(self._close)

    # --- in threads ---------------------------------------------------------------------------------------------------

    def _open(self, have: Spans | None) -> None:
        with translated("no room for a blob"):
            new = not self._path.exists()
            self._fd = self._disk.create(self._path) if new else os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if self.size is not None:
                    self._disk.allocate(self._fd, self.size)
                if not new and self._spans_path and self.size is not None:
                    self.have = have.copy() if have else load_spans(self._spans_path, self.size)
            except BaseException:
                self._close()
                if new:
                    with suppress(OSError):
                        self._disk.unlink(self._path)
                raise

    def _write(self, offset: int, data: bytes, gaps: list[tuple[int, int]]) -> None:
        with translated("a blob was not written"):
            for start, end in gaps:
                self._disk.write_at(self._fd, memoryview(data)[start - offset : end - offset], start)

    def _sync(self, have: list[tuple[int, int]]) -> None:
        if self._fd < 0:
            return
        with translated("a blob was not synced"):
            self._disk.sync(self._fd)
            if self._spans_path is not None and self.size is not None:
                self._disk.write_whole(self._spans_path, canonical(_SpansFile(self.size, have)))

    def _hash(self, until: int) -> None:
        with translated("a blob was not read"):
            for _ in range(HASH_STEP_CHUNKS):
                at = self._hasher.size
                if at >= until or self._fd < 0:
                    return
                data = os.pread(self._fd, min(CHUNK_BYTES, until - at), at)
                if len(data) != min(CHUNK_BYTES, until - at):
                    raise StoreError("a blob became shorter while it was read")
                self._hasher.update(data)

    def _place(self, chunk_map: ChunkMap) -> None:
        store, digest = self._store, chunk_map.sha256
        with translated(f"blob {digest[:12]} was not put in its place"):
            os.ftruncate(self._fd, chunk_map.size)
            self._disk.sync(self._fd)
            store.maps.save(chunk_map)
            store.maps.seal(digest, self._path, proved=True)
            self._disk.move_in(self._path, store.layout.blob(digest))
            self._remove()

    def _remove(self) -> None:
        self._close()
        with translated("what was fetched was not removed"):
            if self._spans_path is not None:
                self._disk.unlink(self._spans_path)
            self._disk.unlink(self._path)

    def _close(self) -> None:
        fd, self._fd, self._claimed = self._fd, -1, False
        if fd >= 0:
            os.close(fd)


class Staging:
    """Makes Staged files beside the partials of ``store``. One at a time a digest."""

    def __init__(self, store: FileBlobStore) -> None:
        self._store = store
        self._folder = store.layout.partials
        self._open: dict[Sha256, Staged] = {}

    async def open_download(self, digest: Sha256, size: int) -> Staged:
        """Begin or take up a download. Raises StoreFull when it cannot fit, StoreError if it is open already."""
        known = self._open.get(digest)
        if known is not None and known.is_open:
            raise StoreError(f"blob {digest[:12]} is being fetched already")
        staged = Staged(self._store, self._folder / f"{digest}{DATA_SUFFIX}", digest, size)
        self._open[digest] = staged
        try:
            await staged.open(known.have if known is not None and known.left and known.size == size else None)
        except BaseException:
            self._open.pop(digest, None)
            raise
        self._forget_some()
        return staged

    def _forget_some(self) -> None:
        """Closed ones are remembered, since a full disk keeps them from being noted; not all of them."""
        closed = [digest for digest, one in self._open.items() if not one.is_open]
        for digest in closed[: max(0, len(closed) - MAX_LEFT)]:
            del self._open[digest]

    async def open_upload(self) -> Staged:
        """A place for bytes whose digest is told at the end; gone when it is closed, or by a crash."""
        staged = Staged(self._store, temp_name(self._folder), None, None)
        await staged.open()
        return staged

    def sweep(self, now_s: float) -> None:
        """Remove downloads without spans, of blobs that are whole by now, and those not touched for KEPT_S. Blocks."""
        for path in (*self._folder.glob(f"*{DATA_SUFFIX}"), *self._folder.glob(f"*{SPANS_SUFFIX}")):
            with suppress(OSError):
                if path.name.startswith(TEMP_PREFIX) or not self._is_wanted(path, now_s):
                    path.unlink()

    def _is_wanted(self, path: Path, now_s: float) -> bool:
        data, spans = path.with_suffix(DATA_SUFFIX), path.with_suffix(SPANS_SUFFIX)
        if not HEX64.fullmatch(path.stem) or self._store.layout.blob(Sha256(path.stem)).exists():
            return False
        return data.exists() and spans.exists() and now_s - spans.stat().st_mtime < KEPT_S


def load_spans(path: Path, size: int) -> Spans:
    """What a download has by its file of spans; nothing if that is missing, damaged, or of another size."""
    raw = try_read(path, MAX_SPANS_BYTES)
    try:
        word = decode_canonical(raw, _SpansFile) if raw else None
    except ManifestInvalid:
        word = None
    if word is None or word.size != size or len(word.spans) > MAX_SPANS:
        return Spans()
    if any(not 0 <= start < end <= size for start, end in word.spans):
        return Spans()
    return Spans(word.spans)
