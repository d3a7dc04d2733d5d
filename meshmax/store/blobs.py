"""FileBlobStore: whole blobs in Ollama's folder, partial ones in ours, every chunk verified before it is handed out.

Decided here: what is offered (a whole blob minus chunks that were found bad, or a partial's bitmap), when a blob is in
doubt (its file differs from its seal, a chunk was bad) and what becomes of a damaged one (store.scrub). An adopted blob
has no chunk map: it is made in the store's own task when somebody first asks, so that a caller who gives up does not
throw the work away. Blocking work goes through RunSync in steps, so that nothing holds a thread for long.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import trio

from meshmax.base.errors import BlobNotFound, ChunkMismatch, StoreCorrupt, StoreError
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.ports import RunSync
from meshmax.store.disk import Disk, read_at, translated
from meshmax.store.layout import Layout
from meshmax.store.maps import MapFiles
from meshmax.store.partials import SYNC_INTERVAL_S, PartialFile, load_bits, load_marked
from meshmax.store.scrub import Scrub, bad_to_partial
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import check_chunk

MAX_READINGS: Final = 3  # of a blob in one check, whose file others replace meanwhile
MAX_MAPPING: Final = 256  # adopted blobs waiting for their map; more are told "nothing here" until there is room
_log = get_logger("store")
T = TypeVar("T")


class FileBlobStore:
    """ports.BlobStore on disk. Opened by `store.open_store`, which starts it."""

    def __init__(self, layout: Layout, disk: Disk, run_sync: RunSync) -> None:
        self.layout, self.disk, self.run_sync = layout, disk, run_sync
        self.maps = MapFiles(layout, disk)
        self._nursery: trio.Nursery | None = None  # until `start`
        self._token: trio.lowlevel.TrioToken | None = None  # likewise
        self._partials: dict[Sha256, PartialFile] = {}
        self._bad: dict[Sha256, frozenset[int]] = {}  # replaced as a whole: lanes' threads read and add
        self._bad_lock = threading.Lock()  # held while one is replaced
        self._rotten: set[Sha256] = set()  # adopted blobs whose bytes are not what their name says
        self._mapping: dict[Sha256, trio.Event] = {}
        self._one_pass = trio.Lock()  # one full reading of a blob at a time: they compete for one disk
        self._dirty = trio.Event()

    def load_partials(self) -> None:
        """Take up what earlier runs left: partials with a map and a bitmap; files without them vouch for nothing and go.

        One that cannot be read is left where it is, with a warning: it must not keep the node from starting.
        """
        for path in self.layout.partials.glob("*.data"):
            try:
                self._load_partial(path)
            except OSError as error:
                _log.warning("a partial cannot be read and is left out", path=str(path), error=error.strerror)
        for path in (*self.layout.partials.glob("*.bits"), *self.layout.partials.glob("*.marks")):
            if Sha256(path.stem) not in self._partials and not path.with_suffix(".data").exists():
                with suppress(OSError):
                    self.disk.unlink(path)

    def _load_partial(self, path: Path) -> None:
        digest = Sha256(path.stem)
        chunk_map = self.maps.load(digest)
        if chunk_map is None or not self.layout.bits(digest).exists():
            self.disk.unlink(path)
        else:
            haves = load_bits(self.layout, digest, chunk_map)
            self._adopt_partial(chunk_map, load_marked(self.layout, digest, chunk_map, haves))

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to sync dirty partials and to make maps of adopted blobs, in tasks of ``nursery``."""
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        nursery.start_soon(self._run_sync_dirty)

    async def _run_sync_dirty(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty = trio.Event()
            await trio.sleep(SYNC_INTERVAL_S)
            for partial in [p for p in self._partials.values() if p.dirty]:
                try:
                    await partial.sync()
                except StoreError as error:
                    _log.warning("bitmap not saved", blob=partial.digest[:12], error=error.message)
                    self._dirty.set()

    async def aclose(self) -> None:
        """Close every partial that is still open."""
        for partial in list(self._partials.values()):
            await partial.aclose()

    async def haves(self, digest: Sha256) -> tuple[ChunkMap, Haves] | None:
        """See ports.BlobStore. The first question for an adopted blob takes as long as reading it (about 350 MB/s)."""
        partial = self._partials.get(digest)
        if partial is not None:
            return partial.chunk_map, partial.haves
        what = f"blob {digest[:12]} was not looked up"
        there, chunk_map = await self._run(what, lambda: self._look(digest))
        if there and chunk_map is None and await self._map_adopted(digest):
            _, chunk_map = await self._run(what, lambda: self._look(digest))
        if chunk_map is None:
            return None
        return chunk_map, self._without_bad(digest, Haves.all(chunk_map.count))

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """See ports.BlobStore."""
        if digest not in self._partials and self.maps.address(digest) is None:
            await self.haves(digest)  # an adopted blob's map may have to be made
        buffer = bytearray(CHUNK_BYTES)
        length = await self.run_sync(lambda: self.read_chunk_into(digest, index, memoryview(buffer)))
        return bytes(memoryview(buffer)[:length])

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """See ports.ChunkReader."""
        partial = self._partials.get(digest)
        if index in self._bad.get(digest, ()) or (partial is not None and index not in partial.haves):
            raise _chunk_not_here(digest, index)
        chunk_map = partial.chunk_map if partial else self.maps.load(digest)
        if chunk_map is None or not 0 <= index < chunk_map.count:
            raise _chunk_not_here(digest, index)
        offset, length = chunk_map.span(index)
        data = buffer[: self._read_span(digest, offset, buffer[:length])]
        try:
            check_chunk(chunk_map, index, data)
        except ChunkMismatch:
            self._doubt(digest, index)
            raise StoreCorrupt(
                f"chunk {index} of blob {digest[:12]} is damaged on disk; it is not offered any more"
            ) from None
        return length

    async def read_map(self, address: MapAddress) -> bytes | None:
        """See ports.BlobStore."""
        return await self._run("a chunk map was not read", lambda: self.maps.read(address))

    async def open_partial(self, chunk_map: ChunkMap) -> PartialFile:
        """See ports.BlobStore. A partial of another map keeps the chunks on which both maps agree."""
        digest = chunk_map.sha256
        there, whole_map = await self._run(f"blob {digest[:12]} was not looked up", lambda: self._look(digest))
        known = self._partials.get(digest)  # nothing is awaited between this and `open`, which claims it
        if known is not None and known.is_open:
            raise StoreError(f"blob {digest[:12]} is being fetched already")
        if known is None and there and whole_map is not None:
            raise StoreError(f"blob {digest[:12]} is whole already")
        haves = _agreed(known, chunk_map) if known else Haves.none(chunk_map.count)
        if known is None or known.chunk_map != chunk_map:
            known = self._adopt_partial(chunk_map, haves)
        try:
            await known.open()
        except BaseException:
            if not self.layout.partial(digest).exists():
                self._forget_partial(known)
            raise
        if self._nursery is not None:
            self._nursery.start_soon(known.reserve_ahead)
        return known

    async def path(self, digest: Sha256) -> Path:
        """See ports.BlobStore. A blob in doubt is verified first, which takes as long as reading it."""
        path = self.layout.blob(digest)
        if digest in self._rotten:
            raise StoreCorrupt(f"blob {digest[:12]} does not hold what its name says; pull the model again")
        try:
            doubt = await self.run_sync(lambda: self.maps.in_doubt(digest, path))
        except OSError:
            raise BlobNotFound(f"blob {digest[:12]} is not in the store") from None
        if (doubt or self._bad.get(digest)) and not (await self.verify(digest)).whole:
            raise StoreCorrupt(f"blob {digest[:12]} is damaged on disk; pull the model again to repair it")
        return path

    async def verify(self, digest: Sha256) -> Haves:
        """See ports.BlobStore. Computes the sha256 too unless it is proved; a blob that fails only that has a lying map,
        or none: it is deleted and StoreCorrupt raised."""
        async with self._one_pass:
            for _ in range(MAX_READINGS):
                haves = await self._try_verify(digest)
                if haves is not None:
                    return haves
        raise StoreError(f"blob {digest[:12]} was replaced again and again while it was read")

    async def _try_verify(self, digest: Sha256) -> Haves | None:
        """Read a blob through; None where its file was replaced meanwhile."""
        partial = self._partials.get(digest)
        what = f"blob {digest[:12]} was not looked up"
        chunk_map = partial.chunk_map if partial else await self._run(what, lambda: self.maps.load(digest))
        path = self.layout.partial(digest) if partial else self.layout.blob(digest)
        if not await self.run_sync(path.is_file):
            raise BlobNotFound(f"blob {digest[:12]} is not in the store")
        scrub = await self._scrub(digest, path, chunk_map, partial.haves if partial else None)
        if partial is not None:
            for index in scrub.bad:
                partial.drop_chunk(index)
            return partial.haves
        return await self._judge(digest, scrub)

    async def remove(self, digest: Sha256) -> None:
        """Delete a whole blob with map and seal; a partial of it stays."""
        await self._run(f"blob {digest[:12]} was not removed", lambda: self._remove_files(digest))
        self._bad.pop(digest, None)
        self._rotten.discard(digest)

    async def drop_partial(self, digest: Sha256) -> bool:
        """Delete a partial that is at rest; False if there is none, or it is being fetched. Raises StoreError."""
        partial = self._partials.get(digest)
        if partial is None or partial.is_open:
            return False
        await partial.discard()
        return True

    async def placed(self, digest: Sha256) -> None:
        """A whole blob was put in its place by somebody else (ingest): a partial of it that is at rest is of no use now."""
        self._bad.pop(digest, None)
        self._rotten.discard(digest)
        partial = self._partials.get(digest)
        if partial is not None and not partial.is_open:
            self._forget_partial(partial)
            await self._run(f"a partial of blob {digest[:12]} stayed", lambda: self._remove_partial_files(digest))

    async def _run(self, what: str, work: Callable[[], T]) -> T:
        with translated(what):
            return await self.run_sync(work)

    # --- in threads ---------------------------------------------------------------------------------------------------

    def _look(self, digest: Sha256) -> tuple[bool, ChunkMap | None]:
        """Whether there is a file of the whole blob, and its map if the file has the size that it says."""
        try:
            size = self.layout.blob(digest).stat().st_size
        except OSError:
            return False, None
        chunk_map = self.maps.load(digest)
        if digest in self._rotten or (chunk_map is not None and chunk_map.size != size):
            return False, None
        return True, chunk_map

    def _read_span(self, digest: Sha256, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer``; how much of it, where the file is too short."""
        # Partial first if there is one; it may become whole while we look.
        paths = [self.layout.blob(digest)]
        if digest in self._partials:
            paths.insert(0, self.layout.partial(digest))
        for path in paths:
            with translated(f"blob {digest[:12]} was not read"):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                # Opened for each chunk, which costs 10 us: an open file would outlive its removal, and hide its replacement.
                try:
                    return read_at(fd, buffer, offset)
                finally:
                    os.close(fd)
        raise BlobNotFound(f"blob {digest[:12]} is not in the store")

    def _doubt(self, digest: Sha256, index: int) -> None:
        """A chunk is not what its map says."""
        partial = self._partials.get(digest)
        if partial is not None:
            if self._token is not None:  # its bitmap belongs to the store's task
                self._token.run_sync_soon(partial.drop_chunk, index)
            return
        with self._bad_lock:
            self._bad[digest] = self._bad.get(digest, frozenset()) | {index}
        _log.warning("blob is damaged on disk", blob=digest[:12], chunk=index)
        with translated(f"blob {digest[:12]} was not put in doubt"):
            self.maps.unseal(digest)

    def _remove_files(self, digest: Sha256) -> None:
        if digest not in self._partials:
            self.maps.forget(digest)
        self.disk.unlink(self.layout.blob(digest))

    def _remove_partial_files(self, digest: Sha256) -> None:
        self.disk.unlink(self.layout.bits(digest))
        self.disk.unlink(self.layout.marks(digest))
        self.disk.unlink(self.layout.partial(digest))

    # --- in the store's task -------------------------------------------------------------------------------------------

    def _adopt_partial(self, chunk_map: ChunkMap, haves: Haves) -> PartialFile:
        partial = PartialFile(self.layout, self.disk, self.maps, self.run_sync, chunk_map, haves)
        partial.on_dirty = self._mark_dirty
        partial.on_gone = self._forget_partial
        self._partials[chunk_map.sha256] = partial
        return partial

    def _mark_dirty(self) -> None:
        self._dirty.set()  # not bound early: the event is a new one after each round

    def _forget_partial(self, partial: PartialFile) -> None:
        self._partials.pop(partial.digest, None)
        self._bad.pop(partial.digest, None)
        self._rotten.discard(partial.digest)

    def _without_bad(self, digest: Sha256, haves: Haves) -> Haves:
        bits = bytearray(haves.bits)
        for index in self._bad.get(digest, ()):
            bits[index >> 3] &= ~(1 << (index & 7)) & 0xFF
        return Haves(haves.count, bytes(bits))

    async def _scrub(self, digest: Sha256, path: Path, chunk_map: ChunkMap | None, haves: Haves | None) -> Scrub:
        what = f"blob {digest[:12]} was not read"
        seal = await self._run(what, lambda: self.maps.try_seal(digest))
        scrub = Scrub(path, chunk_map, haves, prove=haves is None and not (seal and seal.proved))
        while not await self._run(what, scrub.step):
            pass
        return scrub

    async def _judge(self, digest: Sha256, scrub: Scrub) -> Haves | None:
        """What becomes of a whole blob that was read through; None where another file is in its place by now."""
        if scrub.true_map is not None and scrub.true_map.sha256 != digest and not scrub.bad:
            if not await self.run_sync(scrub.is_of_now):
                return None
            await self.remove(digest)
            raise StoreCorrupt(f"blob {digest[:12]} did not hold what its name says and was removed; pull it again")
        chunk_map = scrub.chunk_map or scrub.true_map
        if chunk_map is None:
            raise BlobNotFound(f"blob {digest[:12]} is not in the store")
        haves = scrub.good_haves(chunk_map.count)
        with translated(f"blob {digest[:12]} was not put in order"):
            if not await self.run_sync(lambda: self._put_in_order(digest, scrub, chunk_map, haves)):
                return None
        if not haves.whole:
            self._adopt_partial(chunk_map, haves)
        self._bad.pop(digest, None)
        self._rotten.discard(digest)
        return haves

    def _put_in_order(self, digest: Sha256, scrub: Scrub, chunk_map: ChunkMap, haves: Haves) -> bool:
        """In a thread: seal a good blob, make a partial of a damaged one; False if another file is in its place by now."""
        if not scrub.is_of_now():
            return False
        if haves.whole:
            scrub.seal(self.maps, digest)
        else:
            bad_to_partial(self.layout, self.disk, self.maps, chunk_map, haves)
        return True

    async def _map_adopted(self, digest: Sha256) -> bool:
        """Have the map of an adopted blob made, or wait for it; whether there may be one now."""
        made = self._mapping.get(digest)
        if made is None:
            if self._nursery is None or len(self._mapping) >= MAX_MAPPING:
                return False
            made = self._mapping[digest] = trio.Event()
            self._nursery.start_soon(self._make_map, digest, made)
        await made.wait()
        return True

    async def _make_map(self, digest: Sha256, made: trio.Event) -> None:
        try:
            async with self._one_pass:
                scrub = await self._scrub(digest, self.layout.blob(digest), None, None)
                if not await self.run_sync(scrub.is_of_now):
                    return  # whoever asks again has the new one read
                if scrub.true_map is None or scrub.true_map.sha256 != digest:
                    self._rotten.add(digest)
                    _log.warning("blob does not hold what its name says", blob=digest[:12])
                    return
                what = f"the chunk map of blob {digest[:12]} was not saved"
                await self._run(what, lambda: scrub.seal(self.maps, digest))
        except StoreError as error:
            _log.warning("no chunk map was made", blob=digest[:12], error=error.message)
        finally:
            self._mapping.pop(digest, None)
            made.set()


def _chunk_not_here(digest: Sha256, index: int) -> BlobNotFound:
    return BlobNotFound(f"chunk {index} of blob {digest[:12]} is not in the store")


def _agreed(known: PartialFile, chunk_map: ChunkMap) -> Haves:
    """The chunks of ``known`` that ``chunk_map`` names with the same hash at the same place."""
    if known.chunk_map == chunk_map:
        return known.haves
    bits = bytearray(Haves.none(chunk_map.count).bits)
    for index in range(min(chunk_map.count, known.chunk_map.count)):
        same_span = known.chunk_map.span(index) == chunk_map.span(index)
        if index in known.haves and same_span and known.chunk_map.chunk_hash(index) == chunk_map.chunk_hash(index):
            bits[index >> 3] |= 1 << (index & 7)
    return Haves(chunk_map.count, bytes(bits))
