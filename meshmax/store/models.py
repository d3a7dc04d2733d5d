"""FileModelStore: names, manifests and records in Ollama's layout, over a FileBlobStore.

Decided here: which manifests are models of ours (every blob there with its size), which spelling of a name is kept,
which blobs nothing refers to any more. A manifest that cannot be parsed still counts as a reference to every digest that
stands in it. A signed record is kept for a name and a digest, so it counts only while the name means that digest (Ollama
may have pulled another under it). Changes of names happen one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshmax.base.catalog import Listed, ModelDescription
from meshmax.base.errors import (
    BlobNotFound,
    InvalidRequest,
    ManifestInvalid,
    ModelNotFound,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import (
    CONFIG_MEDIA_TYPE,
    LICENSE_MEDIA_TYPE,
    MAX_MANIFEST_BYTES,
    MODEL_MEDIA_TYPE,
    PARAMS_MEDIA_TYPE,
    SYSTEM_MEDIA_TYPE,
    TEMPLATE_MEDIA_TYPE,
    Layer,
    Manifest,
    ModelDetails,
    Signed,
    StoredModel,
)
from meshmax.base.names import ModelName
from meshmax.ports import Progress
from meshmax.store.adopt import Foreign, Way, adopt_blob
from meshmax.store.blobs import FileBlobStore
from meshmax.store.details import MAX_CONFIG_BYTES, build_config, describe, details_of, parse_config
from meshmax.store.disk import translated, try_read
from meshmax.store.ingest import Ingest, read_header
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import chunk_map_of_bytes
from meshmax.wire.gguf import GgufHeader
from meshmax.wire.manifest import build_manifest, parse_manifest
from meshmax.wire.signed import MAX_PAYLOAD_BYTES, canonical, decode_canonical

MAX_TEXT_LAYER_BYTES: Final = 4 << 20
MAX_WARNED: Final = 1024  # broken manifests that were logged once and are not logged again
_TEXT_LAYERS: Final = {
    "template": TEMPLATE_MEDIA_TYPE,
    "system": SYSTEM_MEDIA_TYPE,
    "license": LICENSE_MEDIA_TYPE,
    "params": PARAMS_MEDIA_TYPE,
}
_log = get_logger("store")


class _RecordFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signer: str
    payload: bytes
    signature: bytes


class FileModelStore:
    """ports.ModelStore on disk. Opened by `store.open_store`."""

    def __init__(self, blobs: FileBlobStore) -> None:
        self._blobs = blobs
        self._layout, self._disk, self._run_sync = blobs.layout, blobs.disk, blobs.run_sync
        self._changing = trio.Lock()
        # Raises where a name must not come to mean a digest, or nothing (None): set by who knows what is pinned.
        self.guard: Callable[[ModelName, Sha256 | None], None] = lambda name, digest: None
        self._details: dict[Sha256, ModelDetails] = {}
        self._warned: set[Path] = set()

    async def models(self) -> tuple[StoredModel, ...]:
        """See ports.ModelStore."""
        with translated("the models were not listed"):
            return await self._run_sync(self._list)

    async def listing(self) -> tuple[Listed, ...]:
        """Every name whose manifest can be read, usable or not; those that cannot be are logged."""
        with translated("the models were not listed"):
            return await self._run_sync(self._list_all)

    async def ingest(self, path: Path, link: bool, progress: Progress) -> Manifest:
        """See ports.ModelStore. Memory stays under 10 MB beside the header, whatever the file's size."""
        ingest = Ingest(self._layout, self._disk, self._blobs.maps, path, link)
        try:
            await self._run_sync(ingest.start)
            progress(0, ingest.size)
            done = False
            while not done:
                done = await self._run_sync(ingest.step)
                progress(ingest.done, ingest.size)
            chunk_map = await self._run_sync(ingest.place)
        finally:
            ingest.abort()
        await self._blobs.placed(chunk_map.sha256)
        assert ingest.header is not None
        layer = Layer(MODEL_MEDIA_TYPE, chunk_map.sha256, chunk_map.size)
        raw_config = build_config(ingest.header, chunk_map.sha256)
        config = await self._run_sync(lambda: self._add_small(raw_config))
        return parse_manifest(build_manifest(config, [layer]))

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """See ports.ModelStore. Blobs of what the name meant before go, unless another name refers to them."""
        manifest = parse_manifest(raw_manifest)
        async with self._changing:
            with translated(f"{name} was not put into the store"):
                stored, old = await self._run_sync(lambda: self._put(name, manifest, record))
            await self._drop_unused(old)
            return stored

    async def adopt(self, foreign: Foreign) -> tuple[StoredModel, Way]:
        """Let a model of another program be ours too, without copying it; how its largest blob came.

        Raises InvalidRequest where the name means another model here, ManifestInvalid, BlobNotFound, StoreFull, StoreError.
        """
        async with self._changing:
            what = f"{foreign.name} was not adopted"
            with translated(what):
                return await self._run_sync(lambda: self._adopt(foreign))

    async def copy(self, source: ModelName, destination: ModelName) -> None:
        """See ports.ModelStore. A record is not copied: it was signed for the other name."""
        async with self._changing:
            with translated(f"{source} was not copied"):
                manifest = (await self._run_sync(lambda: self._find(source)))[1]
                _, old = await self._run_sync(lambda: self._put(destination, manifest, None))
            await self._drop_unused(old)

    async def delete(self, name: ModelName) -> None:
        """See ports.ModelStore. Partials are left: they belong to pulls."""
        async with self._changing:
            with translated(f"{name} was not deleted"):
                gone = await self._run_sync(lambda: self._delete(name))
            await self._drop_unused(gone)

    async def describe(self, digest: Sha256, verbose: bool = False) -> ModelDescription:
        """See ports.ModelStore."""
        with translated("the model was not read"):
            return await self._run_sync(lambda: self._describe(digest, verbose))

    # --- in threads ---------------------------------------------------------------------------------------------------

    def _list(self) -> tuple[StoredModel, ...]:
        found = []
        for name, path in self._layout.names():
            try:
                manifest = self._read_manifest(path)
                self._require_blobs(manifest)
                found.append(self._stored(name, manifest, path))
            except (ManifestInvalid, BlobNotFound, ModelNotFound) as error:
                self._warn_once(name, path, error.message)
            except OSError as error:
                self._warn_once(name, path, error.strerror or "it cannot be read")
        return tuple(sorted(found, key=lambda model: model.modified_at_s, reverse=True))

    def _list_all(self) -> tuple[Listed, ...]:
        found = []
        for name, path in self._layout.names():
            try:
                manifest = self._read_manifest(path)
            except (ManifestInvalid, ModelNotFound, OSError) as error:
                self._warn_once(name, path, str(error)[:200])
                continue
            problem = ""
            try:
                self._require_blobs(manifest)
            except BlobNotFound as error:
                problem = error.message
            blobs = tuple((blob.digest, blob.size) for blob in manifest.blobs)
            found.append(Listed(name, manifest.digest, blobs, problem))
        return tuple(found)

    def _warn_once(self, name: ModelName, path: Path, error: str) -> None:
        if path not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned.add(path)
            _log.warning("model left out", model=str(name), error=error)

    def _adopt(self, foreign: Foreign) -> tuple[StoredModel, Way]:
        with suppress(ModelNotFound):
            _, known = self._find(foreign.name)
            if foreign.manifest is None or known.digest != foreign.manifest.digest:
                raise InvalidRequest(f"'{foreign.name}' means another model here: delete or rename it first")
        largest = max(foreign.blobs, key=lambda digest: foreign.blobs[digest].stat().st_size)
        ways = {digest: adopt_blob(self._layout, self._disk, digest, path) for digest, path in foreign.blobs.items()}
        manifest = foreign.manifest
        if manifest is None:
            path = self._layout.blob(largest)
            config = self._add_small(build_config(read_header(path), largest))
            layer = Layer(MODEL_MEDIA_TYPE, largest, path.stat().st_size)
            manifest = parse_manifest(build_manifest(config, [layer]))
        return self._put(foreign.name, manifest, None)[0], ways[largest]

    def _read_manifest(self, path: Path) -> Manifest:
        raw = try_read(path, MAX_MANIFEST_BYTES)
        if raw is None:
            raise ModelNotFound(f"the manifest {path.name} is gone or too large")
        return parse_manifest(raw)

    def _require_blobs(self, manifest: Manifest) -> None:
        for blob in manifest.blobs:
            try:
                size = self._layout.blob(blob.digest).stat().st_size
            except OSError:
                raise BlobNotFound(f"blob {blob.digest[:12]} is not in the store") from None
            if size != blob.size:
                raise BlobNotFound(f"blob {blob.digest[:12]} has {size} bytes, not {blob.size}: it is not whole")

    def _stored(self, name: ModelName, manifest: Manifest, path: Path) -> StoredModel:
        modified_at_s = path.stat().st_mtime
        record = self._read_record(name, manifest.digest)
        return StoredModel(str(name), manifest, self._details_of(manifest), modified_at_s, record)

    def _details_of(self, manifest: Manifest) -> ModelDetails:
        known = self._details.get(manifest.digest)
        if known is None:
            cached = self._layout.details / manifest.digest
            raw = try_read(cached, MAX_CONFIG_BYTES)
            try:
                known = msgspec.json.decode(raw or b"", type=ModelDetails)
            except (msgspec.DecodeError, ValueError):
                known = self._make_details(manifest)
                if known.context_length:  # else its header could not be read: perhaps next time
                    with suppress(OSError):  # a cache: a full disk must not keep models from being listed
                        self._disk.write_whole(cached, msgspec.json.encode(known))
            self._details[manifest.digest] = known
        return known

    def _make_details(self, manifest: Manifest) -> ModelDetails:
        config = parse_config(try_read(self._layout.blob(manifest.config.digest), MAX_CONFIG_BYTES) or b"")
        return details_of(config, self._header(manifest), self._texts(manifest).get("template", ""))

    def _header(self, manifest: Manifest, whole: bool = False) -> GgufHeader | None:
        layer = manifest.layer(MODEL_MEDIA_TYPE)
        if layer is None:
            return None
        try:
            return read_header(self._layout.blob(layer.digest), whole)
        except (InvalidRequest, OSError):
            return None  # not a GGUF (safetensors), or damaged: the config's facts have to do

    def _texts(self, manifest: Manifest) -> dict[str, str]:
        texts = {}
        for key, media_type in _TEXT_LAYERS.items():
            layer = manifest.layer(media_type)
            data = try_read(self._layout.blob(layer.digest), MAX_TEXT_LAYER_BYTES) if layer else None
            if data:
                texts[key] = data.decode("utf-8", "replace")
        return texts

    def _describe(self, digest: Sha256, verbose: bool) -> ModelDescription:
        for _, path in self._layout.names():
            with suppress(ManifestInvalid, ModelNotFound):
                manifest = self._read_manifest(path)
                if manifest.digest == digest:
                    header, texts = self._header(manifest, verbose), self._texts(manifest)
                    return describe(digest, self._details_of(manifest), header, texts, path.stat().st_mtime)
        raise ModelNotFound(f"model {digest[:12]} is not in the store")

    def _add_small(self, data: bytes) -> Layer:
        """Write a blob that is in memory (a config)."""
        chunk_map = chunk_map_of_bytes(data)
        path = self._layout.blob(chunk_map.sha256)
        with translated("a model's config was not written"):
            self._blobs.maps.save(chunk_map)
            self._disk.write_whole(path, data, self._layout.partials)
            self._blobs.maps.seal(chunk_map.sha256, path, proved=True)
        return Layer(CONFIG_MEDIA_TYPE, chunk_map.sha256, len(data))

    def _spelled(self, name: ModelName) -> ModelName:
        """``name`` in the spelling that is there already, each part on its own (Ollama's getExistingName)."""
        parts = []
        folder = self._layout.manifests
        for part in name.path_parts:
            found = next((e.name for e in _entries(folder) if e.name.lower() == part.lower()), part)
            exact = folder / part
            parts.append(part if exact.exists() else found)
            folder = folder / parts[-1]
        return ModelName(*parts)

    def _find(self, name: ModelName) -> tuple[ModelName, Manifest]:
        spelled = self._spelled(name)
        try:
            return spelled, self._read_manifest(self._layout.manifest(spelled))
        except ModelNotFound:
            raise ModelNotFound(f"model '{name}' not found") from None

    def _put(self, name: ModelName, manifest: Manifest, record: Signed | None) -> tuple[StoredModel, list[Sha256]]:
        self._require_blobs(manifest)
        self.guard(name, manifest.digest)
        spelled = self._spelled(name)
        path = self._layout.manifest(spelled)
        old = self._try_manifest(path)
        if record is not None:
            word = _RecordFile(record.signer, record.payload, record.signature)
            self._disk.write_whole(self._layout.record(name, manifest.digest), canonical(word))
        if old is None or old.digest != manifest.digest:  # else it stays as old as it is, which lists tell by the file
            self._disk.write_whole(path, manifest.raw, self._layout.partials)
        if record is None:
            self._disk.unlink(self._layout.record(name, manifest.digest))
        if old is not None and old.digest != manifest.digest:
            self._forget(name, old)
        self._warned.discard(path)
        kept = {blob.digest for blob in manifest.blobs}
        gone = [blob.digest for blob in old.blobs if blob.digest not in kept] if old else []
        return self._stored(spelled, manifest, path), gone

    def _delete(self, name: ModelName) -> list[Sha256]:
        spelled = self._spelled(name)
        path = self._layout.manifest(spelled)
        if not path.is_file():
            raise ModelNotFound(f"model '{name}' not found")
        old = self._try_manifest(path)
        self._disk.unlink(path)
        self._disk.sync_folder(path.parent)
        if old is not None:
            self._forget(name, old)
        for folder in path.parents[:3]:
            with suppress(OSError):
                folder.rmdir()  # only when it is empty
        return [blob.digest for blob in old.blobs] if old else []

    def _try_manifest(self, path: Path) -> Manifest | None:
        try:
            return self._read_manifest(path)
        except (ManifestInvalid, ModelNotFound):
            return None

    def _forget(self, name: ModelName, manifest: Manifest) -> None:
        self._details.pop(manifest.digest, None)
        self._disk.unlink(self._layout.details / manifest.digest)
        self._disk.unlink(self._layout.record(name, manifest.digest))

    def _unused(self, digests: Iterable[Sha256]) -> list[Sha256]:
        unused = set(digests)
        if not unused:
            return []
        for _, path in self._layout.names():
            raw = (try_read(path, 1 << 26) or b"").lower()
            unused = {digest for digest in unused if digest.encode() not in raw}
        return sorted(unused)

    def _read_record(self, name: ModelName, manifest: Sha256) -> Signed | None:
        raw = try_read(self._layout.record(name, manifest), MAX_PAYLOAD_BYTES + 1024)
        if raw is None:
            return None
        try:
            word = decode_canonical(raw, _RecordFile)
        except ManifestInvalid:
            return None
        return Signed(PeerId(word.signer), word.payload, word.signature)

    async def _drop_unused(self, digests: list[Sha256]) -> None:
        # Shielded: the name is changed already, and nobody else would come back for these blobs.
        with trio.CancelScope(shield=True), translated("unused blobs were not removed"):
            for digest in await self._run_sync(lambda: self._unused(digests)):
                await self._blobs.remove(digest)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
