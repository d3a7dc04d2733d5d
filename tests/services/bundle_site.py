"""Two sites with stores on disk and nothing but files between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from meshmax.base.catalog import CatalogEntry, Resolved
from meshmax.base.errors import ModelNotFound, PeerGone
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Manifest, ModelDetails, ModelRecord, StoredModel
from meshmax.base.names import parse_name
from meshmax.services.bundle_source import LocalSources
from meshmax.services.export import Exporter, ExportOrder
from meshmax.services.have import HaveLister
from meshmax.services.import_bundle import Importer, ImportWorld, Mesh
from meshmax.store import Store, open_store
from meshmax.store.bundle_have import list_blobs
from meshmax.store.bundle_write import BundleWriter
from meshmax.store.disk import Disk
from meshmax.testing.gguf import build_gguf
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.chunkmap import encode_map, map_address
from meshmax.wire.have import HaveList
from meshmax.wire.signed import MODEL_RECORD_DOMAIN, sign
from tests.store.fakes import in_place

NOW_S = 1_761_498_924.0


async def _nobody(peer: PeerId, digest: Sha256) -> Manifest:
    await trio.lowlevel.checkpoint()
    raise PeerGone


class QuickDisk(Disk):
    """Waits for no disk: what a power cut would leave is tried elsewhere."""

    def sync(self, fd: int) -> None: ...

    def sync_folder(self, folder: Path) -> None: ...


class BundleSite:
    """One site: a store, and what exports from it and imports into it. ``lines``: what was told."""

    def __init__(self, folder: Path, store: Store, seed: int, bundle_disk: Disk) -> None:
        self.folder, self.store = folder, store
        self.signer = SeededSigner(seed)
        self.now_s = NOW_S
        self.lines: list[dict[str, Any]] = []
        self.held: dict[Sha256, trio.Lock] = {}
        self.sources = LocalSources()
        self.stored: list[StoredModel] = []
        blobs = store.blobs

        def open_writer(where: Path, stem: str) -> BundleWriter:
            return BundleWriter(bundle_disk, where, stem, blobs.read_chunk_into, blobs.maps.read)

        async def listed() -> tuple[list[Sha256], list[Sha256]]:
            return await in_place(lambda: list_blobs(blobs.layout))

        catalog: Any = self
        self.exporter = Exporter(catalog, blobs, self.signer, f"site-{seed}", lambda: self.now_s, in_place, open_writer)
        self.world = ImportWorld(blobs, store.models, in_place, self._held, self.on_stored)
        self.importer = Importer(self.world)
        self.have = HaveLister(self.signer.peer_id, self.entries, blobs, listed, _nobody, lambda: self.now_s)

    def with_mesh(self, entries: list[CatalogEntry], pulls: Any) -> None:
        """Let imports pull beside the bundle."""
        self.importer = Importer(self.world, Mesh(lambda: tuple(entries), pulls, self.sources))

    async def add(self, name: str, data: bytes, signed: bool = True) -> StoredModel:
        """Take a GGUF in, with a record of this site if ``signed``."""
        path = self.folder / "source.gguf"
        path.write_bytes(data)
        manifest = await self.store.models.ingest(path, False, lambda _done, _size: None)
        maps = {}
        for blob in manifest.blobs:
            known = await self.store.blobs.haves(blob.digest)
            assert known is not None
            maps[blob.digest] = map_address(encode_map(known[0]))
        record = ModelRecord(parse_name(name).full, manifest.digest, maps, self.signer.peer_id, 1, 1)
        said = sign(MODEL_RECORD_DOMAIN, record, self.signer.peer_id, self.signer.sign) if signed else None
        stored = await self.store.models.put(parse_name(name), manifest.raw, said)
        await self.on_stored(stored)
        return stored

    async def on_stored(self, stored: StoredModel) -> None:
        await trio.lowlevel.checkpoint()
        self.stored = [s for s in self.stored if s.name != stored.name] + [stored]

    def entries(self) -> tuple[CatalogEntry, ...]:
        return tuple(
            CatalogEntry(s.name, s.manifest.digest, s.manifest.size, 0.0, ModelDetails(), True, (self.signer.peer_id,))
            for s in self.stored
        )

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        for entry, stored in zip(self.entries(), self.stored, strict=True):
            if parse_name(entry.name).key == parse_name(name).key:
                return Resolved(entry.name, entry.digest, entry, stored)
        raise ModelNotFound(f"model '{name}' not found")

    async def export(self, to: Path, *names: str, part_bytes: int = 0, lacking: HaveList | None = None) -> list[Path]:
        """The files that were written, in order."""
        await self.exporter.run(ExportOrder(names or ("small",), to, part_bytes, lacking), self._tell)
        return [Path(file) for file in self.lines[-1]["files"]]

    async def import_(self, *paths: Path, alone: bool = False) -> None:
        await self.importer.run(paths, self._tell, alone=alone)

    async def content(self, stored: StoredModel) -> list[bytes]:
        """The bytes of each blob of a model, as they lie here."""
        return [(await self.store.blobs.path(blob.digest)).read_bytes() for blob in stored.manifest.blobs]

    async def _tell(self, line: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.lines.append(line)

    @asynccontextmanager
    async def _held(self, digest: Sha256) -> AsyncIterator[None]:
        async with self.held.setdefault(digest, trio.Lock()):
            yield


@asynccontextmanager
async def open_site(
    folder: Path, seed: int = 1, disk: Disk | None = None, bundle_disk: Disk | None = None
) -> AsyncIterator[BundleSite]:
    """A site whose store is in ``folder``; what was there before is there again, but for names to export."""
    folder.mkdir(parents=True, exist_ok=True)
    async with open_store(folder / "models", folder / "state", in_place, disk or QuickDisk()) as store:
        yield BundleSite(folder, store, seed, bundle_disk or QuickDisk())


def model_data(chunks: int, seed: int = 1) -> bytes:
    """A GGUF of ``chunks`` MiB and some bytes."""
    return build_gguf(tensor_bytes=(chunks << 20) + 400, seed=seed)
