"""Peers that sweep, over a network in memory: real leases and sweepers, stores in memory, who holds what told by the site."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

import msgspec
import trio

from meshmax.base.catalog import Listed
from meshmax.base.errors import StoreError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import StoredModel
from meshmax.base.names import parse_name
from meshmax.core.pins import Pins
from meshmax.core.sweep import Budget, PartialCopy
from meshmax.core.uses import Uses
from meshmax.ports import Stream
from meshmax.services.leases import Leases
from meshmax.services.sweep import Ground, Report, Sweeper
from meshmax.store.usage import PartialUse, Usage
from meshmax.testing.gguf import build_gguf
from meshmax.testing.memory_store import MemoryBlobStore, MemoryModelStore
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner

NOW_S = 1_700_000_000.0
FREE = 10**9


@functools.cache
def model_bytes(name: str) -> bytes:
    """A model of two chunks, another one for each name."""
    return build_gguf({"general.name": name}, tensor_bytes=(1 << 20) + 4000)


class SlowBlobs(MemoryBlobStore):
    """Each chunk takes ``delay_s`` to read."""

    def __init__(self) -> None:
        super().__init__()
        self.delay_s = 0.0

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        await trio.sleep(self.delay_s)
        return await super().read_chunk(digest, index)


class SweepPeer:
    """One peer. ``in_use``, ``needed`` and ``partials`` are what a test says."""

    def __init__(self, site: SweepSite, swarm: MemorySwarm) -> None:
        self.site, self.swarm, self.peer_id = site, swarm, swarm.peer_id
        self.blobs = SlowBlobs()
        self.models = MemoryModelStore(self.blobs)
        self.stored: dict[Sha256, StoredModel] = {}
        self.claims: set[Sha256] = set()  # what the others are told
        self.in_use: dict[Sha256, str] = {}
        self.needed: frozenset[Sha256] = frozenset()
        self.partials: dict[Sha256, PartialUse] = {}
        self.listed: tuple[Listed, ...] = ()
        self.used_s: dict[Sha256, float] = {}
        self.broken = False  # its disk
        self.pins = Pins()
        self.leases = Leases(swarm, self.blobs, lambda: tuple(self.stored.values()))
        self.leases.register()
        self.sweeper = self.new_sweeper()

    def new_sweeper(self, budget: Budget = Budget(), *, last_copies: bool = False) -> Sweeper:  # noqa: B008  frozen
        ground = Ground(
            lambda: tuple(self.stored.values()),
            self._listing,
            self._usage,
            self._holders,
            lambda: self.in_use,
            self._drop,
            self._drop_partial,
            lambda: NOW_S + trio.current_time(),
        )
        uses = Uses(self.used_s)
        made = Sweeper(ground, self.leases, self.pins, uses, budget, partials_kept_s=100.0, last_copies=last_copies)
        made.begin(lambda: self.needed, lambda digest: nullcontext())
        return made

    async def hold(self, name: str, *, age_s: float = 1000.0) -> Sha256:
        """Have a model whole, last used ``age_s`` ago."""
        stored = await self.models.add_model(name, model_bytes(name))
        digest = stored.manifest.digest
        self.stored[digest] = msgspec.structs.replace(stored, modified_at_s=NOW_S - 10 * age_s)
        self.claims.add(digest)
        self.used_s[digest] = NOW_S - age_s
        self.sweeper = self.new_sweeper()
        return digest

    async def sweep(self, **options: bool) -> Report:
        """Sweep until everything that may go has gone."""
        return await self.sweeper.sweep(free_bytes=FREE, **options)

    def _holders(self, digest: Sha256) -> Mapping[PeerId, tuple[str, ...]]:
        return {
            peer.peer_id: peer.swarm.addresses for peer in self.site.peers if peer is not self and digest in peer.claims
        }

    async def _usage(self) -> Usage:
        await trio.lowlevel.checkpoint()
        blobs = {blob.digest: blob.size for stored in self.stored.values() for blob in stored.manifest.blobs}
        return Usage(FREE, blobs, tuple(self.partials.values()))

    async def _listing(self) -> tuple[Listed, ...]:
        await trio.lowlevel.checkpoint()
        return self.listed

    async def _drop(self, digest: Sha256) -> None:
        if self.broken:
            await trio.lowlevel.checkpoint()
            raise StoreError("the disk is read-only")
        stored = self.stored.pop(digest)
        await trio.sleep(0.01)
        self.claims.discard(digest)
        await self.models.delete(parse_name(stored.name))

    async def _drop_partial(self, digest: Sha256) -> bool:
        await trio.lowlevel.checkpoint()
        return self.partials.pop(digest, None) is not None


class SweepSite:
    """Peers that are connected on demand."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.network = MemoryNetwork()
        self.peers: list[SweepPeer] = []
        self._stack = stack

    async def peer(self) -> SweepPeer:
        """A further one; PeerIds are as they come."""
        swarm = await self._stack.enter_async_context(self.network.open_swarm(SeededSigner(len(self.peers) + 1)))
        self.peers.append(SweepPeer(self, swarm))
        return self.peers[-1]

    async def sharing(self, count: int, name: str = "m") -> tuple[list[SweepPeer], Sha256]:
        """``count`` peers that all hold one model, the one with the lowest PeerId first."""
        peers = [await self.peer() for _ in range(count)]
        digests = {await peer.hold(name) for peer in peers}
        (digest,) = digests
        return sorted(peers, key=lambda peer: peer.peer_id), digest


@asynccontextmanager
async def open_sweep_site() -> AsyncIterator[SweepSite]:
    """A site; ends with the block."""
    async with AsyncExitStack() as stack:
        yield SweepSite(stack)


async def mute(stream: Stream) -> None:
    """A peer that takes a stream and says nothing."""
    await trio.sleep_forever()


def gone(report: Report) -> list[str]:
    """Names of the models that went, in order; partials as 'partial'."""
    return [
        "partial" if isinstance(v.candidate, PartialCopy) else v.candidate.names[0]
        for v in report.verdicts
        if v.action == "goes"
    ]


def why(report: Report, digest: Sha256) -> str:
    """Why a model or partial stays."""
    return next(v.reason for v in report.verdicts if v.candidate.digest == digest and v.action == "stays")
