"""What every pull of a node uses and shares: stores, swarm, who has what, and the blobs that are being fetched now.

Rules: a blob is fetched by one pull at a time; others that need it wait for it, see how far it is, and lend it their own
sources. Not here: the steps of a pull (services.pull_steps), which pulls there are (services.pull).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any, Final, Protocol

import msgspec
import trio

from meshmax.base.errors import BlobNotFound, StoreCorrupt
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Layer, StoredModel
from meshmax.base.names import ModelName
from meshmax.core.backoff import Random
from meshmax.core.relay_quota import RelayQuota
from meshmax.ports import BlobStore, ChunkSource, ModelStore, Naming, Presence, RunSync, Swarm, Throttle
from meshmax.services.lane_client import MIN_BLOB_BYTES
from meshmax.services.lane_spares import LaneSpares
from meshmax.services.pull_blob import BlobFetch
from meshmax.services.upstream_pull import UpstreamPulls

PREPARED: Final = 4  # sources that lanes are opened to in advance; the others' are when their turn comes

LocalSources = Callable[[Sha256], Sequence[ChunkSource]]
Room = Callable[[Sequence[Layer]], AbstractAsyncContextManager[None]]


Seek = Callable[[str, Callable[[], bool]], Coroutine[Any, Any, bool]]  # until there are some; whether there are


async def seek_nowhere(_name: str, _found: Callable[[], bool]) -> bool:
    """There are only neighbours."""
    await trio.lowlevel.checkpoint()
    return False


class Store(Protocol):
    """Where blobs and models are."""

    @property
    def blobs(self) -> BlobStore:
        """The blobs."""
        ...

    @property
    def models(self) -> ModelStore:
        """The models."""
        ...


class World(msgspec.Struct, frozen=True):
    """What every pull uses. ``locks``: one a blob; ``fetching``: the fetch of each blob that is under way; ``wanted``:
    the models (and how many pulls of each) for which a blob is wanted now; ``upstream``: asked for what no peer has;
    ``opener`` None: no lanes, chunks ride the control connections; ``local``: sources of a blob on this machine;
    ``room``: entered while blobs are fetched, raises StoreFull where the store has no room for them; ``guard`` raises
    where a name must not come to mean a model; ``seek`` looks for providers of a name that are no neighbours yet;
    ``quota``: what has come over relays."""

    swarm: Swarm
    blobs: BlobStore
    models: Naming
    presence: Presence
    random: Random
    run_sync: RunSync
    on_stored: Callable[[StoredModel], Awaitable[None]]
    locks: dict[Sha256, trio.Lock] = {}
    fetching: dict[Sha256, BlobFetch] = {}
    wanted: dict[Sha256, Counter[Sha256]] = {}
    upstream: UpstreamPulls | None = None
    opener: LaneSpares | None = None
    throttle: Throttle | None = None
    local: LocalSources = lambda digest: ()
    room: Room = lambda layers: nullcontext()
    guard: Callable[[ModelName, Sha256], None] = lambda name, digest: None
    seek: Seek = seek_nowhere
    quota: RelayQuota = msgspec.field(default_factory=RelayQuota)

    def peer_name(self, peer: PeerId) -> str:
        """What people call a peer; its id where it has told no name."""
        view = self.presence.view(peer)
        return view.status.name if view and view.status and view.status.name else peer

    def sources(self, digest: Sha256) -> Mapping[PeerId, tuple[str, ...]]:
        """Other peers that have the model ``digest``, those that have it whole first, and their addresses."""
        return self._holders({digest})

    def sources_of_blob(self, blob: Sha256) -> Mapping[PeerId, tuple[str, ...]]:
        """Other peers that have a model for which this blob is wanted now, and their addresses."""
        return self._holders(self.wanted.get(blob, ()))

    def _holders(self, models: Collection[Sha256]) -> Mapping[PeerId, tuple[str, ...]]:
        whole: dict[PeerId, tuple[str, ...]] = {}
        some: dict[PeerId, tuple[str, ...]] = {}
        for view in self.presence.peers():
            if view.status is None or view.state in ("self", "offline"):
                continue
            states = {model.state for model in view.status.models if model.digest in models and not model.served}
            if states:
                (whole if states - {"partial"} else some)[view.peer_id] = view.status.addresses
        return whole | some

    def prepare_lanes(self, digest: Sha256) -> None:
        """Blobs of the model ``digest`` will be fetched soon: have lanes to its first holders at hand."""
        holders = list(self.sources(digest))
        if self.opener is None or self._size(digest) <= MIN_BLOB_BYTES:
            return
        for peer in holders[:PREPARED]:
            self.opener.prepare(peer, self.opener.per_peer if len(holders) == 1 else 1)

    def _size(self, digest: Sha256) -> int:
        """Of a model, as its holders say."""
        models = (model for view in self.presence.peers() if view.status for model in view.status.models)
        return max((model.size for model in models if model.digest == digest), default=0)

    @contextmanager
    def wanting(self, blob: Sha256, model: Sha256) -> Iterator[None]:
        """While inside, the holders of ``model`` are sources of ``blob`` for whichever pull fetches it."""
        models = self.wanted.setdefault(blob, Counter())
        models[model] += 1
        try:
            yield
        finally:
            models[model] -= 1
            if not models[model]:
                del models[model]
            if not models and self.wanted.get(blob) is models:
                del self.wanted[blob]

    @asynccontextmanager
    async def held(self, digest: Sha256) -> AsyncIterator[None]:
        """Alone with a blob: no other pull fetches or completes it meanwhile."""
        lock = self.locks.setdefault(digest, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.statistics().tasks_waiting and self.locks.get(digest) is lock and not lock.locked():
                del self.locks[digest]

    async def is_whole(self, digest: Sha256) -> bool:
        """Whether the blob is in the store, whole."""
        try:
            await self.blobs.path(digest)
        except (BlobNotFound, StoreCorrupt):
            return False
        return True
