"""What moves models between sites without a network, as faces see it, put together for one node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Manifest, StoredModel
from meshmax.ports import Catalog, Pulls, RunSync, Signer, Swarm
from meshmax.services.bundle_source import LocalSources
from meshmax.services.export import Exporter
from meshmax.services.have import HaveLister
from meshmax.services.import_bundle import Importer, ImportWorld, Mesh
from meshmax.services.model_exchange import fetch_model
from meshmax.store import Store
from meshmax.store.bundle_have import list_blobs
from meshmax.store.bundle_write import BundleWriter


class Bundles(msgspec.Struct, frozen=True):
    """Export, import, and the list of what is here."""

    exporter: Exporter
    importer: Importer
    have: HaveLister


class Maker(msgspec.Struct, frozen=True):
    """What a node gives: who it is, its store and catalog. ``held``: alone with a blob; ``on_stored``: a name is new."""

    signer: Signer
    name: str
    swarm: Swarm
    store: Store
    catalog: Catalog
    unix_now: Callable[[], float]
    run_sync: RunSync
    pulls: Pulls
    sources: LocalSources
    held: Callable[[Sha256], AbstractAsyncContextManager[None]]
    on_stored: Callable[[StoredModel], Awaitable[None]]

    def make(self) -> Bundles:
        """Bundles of this node."""
        blobs, models, run_sync = self.store.blobs, self.store.models, self.run_sync

        def open_writer(folder: Path, stem: str) -> BundleWriter:
            return BundleWriter(blobs.disk, folder, stem, blobs.read_chunk_into, blobs.maps.read)

        async def ask_manifest(peer: PeerId, digest: Sha256) -> Manifest:
            return (await fetch_model(self.swarm, peer, digest)).manifest

        async def list_all() -> tuple[list[Sha256], list[Sha256]]:
            return await run_sync(partial(list_blobs, blobs.layout))

        mesh = Mesh(self.catalog.entries, self.pulls, self.sources)
        return Bundles(
            Exporter(self.catalog, blobs, self.signer, self.name, self.unix_now, run_sync, open_writer),
            Importer(ImportWorld(blobs, models, run_sync, self.held, self.on_stored), mesh),
            HaveLister(self.signer.peer_id, self.catalog.entries, blobs, list_all, ask_manifest, self.unix_now),
        )
