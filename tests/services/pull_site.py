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
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, ModelDetails, ModelRecord, Signed, StoredModel
from meshmax.base.names import parse_name, split_digest
from meshmax.base.status import ModelPresence, ModelState, PeerStatus, PeerView
from meshmax.ports import Progress
from meshmax.services.blob_server import BlobServer
from meshmax.services.model_exchange import ModelServer
from meshmax.services.pull import PullService, open_pulls
from meshmax.testing.memory_store import MemoryBlobStore, MemoryModelStore
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire.chunkmap import encode_map, map_address
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
        self.told: list[StoredModel] = []

    async def hold(self, data: bytes, name: str = NAME, record: Signed | None = None) -> StoredModel:
        """Have the model whole, with a record of ours unless one is given."""
        stored = await self.store.models.add_model(name, data)
        signed = record or self.record_of(stored)
        stored = await self.store.models.put(parse_name(name), stored.manifest.raw, signed)
        self.state = "disk"
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
            models |= {digest: ModelPresence(digest, (), self.state, 1) for digest in self.site.names.values()}
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

    async def copy(self, source: str, destination: str) -> None:
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

    async def peer(self, store: Store | None = None) -> SitePeer:
        """A new peer, which may take over the store of one that died."""
        signer = SeededSigner(len(self.peers) + 1)
        swarm = await self._stack.enter_async_context(self.network.open_swarm(signer))
        peer = SitePeer(self, signer, swarm, store or Store())
        BlobServer(peer.store.blobs).register(swarm)
        peer.pulls = await self._stack.enter_async_context(
            open_pulls(
                swarm,
                peer.store,
                peer,
                peer,
                random=random.Random(len(self.peers)),
                run_sync=in_place,
                on_stored=peer.on_stored,
            )
        )
        ModelServer(peer.store.models, peer.store.blobs, peer.pulls.pulling).register(swarm)
        for other in self.peers:
            if not other.swarm.closed:
                await swarm.dial(other.peer_id, other.swarm.addresses)
        self.peers.append(peer)
        return peer


@asynccontextmanager
async def open_site(latency_s: float = 0.001) -> AsyncIterator[Site]:
    """A site without peers."""
    async with AsyncExitStack() as stack:
        yield Site(stack, latency_s)


def sha256_of(data: bytes) -> Sha256:
    return Sha256(hashlib.sha256(data).hexdigest())
