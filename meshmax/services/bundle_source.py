"""Bundles as sources of pulls: while one is being imported, every pull of this node may read chunks from it.

A chunk is verified here already, so that a damaged bundle costs the chunks that are damaged, and is not struck as a peer
that lies. Satisfies ports.ChunkSource. Not here: how the pull asks (services.local_source), files (store.bundle_read).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from meshmax.base.errors import BlobNotFound, ChunkMismatch, StoreCorrupt
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap, Haves
from meshmax.ports import ChunkSource, RunSync
from meshmax.store.bundle_read import BundleReader
from meshmax.wire.chunkmap import check_chunk


class BundleSource:
    """The chunks of one bundle. ``on_bad`` is told the blob of each chunk that is damaged."""

    def __init__(self, reader: BundleReader, run_sync: RunSync, on_bad: Callable[[Sha256], None]) -> None:
        self.name = f"bundle {reader.name}"
        self._reader, self._run_sync, self._on_bad = reader, run_sync, on_bad
        self._map: ChunkMap | None = None  # the last one used; pulls ask for one blob at a time

    async def haves(self, digest: Sha256) -> Haves | None:
        """See ports.ChunkSource."""
        found = self._reader.haves(digest)
        if found is None or not found.total:
            return None
        return found if await self._run_sync(partial(self._reader.read_map, digest)) else None

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """See ports.ChunkSource. Raises StoreCorrupt for a damaged chunk."""
        return await self._run_sync(partial(self._read, digest, index))

    def _read(self, digest: Sha256, index: int) -> bytes:
        chunk_map = self._map
        if chunk_map is None or chunk_map.sha256 != digest:
            chunk_map = self._map = self._reader.read_map(digest)
        if chunk_map is None:
            raise BlobNotFound(f"blob {digest[:12]} is not in the bundle")
        buffer = bytearray(CHUNK_BYTES)
        data = memoryview(buffer)[: self._reader.read_chunk_into(digest, index, memoryview(buffer))]
        try:
            check_chunk(chunk_map, index, data)
        except ChunkMismatch:
            self._on_bad(digest)
            raise StoreCorrupt(f"chunk {index} of blob {digest[:12]} is damaged in the bundle") from None
        return bytes(data)


class LocalSources:
    """The sources on this machine that pulls may use now."""

    def __init__(self) -> None:
        self._sources: list[ChunkSource] = []

    def of(self, _digest: Sha256) -> Sequence[ChunkSource]:
        """Those that may have some of a blob, as they come and go."""
        return self._sources

    @contextmanager
    def lent(self, source: ChunkSource) -> Iterator[None]:
        """While inside, pulls may use ``source``."""
        self._sources.append(source)
        try:
            yield
        finally:
            self._sources.remove(source)
