"""The steps of a pull: record and manifest, chunk maps, blobs, the whole digests, the name.

Each step asks the peers that have the model one after the other, chunks all of them at once. What is here already is not
fetched. The sha256 of each blob is computed once all of its chunks are there and before it becomes a blob of the store. A
mismatch condemns the map: one that a publisher signed, with that publisher (what was fetched by it is discarded, and
another publisher's record is tried if a holder has one); one on trial, with the peer that gave it. Not here: waiting,
pausing, who watches (services.pull_job), which map is tried (services.pull_maps), how a blob is fetched (services.pull_blob).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, Protocol, TypeVar

import trio

from meshmax.base.errors import BlobNotFound, IntegrityError, MeshmaxError, NoProviders, StoreCorrupt
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import ChunkMap, Layer, StoredModel
from meshmax.base.names import ModelName
from meshmax.base.units import MIB
from meshmax.services.model_exchange import FetchedModel, fetch_model
from meshmax.services.pull_ask import first_answer
from meshmax.services.pull_blob import BlobFetch
from meshmax.services.pull_maps import Choice, Condemned, Maps
from meshmax.services.pull_tally import Tally
from meshmax.services.pull_world import World
from meshmax.services.upstream_pull import UpstreamPull
from meshmax.telemetry.log import get_logger

ROUNDS: Final = 3  # how often all holders are asked for a record or a map before that step fails
ROUND_PAUSE_S: Final = 1.0
VANISHED_ROUNDS: Final = 2  # how often a pull begins anew because a blob that was here is not any more
TRIAL_WAIT_S: Final = 15.0  # as long a blob on trial may lack sources when some sent what its map does not know
AHEAD_BYTES: Final = 64 * MIB  # before a blob's end lanes for the next one are opened: a tenth of a second's worth
CLOSE_TIMEOUT_S: Final = 10.0  # for a partial's last sync when the pull was cancelled

T = TypeVar("T")
_log = get_logger("pull")


class Watch(Protocol):
    """Who is told how the steps go."""

    def on_model(self, model: FetchedModel) -> None:
        """What the model consists of is known."""
        ...

    def on_phase(self, phase: str) -> None:
        """It goes on, with this."""
        ...

    def on_chunk(self) -> None:
        """A chunk is in its place."""
        ...

    def patience_s(self) -> float:
        """How long nobody may have what is missing."""
        ...


class Steps:
    """The pull of the model ``digest`` under ``names`` (key -> name, and more may be added while it runs).

    `run` may be called again after it failed or was cancelled, and goes on from where it was.
    """

    def __init__(
        self,
        world: World,
        digest: Sha256,
        names: Mapping[str, ModelName],
        tally: Tally,
        watch: Watch,
        model: FetchedModel | None = None,
        origin: UpstreamPull | None = None,
    ) -> None:
        """``model``: what it consists of, if that is known already; ``origin``: where it is to be had if no peer has it."""
        self.model = model
        self.origin = origin
        self._world = world
        self._digest = digest
        self._names = names
        self._tally = tally
        self._watch = watch
        self._maps = Maps(world, self._ask_holders)
        self._condemned: dict[PeerId, IntegrityError] = {}  # publishers
        self._holder: PeerId | None = None  # who answered last

    async def run(self) -> None:
        """Until the model is here under its names. Raises NoProviders, IntegrityError, StoreFull, StoreError."""
        for _ in range(VANISHED_ROUNDS):
            try:
                await self._run()
                return
            except BlobNotFound as error:
                # It was here when we looked, and somebody deleted the last other model that needs it before ours had a name.
                _log.info("a blob vanished and is fetched again", error=error.message)
                for layer in self._tally.layers:
                    if not await self._world.is_whole(layer.digest):
                        self._tally.place(layer.digest, 0)
        await self._run()

    async def look(self) -> None:
        """See what is here of the model, if what it consists of is known and that was not seen yet. Raises StoreError."""
        if self.model is not None and not self._tally.layers:
            await self._survey(self.model)
            self._watch.on_model(self.model)

    async def _run(self) -> None:
        if (origin := await self._try_origin()) is not None:
            await self._take(origin)
            return
        while True:
            model = await self._know()
            try:
                async with self._world.room(self._tally.layers):
                    await self._fetch_blobs(model)
                break
            except Condemned as error:
                if model.record is not None:
                    self._condemned[model.record.publisher] = error
                    self._maps.forget()
                    self.model = None
            except _Doubtful:
                pass  # by another map, or the same one when there is no other
        await self._name(lambda name: self._world.models.put(name, model.manifest.raw, model.signed))

    async def _name(self, put: Callable[[ModelName], Awaitable[StoredModel]]) -> None:
        """Let every name mean the model, those too that are added meanwhile."""
        self._watch.on_phase("writing manifest")
        written: set[str] = set()
        while pending := [name for key, name in self._names.items() if key not in written]:
            stored = await put(pending[0])
            written.add(pending[0].key)
            if stored.kept:
                self._watch.on_phase(f"'{pending[0]}' meant another model, which is kept as '{stored.kept}'")
            await self._world.on_stored(stored)

    async def _try_origin(self) -> UpstreamPull | None:
        """The registry to take the model from: one that was found before, or one that has it while no peer does."""
        upstream = self._world.upstream
        if self.origin is None and self.model is None and upstream and not self._world.sources(self._digest):
            name = next(iter(self._names.values()))
            with suppress(NoProviders):  # as if there were no registries
                self.origin = await upstream.find(str(name), name, self._digest)
        return self.origin

    async def _take(self, origin: UpstreamPull) -> None:
        """Every blob from upstream, and our record of the model."""
        self._tally.layers, self._tally.origin = origin.layers, origin
        async with self._world.room(origin.layers):
            await origin.fetch(self._world.held, self._world.is_whole, self._watch.on_phase, self._watch.on_chunk)
        await self._name(origin.publish)

    async def _know(self) -> FetchedModel:
        known = self.model is not None and bool(self._tally.layers)
        self._world.prepare_lanes(self._digest)
        model = self.model or await self._ask_model()
        self.model = model
        if not self._tally.layers:
            await self._survey(model)
        if not known:
            self._watch.on_model(model)
        return model

    async def _survey(self, model: FetchedModel) -> None:
        """See what of it is here."""
        # Small ones first: whoever has some of the model then has them, should the first source vanish.
        layers = tuple(sorted(model.manifest.blobs, key=lambda layer: layer.size))
        for layer in layers:
            if await self._world.is_whole(layer.digest):
                self._tally.place(layer.digest, layer.size)
            elif known := await self._world.blobs.haves(layer.digest):
                chunk_map, haves = known
                here = (chunk_map.span(index)[1] for index in range(chunk_map.count) if index in haves)
                self._tally.place(layer.digest, min(sum(here), layer.size))
        self._tally.layers = layers

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _ask_model(self) -> FetchedModel:
        unsigned: list[FetchedModel] = []

        async def ask(peer: PeerId) -> FetchedModel:
            model = await fetch_model(self._world.swarm, peer, self._digest)
            if model.record is None:
                unsigned.append(model)
                raise NoProviders("the peer has no signed record of the model")
            if error := self._condemned.get(model.record.publisher):
                raise error
            return model

        rounds = 1 if self._condemned else ROUNDS
        try:
            return (await self._ask_holders("its manifest", ask, rounds, unsigned))[1]
        except (NoProviders, IntegrityError):
            if not unsigned:
                raise
            return unsigned[0]

    async def _ask_holders(
        self, what: str, ask: Callable[[PeerId], Awaitable[T]], rounds: int = ROUNDS, enough: list[T] | None = None
    ) -> tuple[PeerId, T]:
        """``enough``: where something is in it after a round, no other round is begun."""
        failures: list[MeshmaxError] = []

        def failed(peer: PeerId, error: MeshmaxError) -> None:
            _log.info("holder failed", peer=peer, what=what, code=error.code, error=error.message)
            failures.append(error)

        for round_number in range(rounds):
            if round_number:
                await trio.sleep(ROUND_PAUSE_S)
            holders = self._world.sources(self._digest)
            # Who answered last first; the others as presence orders them.
            found = await first_answer(sorted(holders, key=lambda peer: peer != self._holder), ask, failed)
            if found:
                self._holder = found[0]
                return found
            if enough:
                break
        last = failures[-1] if failures else None
        if isinstance(last, IntegrityError):
            raise last
        why = f": {last.message}" if last else ""
        name = next(iter(self._names.values()))
        raise NoProviders(f"pull model manifest: no peer gave {what} of '{name}'{why}")

    # --- blobs -------------------------------------------------------------------------------------------------------

    async def _fetch_blobs(self, model: FetchedModel) -> None:
        failure: MeshmaxError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_ahead, model)
            try:
                await self._fetch_in_order(model)
            except MeshmaxError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure:
            raise failure

    async def _look_ahead(self, model: FetchedModel) -> None:
        """Have each blob's map at hand when its turn comes. What cannot be had now is asked for again then."""
        for layer in self._tally.layers:
            with suppress(MeshmaxError):
                if not await self._world.is_whole(layer.digest):
                    await self._maps.of(model, layer)

    async def _fetch_in_order(self, model: FetchedModel) -> None:
        fetched: list[Layer] = []
        for layer in self._tally.layers:
            self._tally.turn_to(layer.digest)
            try:
                with self._world.wanting(layer.digest, self._digest):
                    if await self._fetch_one(layer, model):
                        fetched.append(layer)
            finally:
                self._tally.turn_to(None)
        self._watch.on_phase("verifying sha256 digest")
        for layer in fetched:
            async with self._world.held(layer.digest):
                if not await self._world.is_whole(layer.digest):
                    await self._complete(layer, model)

    async def _fetch_one(self, layer: Layer, model: FetchedModel) -> bool:
        """Have every chunk of a blob; whether it still has to be completed."""
        async with self._world.held(layer.digest):
            if await self._world.is_whole(layer.digest):
                self._tally.place(layer.digest, layer.size)
                self._watch.on_phase(_pulling(layer))
                return False
            choice = await self._maps.of(model, layer)
            try:
                await self._fetch_by(choice, layer)
            except _Doubtful:
                self._maps.put_aside(layer)
                self._tally.acquit(layer.digest, None)
                raise
            return True

    async def _fetch_by(self, choice: Choice, layer: Layer) -> None:
        world = self._world
        partial = await world.blobs.open_partial(choice.chunk_map)
        try:
            fetch = BlobFetch(
                world.swarm,
                partial,
                lambda: world.sources_of_blob(layer.digest),
                world.random,
                lambda: self._on_chunk(layer),
                lambda: self._patience_s(choice, layer),
                opener=world.opener,
                throttle=world.throttle,
                local=world.local(layer.digest),
                quota=world.quota,
                peer_name=world.peer_name,
            )
            world.fetching[layer.digest] = fetch
            self._tally.begin(fetch)
            self._watch.on_phase(_pulling(layer))
            try:
                await fetch.run()
            except NoProviders:
                if _on_doubtful_trial(choice, fetch):
                    raise _Doubtful from None
                raise
            finally:
                del world.fetching[layer.digest]
                self._tally.settle()
            self._watch.on_phase(_pulling(layer))
        finally:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
                await partial.aclose()

    def _on_chunk(self, layer: Layer) -> None:
        left_bytes = layer.size - self._world.fetching[layer.digest].done_bytes
        if left_bytes <= AHEAD_BYTES and layer != self._tally.layers[-1]:
            self._world.prepare_lanes(self._digest)
        self._watch.on_chunk()

    def _patience_s(self, choice: Choice, layer: Layer) -> float:
        doubtful = _on_doubtful_trial(choice, self._world.fetching[layer.digest])
        return TRIAL_WAIT_S if doubtful else self._watch.patience_s()

    # --- the whole digest --------------------------------------------------------------------------------------------

    async def _complete(self, layer: Layer, model: FetchedModel) -> None:
        """Check the whole digest of a blob whose chunks are all there, then let the store have it. Raises Condemned."""
        known = await self._world.blobs.haves(layer.digest)
        if known is None:
            raise BlobNotFound(f"blob {layer.digest[:12]} vanished while it was being pulled; pull again")
        true = await self._sha256(layer, known[0]) == layer.digest
        if true and await self._finished(known[0]):
            return
        self._tally.place(layer.digest, 0)
        if model.record is not None:
            await self._discard(known[0])
            publisher = model.record.publisher
            raise Condemned(
                f"digest mismatch: the chunks that {publisher} signed as blob {layer.digest[:12]} are not that blob"
            )
        choice = await self._maps.of(model, layer)
        self._tally.acquit(layer.digest, choice.provider)
        if await self._maps.try_other(layer) is None:
            await self._discard(known[0])
            raise IntegrityError(
                f"digest mismatch: what the holders of '{next(iter(self._names.values()))}' give as blob "
                f"{layer.digest[:12]} is not that blob"
            )
        raise Condemned  # the partial stays: what both maps agree on need not be fetched again

    async def _sha256(self, layer: Layer, chunk_map: ChunkMap) -> str:
        digest = hashlib.sha256()
        for index in range(chunk_map.count):
            chunk = await self._world.blobs.read_chunk(layer.digest, index)
            await self._world.run_sync(lambda chunk=chunk: digest.update(chunk))  # type: ignore[misc]
        return digest.hexdigest()

    async def _finished(self, chunk_map: ChunkMap) -> bool:
        """Let the store have a blob; False where the map lied about something else than chunks, and the partial is gone."""
        partial = await self._world.blobs.open_partial(chunk_map)
        try:
            await partial.finish()
        except StoreCorrupt:
            return False
        finally:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True):
                await partial.aclose()
        return True

    async def _discard(self, chunk_map: ChunkMap) -> None:
        if await self._world.blobs.haves(chunk_map.sha256) is not None:
            await (await self._world.blobs.open_partial(chunk_map)).discard()


class _Doubtful(MeshmaxError):
    """What the sources send is not what the map on trial says."""


def _on_doubtful_trial(choice: Choice, fetch: BlobFetch) -> bool:
    return choice.trial and not choice.last and any(source.strikes for source in fetch.view().sources.values())


def _pulling(layer: Layer) -> str:
    return f"pulling {layer.digest[:12]}"
