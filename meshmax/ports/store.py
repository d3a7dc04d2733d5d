"""Blobs, whole or partial, and the models over them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from meshmax.base.catalog import ModelDescription
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import ChunkMap, Haves, Manifest, Signed, StoredModel
from meshmax.base.names import ModelName
from meshmax.ports.common import Progress


class ChunkWriter(Protocol):
    """Writes chunks from threads of the caller's own, as blob lanes do, into a partial that its owner keeps open meanwhile."""

    def write_blocking(self, index: int, data: bytes | memoryview) -> None:
        """Verify ``data``, which may be reused afterwards, and put it in its place. Blocks; any thread, several at once.

        It is not marked as there until the owner calls `written`. Raises ChunkMismatch, StoreFull, StoreError.
        """
        ...

    def written(self, index: int) -> None:
        """`write_blocking` has put chunk ``index`` in its place. Called by the owner, in trio's thread."""
        ...


class ChunkReader(Protocol):
    """Reads chunks in threads of the caller's own, as blob lanes do."""

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """Read a verified chunk into ``buffer`` (room for 1 MiB): its length. Blocks; any thread, several at once.

        An adopted blob has no chunks here until somebody has asked for its `haves`. Raises BlobNotFound, StoreCorrupt (and
        offers that chunk no more), StoreError. What ``buffer`` holds after an error is not to be used.
        """
        ...


class ChunkSource(Protocol):
    """Chunks on this machine that are not in the store, such as a bundle on a stick: one more source of a pull."""

    @property
    def name(self) -> str:
        """What it is called among the sources of a transfer."""
        ...

    async def haves(self, digest: Sha256) -> Haves | None:
        """Which chunks of the blob it has; None: nothing of it, or not of that shape."""
        ...

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """A chunk, which is verified by who asks. Raises BlobNotFound, StoreError."""
        ...


class Partial(ChunkWriter, Protocol):
    """A blob being fetched. Owned by one task at a time; chunks written survive kill -9 once `write` has returned and the
    bitmap was synced (at least once a second and at close)."""

    @property
    def chunk_map(self) -> ChunkMap:
        """What the blob must be."""
        ...

    @property
    def haves(self) -> Haves:
        """Which chunks are in their place."""
        ...

    async def write(self, index: int, data: bytes) -> None:
        """Verify ``data`` against the map, put it in its place, mark it. Raises ChunkMismatch, StoreFull, StoreError."""
        ...

    async def finish(self) -> None:
        """Every chunk is there: sync and rename into place. Raises StoreError."""
        ...

    async def discard(self) -> None:
        """Delete what was fetched (its map was a lie)."""
        ...

    async def aclose(self) -> None:
        """Sync bitmap and data, let go; a later `open_partial` goes on from there. Idempotent."""
        ...


class BlobStore(ChunkReader, Protocol):
    """Blobs, whole or partial, with their chunk maps. Every chunk read is verified first."""

    async def haves(self, digest: Sha256) -> tuple[ChunkMap, Haves] | None:
        """The chunk map of a blob and which chunks we can serve; None if we have nothing of it."""
        ...

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """A verified chunk. Raises BlobNotFound (not here, or not yet), StoreCorrupt (and offers that chunk no more)."""
        ...

    async def read_map(self, address: MapAddress) -> bytes | None:
        """The canonical encoding of the chunk map at ``address``, or None."""
        ...

    async def open_partial(self, chunk_map: ChunkMap) -> Partial:
        """Create or resume fetching a blob. Raises StoreFull when it cannot fit, StoreError if it is open already."""
        ...

    async def path(self, digest: Sha256) -> Path:
        """The file of a whole blob; its size and time stamp are checked. Raises BlobNotFound, StoreCorrupt."""
        ...

    async def verify(self, digest: Sha256) -> Haves:
        """Check every chunk on disk. A whole blob with bad chunks becomes a partial without them. Raises BlobNotFound."""
        ...


class Naming(Protocol):
    """What lets names mean models: a ModelStore, or the catalog, which keeps what may be the last copy of another."""

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """As ModelStore.put."""
        ...


class ModelStore(Protocol):
    """Names and manifests over a BlobStore, in Ollama's layout."""

    async def models(self) -> tuple[StoredModel, ...]:
        """Every model that is whole here, newest first. A manifest whose blobs are missing is left out and logged."""
        ...

    async def ingest(self, path: Path, link: bool, progress: Progress) -> Manifest:
        """Take a GGUF file in (reflink or copy; hard link if ``link``) and write its blobs and maps; no name points at it yet.

        Raises InvalidRequest (not a GGUF, truncated), StoreFull. The file is left as it is.
        """
        ...

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """Let ``name`` mean this manifest, whose blobs are all whole. An existing spelling of the name is kept.

        Raises ManifestInvalid, BlobNotFound.
        """
        ...

    async def copy(self, source: ModelName, destination: ModelName) -> None:
        """Let ``destination`` mean what ``source`` means. Raises ModelNotFound."""
        ...

    async def delete(self, name: ModelName) -> None:
        """Forget a name, and every blob that no manifest refers to any more. Raises ModelNotFound."""
        ...

    async def describe(self, digest: Sha256, verbose: bool = False) -> ModelDescription:
        """What the model says of itself; ``verbose``: with its tensors and long arrays, too large for a peer.

        Raises ModelNotFound.
        """
        ...
