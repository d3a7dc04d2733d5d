"""Importing bundles: chunks from files into the store, each verified by its map, then the sha256 of each blob, then names.

Rules: what is here already is not read. A chunk that is damaged, or in a part that is missing, costs itself: what is good
is kept, the model is not named before it is whole, and the error at the end says which parts are wanted. Importing again
goes on. A model that peers have too is pulled instead, with the bundle as one more source beside them; what only they
can give then comes from them. The exporter's signature over the index counts as a publisher's does in a pull: it says what
was meant, and the sha256 of every blob, which the manifest names, decides in the end. Not here: files (store.bundle_read).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from meshmax.base.catalog import CatalogEntry
from meshmax.base.errors import (
    BlobNotFound,
    ChunkMismatch,
    IntegrityError,
    ManifestInvalid,
    MeshmaxError,
    StoreCorrupt,
)
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Manifest, StoredModel
from meshmax.base.names import parse_name
from meshmax.ports import BlobStore, Naming, Partial, Pulls, RunSync
from meshmax.services.bundle_source import BundleSource, LocalSources
from meshmax.services.model_exchange import check_record
from meshmax.store.bundle_read import BadFile, BundleReader, ChunkFile, find_bundles
from meshmax.telemetry.log import get_logger
from meshmax.wire.bundle import BundleModel, Piece, chunks_of, manifests_of
from meshmax.wire.chunkmap import encode_map, map_address

STEP_CHUNKS: Final = 32  # 32 MiB: 0.05 s a step, but from a slow stick
TELL_INTERVAL_S: Final = 0.2  # between two lines of progress
CLOSE_TIMEOUT_S: Final = 10.0  # for a partial's last sync when the import was cancelled
MAX_TOLD: Final = 20  # faults that an error names

Tell = Callable[[dict[str, Any]], Awaitable[None]]
_log = get_logger("import")


class ImportWorld(msgspec.Struct, frozen=True):
    """What imports use. ``held``: alone with a blob among pulls and imports."""

    blobs: BlobStore
    models: Naming
    run_sync: RunSync
    held: Callable[[Sha256], AbstractAsyncContextManager[None]]
    on_stored: Callable[[StoredModel], Awaitable[None]]


class Mesh(msgspec.Struct, frozen=True):
    """What imports use where peers have the model too."""

    entries: Callable[[], tuple[CatalogEntry, ...]]
    pulls: Pulls
    sources: LocalSources


class Importer:
    """Imports bundles into a store. ``mesh`` None: from bundles alone."""

    def __init__(self, world: ImportWorld, mesh: Mesh | None = None) -> None:
        self._world, self._mesh = world, mesh

    async def run(self, paths: Sequence[Path], tell: Tell, *, alone: bool = False) -> None:
        """Import every bundle in ``paths``; ``alone``: without peers.

        Raises InvalidRequest (no bundle there), ManifestInvalid (none that is of use), StoreFull, StoreError; once what is
        good was taken: BlobNotFound (parts are missing), IntegrityError (something is damaged).
        """
        readers, bad = await self._world.run_sync(partial(find_bundles, paths))
        for file in bad:
            await tell({"status": f"left out {file.path.name}: {file.reason}", "file": str(file.path)})
        if not readers:
            raise ManifestInvalid(f"no bundle was found: {_list([f'{f.path.name}: {f.reason}' for f in bad])}")
        faults = _Faults(bad)
        names: list[str] = []
        for reader in readers:
            names += await _Import(self._world, None if alone else self._mesh, reader, faults, tell).run()
        faults.raise_if_any()
        await tell({"status": "success", "models": names})


class _Faults:
    """What keeps models from being whole, and what was wrong besides."""

    def __init__(self, bad: list[BadFile]) -> None:
        self.bad = bad
        self.damaged: dict[str, int] = {}  # file -> chunks
        self.missing: list[str] = []
        self.unfinished: list[str] = []

    def raise_if_any(self) -> None:
        """Raise an error that names parts, if a model is not whole for want of them."""
        if not self.unfinished:
            return
        said = [f"{file.path.name} is no use ({file.reason})" for file in self.bad]
        said += [f"{name} is damaged ({count} chunks)" for name, count in self.damaged.items()]
        said += self.missing
        text = (
            f"{_list(self.unfinished)} could not be imported whole: {_list(said)}. What was good is kept: "
            "import again with good copies of these parts"
        )
        raise IntegrityError(text) if self.damaged or self.bad else BlobNotFound(text)


class _Import:
    """The import of one bundle."""

    def __init__(
        self, world: ImportWorld, mesh: Mesh | None, reader: BundleReader, faults: _Faults, tell: Tell
    ) -> None:
        self._mesh = mesh
        self._world, self._reader, self._faults, self._tell = world, reader, faults, tell
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._told_s = -TELL_INTERVAL_S
        self._maps = {blob.digest: blob.address for blob in reader.index.blobs}

    async def run(self) -> list[str]:
        """Take in what can be; the names of the models that are whole."""
        index = self._reader.index
        await self._tell(_introduction(self._reader))
        whole: list[str] = []
        for model, manifest in zip(index.models, manifests_of(index), strict=True):
            if self._mesh is not None and (entry := _remote(self._mesh, model, manifest)):
                await self._pull(self._mesh, entry)
            lacking = [blob.digest for blob in manifest.blobs if not await self._blob(blob.digest)]
            if lacking:
                self._unfinished(model, lacking)
            else:
                whole.append(await self._put(model, manifest))
        return whole

    async def _pull(self, mesh: Mesh, entry: CatalogEntry) -> None:
        """Pull what peers have, the bundle among them. What that does not bring is looked for in the bundle afterwards."""
        source = BundleSource(self._reader, self._world.run_sync, self._on_bad)
        with mesh.sources.lent(source):
            try:
                async with mesh.pulls.open_pull(f"{entry.name}@{entry.digest}") as values:
                    async for value in values:
                        line = {"status": f"importing {entry.name}, with {len(entry.holders)} peers"}
                        await self._now_and_then(line, value.bytes_done, value.bytes_total)
                        if value.state == "waiting":
                            return  # for a peer; the bundle has nothing more for it either
                        if value.state == "paused":  # by a person, who alone lets it go on
                            await self._tell({"status": f"the pull of {entry.name} is paused: from the bundle alone"})
                            return
            except MeshmaxError as error:
                _log.info("pull beside an import failed", model=entry.name, code=error.code, error=error.message)

    def _on_bad(self, digest: Sha256) -> None:
        self._faults.damaged[self._reader.name] = self._faults.damaged.get(self._reader.name, 0) + 1

    def _unfinished(self, model: BundleModel, lacking: list[Sha256]) -> None:
        self._faults.unfinished.append(f"'{parse_name(model.name)}'")
        reader = self._reader
        numbers = ", ".join(str(number) for number in reader.missing[:MAX_TOLD])
        text = f"of the {len(reader.parts)} parts of {reader.name} number {numbers} are missing"
        left_out = [d[:12] for d in lacking if not reader.carries(d)]
        if not reader.missing:
            text = f"blob {_list(left_out)} was left out of the bundle and is not here" if left_out else ""
        if text and text not in self._faults.missing:
            self._faults.missing.append(text)

    async def _put(self, model: BundleModel, manifest: Manifest) -> str:
        record = model.record
        if record is not None:
            said = check_record(record, manifest).chunk_maps
            if any(said[blob.digest] != self._maps[blob.digest] for blob in manifest.blobs):
                record = None  # the exporter's index has other maps, by which the chunks were checked
        stored = await self._world.models.put(parse_name(model.name), manifest.raw, record)
        await self._world.on_stored(stored)
        if stored.kept:
            await self._tell({"status": f"'{stored.name}' meant another model, which is kept as '{stored.kept}'"})
        await self._tell({"status": f"imported {stored.name}", "name": stored.name, "digest": manifest.digest})
        return stored.name

    # --- blobs -------------------------------------------------------------------------------------------------------

    async def _blob(self, digest: Sha256) -> bool:
        """Have a blob whole; False where the bundle does not bring all of it."""
        world, reader = self._world, self._reader
        async with world.held(digest):
            if await self._is_whole(digest):
                return True
            chunk_map = await self._map(digest)
            if chunk_map is None:
                return False
            async with _opened(world.blobs, chunk_map) as blob:
                hashed = _Hashed(world, blob)
                async with _beside(hashed.follow):
                    for path, piece in reader.pieces(digest):
                        await self._piece(blob, path, piece, hashed)
                if not blob.haves.whole:
                    return False
                await self._finish(blob, hashed)
            return True

    async def _is_whole(self, digest: Sha256) -> bool:
        try:
            await self._world.blobs.path(digest)
        except (BlobNotFound, StoreCorrupt):
            return False
        return True

    async def _map(self, digest: Sha256) -> ChunkMap | None:
        found = await self._world.run_sync(partial(self._reader.read_map, digest))
        if found is None and (known := await self._world.blobs.haves(digest)):
            return known[0] if map_address(encode_map(known[0])) == self._maps[digest] else None
        return found

    async def _piece(self, blob: Partial, path: Path, piece: Piece, hashed: _Hashed) -> None:
        wanted = ((at, index) for at, index in enumerate(chunks_of(piece)) if index not in blob.haves)
        while step := list(islice(wanted, STEP_CHUNKS)):
            good, bad = await self._world.run_sync(partial(self._copy, blob, path, piece, step))
            for index in good:
                blob.written(index)
            if bad:
                _log.warning("damaged chunks in a bundle", file=path.name, blob=piece.blob.sha256[:12], chunks=bad)
                self._faults.damaged[path.name] = self._faults.damaged.get(path.name, 0) + bad
            hashed.wake.set()
            await self._progress(blob)

    def _copy(self, blob: Partial, path: Path, piece: Piece, step: list[tuple[int, int]]) -> tuple[list[int], int]:
        """In a thread: the chunks that were written, and how many are not what they should be."""
        good, bad = [], 0
        try:
            with ChunkFile(path) as file:
                for at, index in step:
                    length = file.read(piece, at, piece.blob.length(index), self._buffer)
                    try:
                        blob.write_blocking(index, self._buffer[:length])
                        good.append(index)
                    except ChunkMismatch:
                        bad += 1
        except OSError as error:
            _log.warning("a part of a bundle cannot be read", file=path.name, error=error.strerror)
            bad += len(step) - len(good) - bad
        return good, bad

    async def _finish(self, blob: Partial, hashed: _Hashed) -> None:
        """The whole digest decides. Raises IntegrityError."""
        chunk_map = blob.chunk_map
        await self._tell({"status": "verifying sha256 digest"})
        while await hashed.step():
            pass
        if hashed.hexdigest() == chunk_map.sha256:
            try:
                await blob.finish()
                return
            except StoreCorrupt:
                pass  # its map lied about something else than chunks; it is discarded already
        else:
            await blob.discard()
        raise IntegrityError(
            f"digest mismatch: what {self._reader.index.exporter} signed as blob {chunk_map.sha256[:12]} is not that blob; "
            "it was not taken"
        )

    async def _progress(self, blob: Partial) -> None:
        digest, size = blob.chunk_map.sha256, blob.chunk_map.size
        line = {"status": f"importing {digest[:12]}", "digest": f"sha256:{digest}"}
        await self._now_and_then(line, min(size, blob.haves.total * CHUNK_BYTES), size)

    async def _now_and_then(self, line: dict[str, Any], done: int, size: int) -> None:
        now = trio.current_time()
        if size and (now - self._told_s >= TELL_INTERVAL_S or done >= size):
            self._told_s = now
            await self._tell({**line, "total": size, "completed": done})


class _Hashed:
    """The sha256 of a blob, computed behind the copying as far as its chunks are there in order: it takes longer than that."""

    def __init__(self, world: ImportWorld, blob: Partial) -> None:
        self.wake = trio.Event()
        self._world, self._blob = world, blob
        self._digest = hashlib.sha256()
        self._at = 0
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self.hexdigest = self._digest.hexdigest

    async def follow(self) -> None:
        """Hash what is there, until cancelled. What fails is left to `step`."""
        while True:
            try:
                while await self.step():
                    pass
            except MeshmaxError as error:
                _log.info("a chunk that was imported cannot be read", code=error.code, error=error.message)
                return
            await self.wake.wait()
            self.wake = trio.Event()

    async def step(self) -> bool:
        """Hash some more; False if there is no more now. Raises StoreCorrupt, StoreError."""
        before = self._at
        await self._world.run_sync(self._hash_some)
        return self._at > before

    def _hash_some(self) -> None:
        digest, haves = self._blob.chunk_map.sha256, self._blob.haves
        for _ in range(STEP_CHUNKS):
            if self._at not in haves:
                return
            length = self._world.blobs.read_chunk_into(digest, self._at, self._buffer)
            self._digest.update(self._buffer[:length])
            self._at += 1


@asynccontextmanager
async def _beside(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run ``work`` while inside. An error inside leaves as it is, not in a group."""
    failure: MeshmaxError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        try:
            yield
        except MeshmaxError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure:
        raise failure


@asynccontextmanager
async def _opened(blobs: BlobStore, chunk_map: ChunkMap) -> AsyncIterator[Partial]:
    blob = await blobs.open_partial(chunk_map)
    try:
        yield blob
    finally:
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
            await blob.aclose()


def _remote(mesh: Mesh, model: BundleModel, manifest: Manifest) -> CatalogEntry | None:
    """The model as other peers have it whole, under this name, if it is not here yet under any."""
    entries = [entry for entry in mesh.entries() if entry.digest == manifest.digest]
    if any(entry.local for entry in entries):
        return None
    key = parse_name(model.name).key
    return next((entry for entry in entries if entry.holders and parse_name(entry.name).key == key), None)


def _introduction(reader: BundleReader) -> dict[str, Any]:
    index = reader.index
    who = f"{index.exporter_name} ({index.exporter})" if index.exporter_name else index.exporter
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(index.created_at_s))
    names = [str(parse_name(model.name)) for model in index.models]
    return {
        "status": f"{reader.name}: {_list(names)}, exported by {who} on {day}",
        "exporter": index.exporter,
        "exporter_name": index.exporter_name,
        "models": names,
        "parts": len(reader.parts),
        "missing": list(reader.missing),
    }


def _list(words: Sequence[str]) -> str:
    more = f" and {len(words) - MAX_TOLD} more" if len(words) > MAX_TOLD else ""
    return ", ".join(words[:MAX_TOLD]) + more
