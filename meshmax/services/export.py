"""Exporting models into a bundle: which chunks go in, the signed index, and the writing of it.

Rules: models must be whole here. What the other site has, by its list, stays out: the blobs of models and the blobs that
it names, the chunks of its partial ones. An export that was interrupted goes on, with the time at which it was begun, so
that its index is the same; the folder must not hold another bundle of that name. A record is taken along if it is sound
and of the very maps that we have; else the exporter's signature over the index has to do. Not here: files
(store.bundle_write), form (wire.bundle).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from meshmax.base.errors import InvalidRequest, ManifestInvalid, ModelNotFound, StoreCorrupt
from meshmax.base.ids import Sha256
from meshmax.base.model import ChunkMap, Haves, Layer, ModelRecord, Signed, StoredModel
from meshmax.base.names import parse_name
from meshmax.ports import BlobStore, Catalog, RunSync, Signer
from meshmax.services.model_exchange import check_record
from meshmax.store.bundle_write import BundleWriter
from meshmax.wire.bundle import (
    FAT32_BYTES,
    SUFFIX,
    VERSION,
    BundleBlob,
    BundleIndex,
    BundleModel,
    lay_out,
    seal_index,
    stem_of,
)
from meshmax.wire.chunkmap import encode_map, map_address
from meshmax.wire.have import HaveList, HavePartial

TELL_INTERVAL_S: Final = 0.2  # between two lines of progress

Tell = Callable[[dict[str, Any]], Awaitable[None]]
OpenWriter = Callable[[Path, str], BundleWriter]


class ExportOrder(msgspec.Struct, frozen=True):
    """What to export: local ``names``, to a folder or a file that ends in .meshmax; ``part_bytes`` 0: in one file."""

    names: tuple[str, ...]
    to: Path
    part_bytes: int = 0
    lacking: HaveList | None = None


class Exporter:
    """Exports what is in the store. ``name`` is what this peer calls itself."""

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        signer: Signer,
        name: str,
        unix_now: Callable[[], float],
        run_sync: RunSync,
        open_writer: OpenWriter,
    ) -> None:
        self._catalog, self._blobs, self._signer, self._name = catalog, blobs, signer, name
        self._unix_now, self._run_sync, self._open_writer = unix_now, run_sync, open_writer

    async def run(self, order: ExportOrder, tell: Tell) -> None:
        """Write the bundle, or what is missing of it. Raises ModelNotFound, InvalidRequest, StoreFull, StoreError."""
        models = [self._model(name) for name in dict.fromkeys(order.names)]
        if not models:
            raise InvalidRequest("name the models to export")
        folder, stem = _place(order)
        writer = self._open_writer(folder, stem)
        index = await self._index(order, models, tell)
        try:
            earlier = await self._run_sync(writer.earlier)
            envelope = seal_index(index := _taken_up(index, earlier), self._signer.sign)
            await self._run_sync(partial(lay_out, index, len(envelope)))
            await self._run_sync(partial(writer.start, index, envelope))
            await self._write(writer, stem, tell)
        finally:
            writer.close()
        files = [str(folder / name) for name in writer.names]
        done = {"files": files, "size": writer.size, "kept": writer.kept, "models": [m.name for m in models]}
        await tell({"status": "success", **done})

    async def _write(self, writer: BundleWriter, stem: str, tell: Tell) -> None:
        told_s = -TELL_INTERVAL_S
        over = False
        while not over:
            over = await self._run_sync(writer.step)
            now = trio.current_time()
            if over or now - told_s >= TELL_INTERVAL_S:
                told_s = now
                await tell({"status": f"exporting {stem}", "total": writer.size, "completed": writer.done})

    def _model(self, name: str) -> StoredModel:
        resolved = self._catalog.resolve(name)
        stored = resolved.stored
        if stored is None and resolved.entry.served:
            raise InvalidRequest(
                f"'{name[:200]}' is no file of this peer: an engine beside it brings the model along"
                " (`meshmax add --from-ollama` takes in the files of an Ollama)"
            )
        if stored is None:
            raise ModelNotFound(f"'{name[:200]}' is not on this peer: pull it first, or export where it is")
        return stored

    # --- the index ---------------------------------------------------------------------------------------------------

    async def _index(self, order: ExportOrder, models: Sequence[StoredModel], tell: Tell) -> BundleIndex:
        layers = {layer.digest: layer for stored in models for layer in stored.manifest.blobs}
        await tell({"status": f"reading what {len(layers)} blobs consist of"})
        maps = {layer.digest: await self._map(layer) for layer in layers.values()}
        there = _there(order.lacking, models)
        partials = {one.digest: one for one in order.lacking.partials} if order.lacking else {}
        blobs = [
            _blob(chunk_map, digest in there, partials.get(digest)) for digest, chunk_map in maps.items()
        ]  # whatever is small comes first, so that one part brings most of it
        return BundleIndex(
            VERSION,
            self._signer.peer_id,
            self._name,
            int(self._unix_now()),
            order.part_bytes,
            tuple(BundleModel(parse_name(m.name).full, m.manifest.raw, _record(m, maps)) for m in models),
            tuple(sorted(blobs, key=lambda blob: (blob.size, blob.sha256))),
        )

    async def _map(self, layer: Layer) -> ChunkMap:
        known = await self._blobs.haves(layer.digest)
        if known is None or not known[1].whole:
            raise StoreCorrupt(
                f"blob {layer.digest[:12]} is damaged on disk: pull the model again before it is exported"
            )
        return known[0]


def _place(order: ExportOrder) -> tuple[Path, str]:
    """Folder, and how the files in it begin."""
    if order.to.suffix == SUFFIX and not order.to.is_dir():
        return order.to.parent, order.to.stem
    return order.to, stem_of(list(order.names))


def _there(lacking: HaveList | None, models: Iterable[StoredModel]) -> set[Sha256]:
    """The blobs that the other site has whole."""
    if lacking is None:
        return set()
    whole = {model.digest for model in lacking.models}
    implied = {blob.digest for m in models if m.manifest.digest in whole for blob in m.manifest.blobs}
    return implied | {Sha256(digest) for digest in lacking.blobs}


def _blob(chunk_map: ChunkMap, there: bool, part: HavePartial | None) -> BundleBlob:
    encoding = encode_map(chunk_map)
    bits = None
    if there and chunk_map.count:
        bits = Haves.none(chunk_map.count).bits
    elif part is not None and part.count == chunk_map.count and part.haves.total:
        full = Haves.all(chunk_map.count).bits
        bits = bytes(all_ & ~here & 0xFF for all_, here in zip(full, part.haves.bits, strict=True))
    return BundleBlob(chunk_map.sha256, chunk_map.size, map_address(encoding), len(encoding), bits)


def _record(stored: StoredModel, maps: dict[Sha256, ChunkMap]) -> Signed | None:
    if stored.record is None:
        return None
    try:
        record: ModelRecord = check_record(stored.record, stored.manifest)
    except ManifestInvalid:
        return None
    ours = {blob.digest: map_address(encode_map(maps[blob.digest])) for blob in stored.manifest.blobs}
    agreed = all(record.chunk_maps[digest] == address for digest, address in ours.items())
    return stored.record if agreed else None


def _taken_up(index: BundleIndex, earlier: Iterable[BundleIndex]) -> BundleIndex:
    """``index``, with the time of an earlier export of the very same."""
    for other in earlier:
        if msgspec.structs.replace(index, created_at_s=other.created_at_s) == other:
            return other
    return index


def part_bytes_of(size: int) -> int:
    """The part size that is meant: 4 GiB means the most that FAT32 takes, one byte less."""
    return FAT32_BYTES if size == FAT32_BYTES + 1 else size
