"""MemoryBlobStore and MemoryModelStore: the store's ports without a disk, held to the same contract suites.

Made for simulated nodes and for tests of services: blobs and models from bytes, and faults on demand: ``full`` makes
every write fail as a full disk does, `corrupt` makes one chunk lie as a rotten disk does. A blob's path exists only on
paper, so engines that open files cannot use this store.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from meshmax.base.catalog import ModelDescription
from meshmax.base.errors import (
    BlobNotFound,
    ChunkMismatch,
    InvalidRequest,
    ModelNotFound,
    StoreCorrupt,
    StoreError,
    StoreFull,
)
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.model import (
    CHUNK_BYTES,
    CONFIG_MEDIA_TYPE,
    MODEL_MEDIA_TYPE,
    ChunkMap,
    Haves,
    Layer,
    Manifest,
    ModelDetails,
    Signed,
    StoredModel,
)
from meshmax.base.names import ModelName, parse_name
from meshmax.ports import Progress
from meshmax.store.details import build_config, describe, details_of, parse_config
from meshmax.wire.chunkmap import check_chunk, chunk_map_of_bytes, encode_map, map_address
from meshmax.wire.gguf import GgufHeader, try_parse_header
from meshmax.wire.manifest import build_manifest, parse_manifest


class _Blob:
    """Bytes, the map that they should match, and which chunks are offered."""

    def __init__(self, chunk_map: ChunkMap, data: bytearray, haves: Haves, whole: bool) -> None:
        self.chunk_map = chunk_map
        self.data = data
        self.haves = haves
        self.whole = whole

    def chunk(self, index: int) -> bytes:
        offset, length = self.chunk_map.span(index)
        return bytes(self.data[offset : offset + length])

    def good_chunks(self) -> Haves:
        haves = Haves.none(self.chunk_map.count)
        for index in range(self.chunk_map.count):
            try:
                check_chunk(self.chunk_map, index, self.chunk(index))
            except ChunkMismatch:
                continue
            if index in self.haves or self.whole:
                haves = haves.with_chunk(index)
        return haves


class MemoryPartial:
    """A blob being fetched into memory."""

    def __init__(self, store: MemoryBlobStore, blob: _Blob) -> None:
        self.chunk_map = blob.chunk_map
        self._store = store
        self._blob = blob
        self._open = True

    @property
    def haves(self) -> Haves:
        """Which chunks are there."""
        return self._blob.haves

    async def write(self, index: int, data: bytes) -> None:
        """See ports.Partial."""
        self.write_blocking(index, data)
        self.written(index)

    def write_blocking(self, index: int, data: bytes | memoryview) -> None:
        """See ports.ChunkWriter."""
        self._require_open()
        check_chunk(self.chunk_map, index, data)
        self._store.require_room()
        offset, length = self.chunk_map.span(index)
        self._blob.data[offset : offset + length] = data

    def written(self, index: int) -> None:
        """See ports.ChunkWriter."""
        self._require_open()
        self._blob.haves = self._blob.haves.with_chunk(index)

    async def finish(self) -> None:
        """See ports.Partial."""
        self._require_open()
        if not self._blob.haves.whole:
            raise StoreError(f"the blob is not whole: {len(self._blob.haves.missing())} chunks are missing")
        self._blob.whole = True
        await self.aclose()

    async def discard(self) -> None:
        """See ports.Partial."""
        await self.aclose()
        self._store.blobs.pop(self.chunk_map.sha256, None)

    async def aclose(self) -> None:
        """See ports.Partial."""
        self._open = False
        self._store.open_partials.discard(self.chunk_map.sha256)

    def _require_open(self) -> None:
        if not self._open:
            raise StoreError("the partial blob was closed")


class MemoryBlobStore:
    """ports.BlobStore in memory. ``full``: True makes writes raise StoreFull. ``reads``: chunks served, by (digest, index)."""

    def __init__(self) -> None:
        self.full = False
        self.blobs: dict[Sha256, _Blob] = {}
        self.open_partials: set[Sha256] = set()
        self.reads: list[tuple[Sha256, int]] = []

    def add(self, data: bytes) -> ChunkMap:
        """Put a whole blob in."""
        chunk_map = chunk_map_of_bytes(data)
        self.blobs[chunk_map.sha256] = _Blob(chunk_map, bytearray(data), Haves.all(chunk_map.count), whole=True)
        return chunk_map

    def add_partial(self, data: bytes, indexes: set[int]) -> ChunkMap:
        """Put a blob in of which only the chunks ``indexes`` are there."""
        chunk_map = chunk_map_of_bytes(data)
        blob = _Blob(chunk_map, bytearray(chunk_map.size), Haves.none(chunk_map.count), whole=False)
        for index in indexes:
            offset, length = chunk_map.span(index)
            blob.data[offset : offset + length] = data[offset : offset + length]
            blob.haves = blob.haves.with_chunk(index)
        self.blobs[chunk_map.sha256] = blob
        return chunk_map

    def corrupt(self, digest: Sha256, index: int) -> None:
        """Flip the first bit of chunk ``index``, as a rotten disk would; what is offered does not change."""
        blob = self.blobs[digest]
        blob.data[blob.chunk_map.span(index)[0]] ^= 1

    def remove(self, digest: Sha256) -> None:
        """Lose a blob, as if somebody had deleted its file."""
        self.blobs.pop(digest, None)

    def whole(self, digest: Sha256) -> bool:
        """Whether the blob is there and whole."""
        return digest in self.blobs and self.blobs[digest].whole

    def content(self, digest: Sha256) -> bytes:
        """The bytes of a whole blob. Raises BlobNotFound."""
        if not self.whole(digest):
            raise BlobNotFound(f"blob {digest[:12]} is not in the store")
        return bytes(self.blobs[digest].data)

    def require_room(self) -> None:
        """Raise StoreFull if the store plays a full disk."""
        if self.full:
            raise StoreFull

    async def haves(self, digest: Sha256) -> tuple[ChunkMap, Haves] | None:
        """See ports.BlobStore."""
        blob = self.blobs.get(digest)
        return (blob.chunk_map, blob.haves) if blob else None

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """See ports.BlobStore."""
        buffer = bytearray(CHUNK_BYTES)
        length = self.read_chunk_into(digest, index, memoryview(buffer))
        return bytes(memoryview(buffer)[:length])

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """See ports.ChunkReader."""
        blob = self.blobs.get(digest)
        if blob is None or index not in blob.haves:
            raise BlobNotFound(f"chunk {index} of blob {digest[:12]} is not in the store")
        data = blob.chunk(index)
        try:
            check_chunk(blob.chunk_map, index, data)
        except ChunkMismatch as error:
            blob.haves = _without(blob.haves, index)
            raise StoreCorrupt(f"blob {digest[:12]} is damaged on disk: {error.message}") from None
        self.reads.append((digest, index))
        buffer[: len(data)] = data
        return len(data)

    async def read_map(self, address: MapAddress) -> bytes | None:
        """See ports.BlobStore."""
        encodings = (encode_map(blob.chunk_map) for blob in self.blobs.values())
        return next((encoding for encoding in encodings if map_address(encoding) == address), None)

    async def open_partial(self, chunk_map: ChunkMap) -> MemoryPartial:
        """See ports.BlobStore."""
        digest = chunk_map.sha256
        encode_map(chunk_map)
        if self.whole(digest) or digest in self.open_partials:
            raise StoreError(f"blob {digest[:12]} is whole or being fetched already")
        blob = self.blobs.get(digest)
        if blob is None or blob.chunk_map.size != chunk_map.size:
            self.require_room()
            blob = _Blob(chunk_map, bytearray(chunk_map.size), Haves.none(chunk_map.count), whole=False)
        elif blob.chunk_map != chunk_map:
            blob = _Blob(chunk_map, blob.data, blob.haves, whole=False)
            blob.haves = blob.good_chunks()
        self.blobs[digest] = blob
        self.open_partials.add(digest)
        return MemoryPartial(self, blob)

    async def path(self, digest: Sha256) -> Path:
        """A path on paper: there is no file. See ports.BlobStore."""
        if not self.whole(digest):
            raise BlobNotFound(f"blob {digest[:12]} is not in the store")
        blob = self.blobs[digest]
        if not blob.haves.whole and not (await self.verify(digest)).whole:
            raise StoreCorrupt
        return Path("/memory") / f"sha256-{digest}"

    async def verify(self, digest: Sha256) -> Haves:
        """See ports.BlobStore."""
        blob = self.blobs.get(digest)
        if blob is None:
            raise BlobNotFound(f"blob {digest[:12]} is not in the store")
        blob.haves = blob.good_chunks()
        blob.whole = blob.whole and blob.haves.whole
        return blob.haves


class MemoryModelStore:
    """ports.ModelStore over a MemoryBlobStore. ``now_s`` is the time stamp of the next name (tests set it)."""

    def __init__(self, blobs: MemoryBlobStore) -> None:
        self.now_s = 1_700_000_000.0
        self._blobs = blobs
        self._names: dict[str, StoredModel] = {}

    async def add_model(self, name: str, data: bytes, record: Signed | None = None) -> StoredModel:
        """Make a model of ``data`` (its model layer; need not be a GGUF) under ``name``."""
        return await self.put(parse_name(name), self._manifest(data).raw, record)

    async def models(self) -> tuple[StoredModel, ...]:
        """See ports.ModelStore."""
        here = [m for m in self._names.values() if all(self._blobs.whole(b.digest) for b in m.manifest.blobs)]
        return tuple(sorted(here, key=lambda m: m.modified_at_s, reverse=True))

    async def ingest(self, path: Path, link: bool, progress: Progress) -> Manifest:
        """See ports.ModelStore. ``link`` makes no difference in memory."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
        try:
            try_parse_header(data, len(data))
        except InvalidRequest as error:
            raise InvalidRequest(f"{path.name}: {error.message}") from None
        self._blobs.require_room()
        progress(len(data), len(data))
        return self._manifest(data)

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """See ports.ModelStore."""
        manifest = parse_manifest(raw_manifest)
        for blob in manifest.blobs:
            if not self._blobs.whole(blob.digest):
                raise BlobNotFound(f"blob {blob.digest[:12]} of {name} is not in the store")
            if len(self._blobs.content(blob.digest)) != blob.size:
                raise BlobNotFound(f"blob {blob.digest[:12]} has not the size that the manifest gives")
        known = self._names.pop(name.key, None)
        self.now_s += 1.0
        stored = StoredModel(known.name if known else str(name), manifest, self._details(manifest), self.now_s, record)
        self._names[name.key] = stored
        if known is not None:
            self._drop_unused(known.manifest)
        return stored

    async def copy(self, source: ModelName, destination: ModelName) -> None:
        """See ports.ModelStore."""
        await self.put(destination, self._model(source).manifest.raw, None)

    async def delete(self, name: ModelName) -> None:
        """See ports.ModelStore."""
        gone = self._model(name)
        del self._names[name.key]
        self._drop_unused(gone.manifest)

    async def describe(self, digest: Sha256, verbose: bool = False) -> ModelDescription:
        """See ports.ModelStore."""
        for model in self._names.values():
            if model.manifest.digest == digest:
                header = self._header(model.manifest, verbose)
                return describe(digest, model.details, header, {}, model.modified_at_s)
        raise ModelNotFound(f"model {digest[:12]} is not in the store")

    def _drop_unused(self, manifest: Manifest) -> None:
        used = {blob.digest for model in self._names.values() for blob in model.manifest.blobs}
        for blob in manifest.blobs:
            if blob.digest not in used:
                self._blobs.remove(blob.digest)

    def _model(self, name: ModelName) -> StoredModel:
        if name.key not in self._names:
            raise ModelNotFound(f"model '{name}' not found")
        return self._names[name.key]

    def _manifest(self, data: bytes) -> Manifest:
        model = self._blobs.add(data)
        header = _try_header(data)
        config = self._blobs.add(
            build_config(header, model.sha256)
            if header
            else msgspec.json.encode({"model_format": "gguf", "model_family": "test", "diff": model.sha256})
        )
        layers = [Layer(MODEL_MEDIA_TYPE, model.sha256, model.size)]
        return parse_manifest(build_manifest(Layer(CONFIG_MEDIA_TYPE, config.sha256, config.size), layers))

    def _header(self, manifest: Manifest, whole: bool = False) -> GgufHeader | None:
        layer = manifest.layer(MODEL_MEDIA_TYPE)
        return _try_header(self._blobs.content(layer.digest), whole) if layer else None

    def _details(self, manifest: Manifest) -> ModelDetails:
        header = self._header(manifest)
        if header is None:
            return ModelDetails(family="test", families=("test",), capabilities=("completion",))
        return details_of(parse_config(self._blobs.content(manifest.config.digest)), header, "")


def _try_header(data: bytes, whole: bool = False) -> GgufHeader | None:
    try:
        return try_parse_header(data, len(data), whole)
    except InvalidRequest:
        return None


def _without(haves: Haves, index: int) -> Haves:
    bits = bytearray(haves.bits)
    bits[index >> 3] &= ~(1 << (index & 7)) & 0xFF
    return Haves(haves.count, bytes(bits))
