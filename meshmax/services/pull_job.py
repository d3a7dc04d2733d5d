"""One pull from beginning to end: record and manifest, chunk maps, blobs, the whole digests, the name.

Each step asks the peers that have the model one after the other, chunks all of them at once. What is here already is not
fetched. The sha256 of each blob is computed once all of its chunks are there and before it becomes a blob of the store; a
mismatch condemns the chunk map and the publisher who signed it: what was fetched by it is discarded, and another
publisher's record is tried if a holder has one. Not here: who may watch (services.pull), how a blob is fetched
(services.pull_blob).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, Protocol, TypeVar

import msgspec
import trio

from meshmax.base.errors import BlobNotFound, IntegrityError, MeshmaxError, NoProviders, StoreCorrupt
from meshmax.base.events import BlobProgress, Transfer, TransferPeer, TransferState
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import ChunkMap, Layer, StoredModel
from meshmax.base.names import ModelName
from meshmax.core.backoff import Random
from meshmax.ports import BlobStore, ModelStore, Presence, RunSync, Swarm
from meshmax.services.model_exchange import FetchedModel, check_map, fetch_map, fetch_model
from meshmax.services.pull_ask import first_answer
from meshmax.services.pull_blob import BlobFetch
from meshmax.services.pull_progress import Board, Rate
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import encode_map, map_address

ROUNDS: Final = 3  # how often all holders are asked for a record or a map before the pull fails
ROUND_PAUSE_S: Final = 1.0
CLOSE_TIMEOUT_S: Final = 10.0  # for a partial's last sync when the pull was cancelled

T = TypeVar("T")
_log = get_logger("pull")


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
    """What every pull uses. ``locks``: one a blob, so that two models that share a blob fetch it once."""

    swarm: Swarm
    blobs: BlobStore
    models: ModelStore
    presence: Presence
    random: Random
    run_sync: RunSync
    on_stored: Callable[[StoredModel], Awaitable[None]]
    locks: dict[Sha256, trio.Lock]

    def sources(self, digest: Sha256) -> Mapping[PeerId, tuple[str, ...]]:
        """Other peers that have the model ``digest``, those that have it whole first, and their addresses."""
        whole: dict[PeerId, tuple[str, ...]] = {}
        some: dict[PeerId, tuple[str, ...]] = {}
        for view in self.presence.peers():
            if view.status is None or view.state in ("self", "offline"):
                continue
            states = {model.state for model in view.status.models if model.digest == digest}
            if states:
                (whole if states - {"partial"} else some)[view.peer_id] = view.status.addresses
        return whole | some

    @asynccontextmanager
    async def held(self, digest: Sha256) -> AsyncIterator[None]:
        """Alone with a blob: no other pull fetches or completes it meanwhile."""
        lock = self.locks.setdefault(digest, trio.Lock())
        async with lock:
            yield
        if not lock.statistics().tasks_waiting and self.locks.get(digest) is lock and not lock.locked():
            del self.locks[digest]

    async def is_whole(self, digest: Sha256) -> bool:
        """Whether the blob is in the store, whole."""
        try:
            await self.blobs.path(digest)
        except (BlobNotFound, StoreCorrupt):
            return False
        return True


class Job:
    """The pull of the model ``digest``; ``names`` will mean it (key -> name, and more may be added while it runs)."""

    def __init__(self, world: World, transfer_id: str, digest: Sha256, name: ModelName) -> None:
        self.digest = digest
        self.names = {name.key: name}
        self.watchers = 0
        self.scope = trio.CancelScope()
        self.board = Board(Transfer(transfer_id, str(name), "in", "running", phase="pulling manifest"))
        self._world = world
        self._rate = Rate()
        self._layers: tuple[Layer, ...] = ()
        self._done: dict[Sha256, int] = {}  # bytes in place of each blob but the current
        self._current: tuple[Sha256, BlobFetch] | None = None
        self._past: dict[PeerId, TransferPeer] = {}  # what peers gave of earlier blobs
        self._past_wasted = 0
        self._holder: PeerId | None = None  # who answered last
        self.model: FetchedModel | None = None  # what is being fetched, once it is known

    @property
    def fraction(self) -> float:
        """The share of the model's bytes that is here, 0 to 1."""
        value = self.board.value
        return value.bytes_done / value.bytes_total if value.bytes_total else 0.0

    async def run(self) -> None:
        """Pull; how it ends is told on the board. Only programming errors are raised."""
        ended = False
        with self.scope:
            try:
                await self._pull()
                self._post("success", "done")
            except MeshmaxError as error:
                _log.info("pull failed", model=self.board.value.model, code=error.code, error=error.message)
                self._post(self.board.value.phase, "failed", error.message, error.code)
            ended = True
        if not ended:
            self._post(self.board.value.phase, "cancelled", "nobody waits for it any more; what was fetched is kept")

    def fail(self, reason: str) -> None:
        """It ended by an error of ours."""
        self._post(self.board.value.phase, "failed", reason, MeshmaxError.code)

    # --- the steps ---------------------------------------------------------------------------------------------------

    async def _pull(self) -> None:
        condemned: dict[PeerId, IntegrityError] = {}
        while True:
            self.model = model = await self._model(condemned)
            # Small ones first: whoever has some of the model then has them, should the first source vanish.
            self._layers = tuple(sorted(model.manifest.blobs, key=lambda layer: layer.size))
            try:
                await self._fetch_blobs(model)
                break
            except _Condemned as error:
                condemned[model.record.publisher] = error
        self._post("writing manifest")
        written: set[str] = set()
        while pending := [name for key, name in self.names.items() if key not in written]:
            stored = await self._world.models.put(pending[0], model.manifest.raw, model.signed)
            written.add(pending[0].key)
            await self._world.on_stored(stored)

    async def _model(self, condemned: Mapping[PeerId, IntegrityError]) -> FetchedModel:
        async def ask(peer: PeerId) -> FetchedModel:
            model = await fetch_model(self._world.swarm, peer, self.digest)
            if error := condemned.get(model.record.publisher):
                raise error
            return model

        return await self._ask_holders("its manifest", ask, rounds=1 if condemned else ROUNDS)

    async def _ask_holders(self, what: str, ask: Callable[[PeerId], Awaitable[T]], rounds: int = ROUNDS) -> T:
        failures: list[MeshmaxError] = []

        def failed(peer: PeerId, error: MeshmaxError) -> None:
            _log.info("holder failed", peer=peer, what=what, code=error.code, error=error.message)
            failures.append(error)

        for round_number in range(rounds):
            if round_number:
                await trio.sleep(ROUND_PAUSE_S)
            holders = self._world.sources(self.digest)
            # Who answered last first; the others as presence orders them.
            found = await first_answer(sorted(holders, key=lambda peer: peer != self._holder), ask, failed)
            if found:
                self._holder = found[0]
                return found[1]
        last = failures[-1] if failures else None
        if isinstance(last, IntegrityError):
            raise last
        why = f": {last.message}" if last else ""
        raise NoProviders(f"pull model manifest: no peer gave {what} of '{self.board.value.model}'{why}")

    async def _fetch_blobs(self, model: FetchedModel) -> None:
        fetched: list[Layer] = []
        for layer in self._layers:
            async with self._world.held(layer.digest):
                if await self._world.is_whole(layer.digest):
                    self._done[layer.digest] = layer.size
                    self._post(_pulling(layer))
                    continue
                await self._fetch_blob(layer, await self._map(model, layer))
                fetched.append(layer)
        self._post("verifying sha256 digest")
        for layer in fetched:
            async with self._world.held(layer.digest):
                if not await self._world.is_whole(layer.digest):
                    await self._complete(layer, model)

    async def _map(self, model: FetchedModel, layer: Layer) -> ChunkMap:
        address = model.record.chunk_maps[layer.digest]
        known = await self._world.blobs.haves(layer.digest)
        if known and map_address(encode_map(known[0])) == address:
            check_map(known[0], layer)
            return known[0]
        return await self._ask_holders("a chunk map", lambda peer: fetch_map(self._world.swarm, peer, address, layer))

    async def _fetch_blob(self, layer: Layer, chunk_map: ChunkMap) -> None:
        partial = await self._world.blobs.open_partial(chunk_map)
        fetch = BlobFetch(
            self._world.swarm, partial, lambda: self._world.sources(self.digest), self._world.random, self._progress
        )
        self._current = (layer.digest, fetch)
        try:
            self._post(_pulling(layer))
            await fetch.run()
            self._post(_pulling(layer))
        finally:
            self._settle(layer, fetch)
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
                await partial.aclose()

    async def _complete(self, layer: Layer, model: FetchedModel) -> None:
        """Check the whole digest of a blob whose chunks are all there, then let the store have it."""
        known = await self._world.blobs.haves(layer.digest)
        if known is None:
            raise BlobNotFound(f"blob {layer.digest[:12]} vanished while it was being pulled; pull again")
        digest = hashlib.sha256()
        for index in range(known[0].count):
            chunk = await self._world.blobs.read_chunk(layer.digest, index)
            await self._world.run_sync(lambda chunk=chunk: digest.update(chunk))  # type: ignore[misc]
        partial = await self._world.blobs.open_partial(known[0])
        try:
            if digest.hexdigest() != layer.digest:
                await partial.discard()
                self._done.pop(layer.digest, None)
                publisher = model.record.publisher
                raise _Condemned(
                    f"digest mismatch: the chunks that {publisher} signed as blob {layer.digest[:12]} are not that blob"
                )
            await partial.finish()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
                await partial.aclose()

    # --- how it is seen ----------------------------------------------------------------------------------------------

    def _progress(self) -> None:
        if self.board.due():
            self._post(self.board.value.phase)

    def _post(self, phase: str, state: TransferState = "running", reason: str = "", code: str = "") -> None:
        old = self.board.value
        done = dict(self._done)
        wasted = self._past_wasted
        peers = dict(self._past)
        if self._current:
            digest, fetch = self._current
            done[digest] = fetch.done_bytes
            wasted += fetch.view().bytes_wasted
            peers = _with_blob(peers, fetch)
        total, here = sum(layer.size for layer in self._layers), sum(done.values())
        rate = self._rate.note(here, trio.current_time()) if state == "running" else 0.0
        blobs = tuple(BlobProgress(layer.digest, layer.size, done.get(layer.digest, 0)) for layer in self._layers)
        self.board.post(
            Transfer(
                old.id,
                old.model,
                "in",
                state,
                phase,
                reason,
                code,
                total,
                here,
                wasted,
                rate,
                (total - here) / rate if rate > 0 else None,
                blobs,
                peers,
            )
        )

    def _settle(self, layer: Layer, fetch: BlobFetch) -> None:
        self._done[layer.digest] = fetch.done_bytes
        self._past = _with_blob(self._past, fetch, over=True)
        self._past_wasted += fetch.view().bytes_wasted
        self._current = None


class _Condemned(IntegrityError):
    """A whole digest does not match; the publisher's record is not to be followed."""


def _pulling(layer: Layer) -> str:
    return f"pulling {layer.digest[:12]}"


def _with_blob(past: Mapping[PeerId, TransferPeer], fetch: BlobFetch, over: bool = False) -> dict[PeerId, TransferPeer]:
    """What peers gave before and of the blob of ``fetch``; ``over``: nothing of it is under way any more."""
    peers = {peer: msgspec.structs.replace(before, rate_bytes_per_s=0.0) for peer, before in past.items()}
    for peer, source in fetch.view().sources.items():
        before = peers.get(peer, TransferPeer())
        active = source.active and not over
        peers[peer] = TransferPeer(
            before.bytes + source.bytes,
            source.rate_bytes_per_s if active else 0.0,
            int(active),
            before.strikes + source.strikes,
        )
    return peers
