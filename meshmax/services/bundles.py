"""What moves models between sites without a network, as faces see it, put together for one node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Manifest, StoredModel
from meshmax.ports import Pulls, RunSync, Signer, Swarm
from meshmax.services.bundle_source import LocalSources
from meshmax.services.catalog import CatalogService
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


class Parts(Protocol):
    """What bundles need of a node."""

    signer: Signer
    name: str
    swarm: Swarm
    store: Store
    catalog: CatalogService
    pulls: Pulls

    def now(self) -> float:
        """Unix time in seconds."""
        ...


def make_bundles(
    node: Parts,
    run_sync: RunSync,
    sources: LocalSources,
    held: Callable[[Sha256], AbstractAsyncContextManager[None]],
    on_stored: Callable[[StoredModel], Awaitable[None]],
) -> Bundles:
    """Bundles of this node. ``held``: alone with a blob; ``on_stored`` is told of each name that is new."""
    blobs, catalog = node.store.blobs, node.catalog

    def open_writer(folder: Path, stem: str) -> BundleWriter:
        return BundleWriter(blobs.disk, folder, stem, blobs.read_chunk_into, blobs.maps.read)

    async def ask_manifest(peer: PeerId, digest: Sha256) -> Manifest:
        return (await fetch_model(node.swarm, peer, digest)).manifest

    async def list_all() -> tuple[list[Sha256], list[Sha256]]:
        return await run_sync(partial(list_blobs, blobs.layout))

    mesh = Mesh(catalog.entries, node.pulls, sources)
    return Bundles(
        Exporter(catalog, blobs, node.signer, node.name, node.now, run_sync, open_writer),
        Importer(ImportWorld(blobs, catalog, run_sync, held, on_stored), mesh),
        HaveLister(node.signer.peer_id, catalog.entries, blobs, list_all, ask_manifest, node.now),
    )
