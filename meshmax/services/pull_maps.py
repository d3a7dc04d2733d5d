"""By which chunk map each blob of a pull is fetched: the one that a signed record names, or one on trial.

Rules: where a publisher signed a record, its map and no other is taken. Where only the sha256 of a blob is known, a holder's
map is taken on trial: the sha256 decides in the end. A map whose blob does not have that sha256 is condemned with the
peer that gave it, and the next holder's map is tried; a map by which honest peers would all be liars is put aside while
another is to be had. Maps are kept in memory while the pull runs, so that waiting for room on the disk asks nobody. Not here:
fetching by a map (services.pull_blob), keeping the chunks on which two maps agree (store).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

import msgspec
import trio

from meshmax.base.errors import IntegrityError, ManifestInvalid, NoProviders
from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.model import ChunkMap, Layer
from meshmax.services.model_exchange import FetchedModel, check_map, fetch_blob_map, fetch_map
from meshmax.services.pull_world import World
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import encode_map, map_address

MAX_LIES: Final = 64  # maps of one blob that may turn out false before the pull is given up

T = TypeVar("T")
_log = get_logger("pull")


class Condemned(IntegrityError):
    """A blob does not have its sha256; the map by which it was fetched is not to be followed."""


class Ask(Protocol):
    """Asks the holders of the model one after the other."""

    async def __call__(
        self, what: str, ask: Callable[[PeerId], Awaitable[T]], rounds: int = ..., /
    ) -> tuple[PeerId, T]:
        """Who answered, and what. Raises NoProviders, IntegrityError."""
        ...


class Choice(msgspec.Struct, frozen=True):
    """The map that a blob is fetched by. ``trial``: nobody signed it; ``last``: and no other is to be had.

    ``provider``: who gave it, on trial; None where it was here or is vouched for.
    """

    chunk_map: ChunkMap
    address: MapAddress
    trial: bool
    provider: PeerId | None = None
    last: bool = False


class Maps:
    """The maps of one pull."""

    def __init__(self, world: World, ask: Ask) -> None:
        self._world = world
        self._ask = ask
        self._chosen: dict[Sha256, Choice] = {}
        self._asking: dict[Sha256, trio.Lock] = {}  # one a blob of the model
        self._lies: dict[Sha256, set[MapAddress]] = {}  # bounded by MAX_LIES a blob
        self._aside: dict[Sha256, dict[MapAddress, Choice]] = {}  # likewise
        self._liars: set[PeerId] = set()  # bounded by the lies

    async def of(self, model: FetchedModel, layer: Layer) -> Choice:
        """The map to fetch a blob by. Raises NoProviders, IntegrityError (no holder's map is left)."""
        async with self._asking.setdefault(layer.digest, trio.Lock()):  # nobody is asked twice for one map
            chosen = self._chosen.get(layer.digest)
            if chosen is None or chosen.trial is not (model.record is None):
                record = model.record
                asked = self._signed(layer, record.chunk_maps[layer.digest]) if record else self._on_trial(layer)
                chosen = self._chosen[layer.digest] = await asked
            return chosen

    def forget(self) -> None:
        """Another record is followed from now on."""
        self._chosen.clear()

    async def try_other(self, layer: Layer) -> Choice | None:
        """The chosen map was a lie: condemn it and its provider. The next one to be tried, None where there is none."""
        false = self._chosen.pop(layer.digest)
        lies = self._lies.setdefault(layer.digest, set())
        lies.add(false.address)
        if false.provider:
            self._liars.add(false.provider)
        _log.warning("chunk map is false", blob=layer.digest[:12], peer=false.provider or "kept from before")
        if len(lies) >= MAX_LIES:
            return None
        try:
            other = await self._on_trial(layer)
        except (NoProviders, IntegrityError):
            return None
        self._chosen[layer.digest] = other
        return other

    def put_aside(self, layer: Layer) -> None:
        """By the chosen map nothing more is to be had, and what came did not match it: try another first, if there is one."""
        doubtful = self._chosen.pop(layer.digest)
        aside = self._aside.setdefault(layer.digest, {})
        if len(aside) < MAX_LIES:
            aside[doubtful.address] = doubtful
        _log.warning("chunk map is doubtful", blob=layer.digest[:12], peer=doubtful.provider or "kept from before")

    async def _signed(self, layer: Layer, address: MapAddress) -> Choice:
        known = await self._world.blobs.haves(layer.digest)
        if known and map_address(encode_map(known[0])) == address:
            check_map(known[0], layer)
            return Choice(known[0], address, trial=False)
        _, chunk_map = await self._ask("a chunk map", lambda peer: fetch_map(self._world.swarm, peer, address, layer))
        return Choice(chunk_map, address, trial=False)

    async def _on_trial(self, layer: Layer) -> Choice:
        aside = self._aside.get(layer.digest, {})
        refused = self._lies.get(layer.digest, set()) | set(aside)
        known = await self._world.blobs.haves(layer.digest)
        if known and (address := map_address(encode_map(known[0]))) not in refused:
            check_map(known[0], layer)
            return Choice(known[0], address, trial=True)

        async def ask(peer: PeerId) -> ChunkMap:
            if peer in self._liars:
                raise ManifestInvalid(f"peer {peer} gave a false chunk map before")
            chunk_map = await fetch_blob_map(self._world.swarm, peer, layer)
            if map_address(encode_map(chunk_map)) in refused:
                raise ManifestInvalid(f"peer {peer} gives a chunk map that was found wanting")
            return chunk_map

        try:
            provider, chunk_map = await self._ask("a chunk map", ask)
        except (NoProviders, IntegrityError):
            if not aside:
                raise
            # Nobody has a better one: it gets another chance.
            return msgspec.structs.replace(aside.pop(next(iter(aside))), last=True)
        return Choice(chunk_map, map_address(encode_map(chunk_map)), trial=True, provider=provider)
