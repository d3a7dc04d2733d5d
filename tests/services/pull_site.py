"""Peers that pull from each other over a network in memory: real servers and pulls, presence and names told by the site."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from meshmax.base.catalog import CatalogEntry, ModelDescription, Resolved
from meshmax.base.errors import ModelNotFound, NotOffered
from meshmax.base.events import Download, Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import (
    CHUNK_BYTES,
    CONFIG_MEDIA_TYPE,
    MODEL_MEDIA_TYPE,
    TEMPLATE_MEDIA_TYPE,
    Layer,
    ModelDetails,
    ModelRecord,
    Signed,
    StoredModel,
)
from meshmax.base.names import parse_name, split_digest
from meshmax.base.status import ModelPresence, ModelState, PeerStatus, PeerView
from meshmax.ports import Progress
from meshmax.services.blob_server import BlobServer
from meshmax.services.bundle_source import LocalSources
from meshmax.services.model_exchange import ModelServer
from meshmax.services.outflow import Outflow
from meshmax.services.pull import PullService, open_pulls
from meshmax.testing.memory_store import MemoryBlobStore, MemoryModelStore
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire.chunkmap import encode_map, map_address
from meshmax.wire.manifest import build_manifest
from meshmax.wire.signed import MODEL_RECORD_DOMAIN, sign

NAME = "small:latest"
T = TypeVar("T")


async def in_place(work: Callable[[], T]) -> T:
    """Run blocking work where it is: threads are invisible to simulated time."""
    await trio.lowlevel.checkpoint()
    return work()


def model_bytes(chunks: int, seed: int = 1) -> bytes:
    """A model of ``chunks`` chunks, the last one short."""
    return random.Random(seed).randbytes((chunks - 1) * CHUNK_BYTES + 1000)


class Store:
    """What `open_pulls` takes."""

    def __init__(self) -> None:
        self.blobs = MemoryBlobStore()
        self.models = MemoryModelStore(self.blobs)


class SitePeer:
    """One peer: store, servers, pulls."""

    def __init__(self, site: Site, signer: SeededSigner, swarm: MemorySwarm, store: Store) -> None:
        self.site, self.signer, self.swarm, self.store = site, signer, swarm, store
        self.peer_id = signer.peer_id
        self.pulls: PullService
        self.state: ModelState | None = None  # what the others are told of us
        self.holds: set[Sha256] | None = None  # of which models; None: of all that have a name
        self.told: list[StoredModel] = []
        self.sources = LocalSources()
        self.kept: tuple[Download, ...] = ()  # what is remembered over restarts
        self.changes = 0

    async def hold(
        self, data: bytes, name: str = NAME, record: Signed | None = None, *, signed: bool = True
    ) -> StoredModel:
        """Have the model whole, with a record of ours unless one is given or it is not to be ``signed``."""
        stored = await self.store.models.add_model(name, data)
        made = record or (self.record_of(stored) if signed else None)
        stored = await self.store.models.put(parse_name(name), stored.manifest.raw, made)
        self.state = "disk"
        self.site.names[parse_name(name).key] = stored.manifest.digest
        return stored

    async def hold_two_layers(self, data: bytes, extra: bytes, name: str) -> StoredModel:
        """Have a model of two layers, so that models can share one of them."""
        blobs = self.store.blobs
        maps = [blobs.add(part) for part in (b'{"name":"%s"}' % name.encode(), data, extra)]
        kinds = (CONFIG_MEDIA_TYPE, MODEL_MEDIA_TYPE, TEMPLATE_MEDIA_TYPE)
        config, *layers = (Layer(kind, each.sha256, each.size) for kind, each in zip(kinds, maps, strict=True))
        raw = build_manifest(config, layers)
        stored = await self.store.models.put(parse_name(name), raw, None)
        stored = await self.store.models.put(parse_name(name), raw, self.record_of(stored))
        self.state = "disk"
        self.holds = (self.holds or set()) | {stored.manifest.digest}
        self.site.names[parse_name(name).key] = stored.manifest.digest
        return stored

    def record_of(self, stored: StoredModel) -> Signed:
        """Our record of a model whose blobs are all here."""
        blobs = self.store.blobs.blobs
        maps = {b.digest: map_address(encode_map(blobs[b.digest].chunk_map)) for b in stored.manifest.blobs}
        record = ModelRecord(parse_name(stored.name).full, stored.manifest.digest, maps, self.peer_id, 1, 1)
        return sign(MODEL_RECORD_DOMAIN, record, self.peer_id, self.signer.sign)

    async def on_stored(self, stored: StoredModel) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(stored)
        self.state = "disk"

    async def keep(self, downloads: tuple[Download, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self.kept = downloads

    def on_change(self) -> None:
        self.changes += 1

    async def pull(self, name: str = NAME) -> list[Transfer]:
        """Pull to the end: every value that was shown."""
        async with self.pulls.open_pull(name) as values:
            return [value async for value in values]

    def served(self, digest: Sha256) -> list[int]:
        """The chunks of a blob that we read for others."""
        return [index for blob, index in self.store.blobs.reads if blob == digest]

    # --- ports.Presence and ports.Catalog ---

    def peers(self) -> tuple[PeerView, ...]:
        """Ourselves, then the others that are connected."""
        others = [peer for peer in self.site.peers if peer is not self and peer.peer_id in self.swarm.connections()]
        return (PeerView(self.peer_id, "self", "self", None), *(peer.view_of() for peer in others))

    def view(self, peer_id: PeerId) -> PeerView | None:
        return next((view for view in self.peers() if view.peer_id == peer_id), None)

    def view_of(self) -> PeerView:
        models = {
            model.digest: ModelPresence(model.digest, model.names, "partial", model.size)
            for model in self.pulls.partials()
        }
        if self.state:
            named = self.site.names.values() if self.holds is None else self.holds
            models |= {digest: ModelPresence(digest, (), self.state, 1) for digest in named}
        status = PeerStatus(self.peer_id, 1, 1, "x", "1", addresses=self.swarm.addresses, models=tuple(models.values()))
        return PeerView(self.peer_id, "online", "direct", status)

    def entries(self) -> tuple[CatalogEntry, ...]:
        return ()

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        digest = self.site.names.get(parse_name(split_digest(name)[0]).key)
        if digest is None:
            raise ModelNotFound
        stored = next((s for s in self.told if s.manifest.digest == digest), None)
        entry = CatalogEntry(name, digest, 1, 0.0, ModelDetails(), stored is not None)
        return Resolved(name, digest, entry, stored)

    async def describe(self, name: str, verbose: bool = False) -> ModelDescription:
        raise NotOffered

    async def copy(self, source: str, destination: str) -> StoredModel:
        raise NotOffered

    async def delete(self, name: str) -> None:
        raise NotOffered

    async def add(self, name: str, path: Path, link: bool, progress: Progress) -> StoredModel:
        raise NotOffered


class Site:
    """Peers on one network, all connected. ``names``: what each name means to everybody."""

    def __init__(self, stack: AsyncExitStack, latency_s: float) -> None:
        self.network = MemoryNetwork(latency_s)
        self.peers: list[SitePeer] = []
        self.names: dict[str, Sha256] = {}
        self._stack = stack
        self._count = 0

    async def peer(self, store: Store | None = None, downloads: tuple[Download, ...] = ()) -> SitePeer:
        """A new peer, which may take over the store, and the downloads, of one that died."""
        return await self._stack.enter_async_context(self.open_peer(store, downloads))

    @asynccontextmanager
    async def open_peer(
        self, store: Store | None = None, downloads: tuple[Download, ...] = (), accept: bool = True
    ) -> AsyncIterator[SitePeer]:
        """A peer that ends with the block, as when its process is stopped."""
        number = self._count = self._count + 1
        signer = SeededSigner(number)
        async with self.network.open_swarm(signer) as swarm:
            peer = SitePeer(self, signer, swarm, store or Store())
            outflow = Outflow()
            BlobServer(peer.store.blobs, outflow).register(swarm)
            async with open_pulls(
                swarm,
                peer.store,
                peer,
                peer,
                random=random.Random(number - 1),
                run_sync=in_place,
                on_stored=peer.on_stored,
                on_change=peer.on_change,
                outflow=outflow,
                downloads=downloads,
                keep=peer.keep,
                accept=accept,
                local=peer.sources.of,
            ) as peer.pulls:
                models, blobs = peer.store.models, peer.store.blobs
                ModelServer(models, blobs, peer.pulls.pulling, peer.pulls.accept).register(swarm)
                for other in self.peers:
                    if not other.swarm.closed:
                        await swarm.dial(other.peer_id, other.swarm.addresses)
                self.peers.append(peer)
                try:
                    yield peer
                finally:
                    self.peers.remove(peer)


@asynccontextmanager
async def open_site(latency_s: float = 0.001) -> AsyncIterator[Site]:
    """A site without peers."""
    async with AsyncExitStack() as stack:
        yield Site(stack, latency_s)


def sha256_of(data: bytes) -> Sha256:
    return Sha256(hashlib.sha256(data).hexdigest())
