"""What this peer's ``/v2/`` offers: every model that is here, that the mesh has, or that an upstream has.

Rules: a name means what the catalog says; a manifest that is not here is asked of a holder, or of upstream, and is the
very bytes; a blob is known by the manifests that name it, so its size is told before a byte of it is here, and reading it
pulls its model. What was found is remembered for a while, so that a client finds the blobs of the manifest that it got.
Not here: HTTP (api.registry_routes), how reading pulls (services.pull_through), what is pushed (services.uploads).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import trio

from meshmax.base.errors import BlobNotFound, MeshmaxError, ModelNotFound, NoProviders
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, Manifest, StoredModel
from meshmax.base.names import ModelName, parse_name
from meshmax.ports import BlobStore, Catalog, Swarm
from meshmax.services.model_exchange import fetch_model
from meshmax.services.pull_ask import first_answer
from meshmax.services.pull_through import Hold, PullThrough
from meshmax.services.upstream import Upstreams
from meshmax.telemetry.log import get_logger

MAX_REMEMBERED: Final = 256  # manifests that are not here; each has up to 4096 blobs, most have six
ASK_TIMEOUT_S: Final = 20.0  # for a manifest; a registry's clients wait 30 s for an answer

Holders = Callable[[Sha256], Mapping[PeerId, tuple[str, ...]]]  # of a model -> their addresses
_log = get_logger("registry")


class Offer(msgspec.Struct, frozen=True):
    """A model that can be had here: its manifest, and a name by which it can be pulled."""

    name: str
    manifest: Manifest


class BlobOffer(msgspec.Struct, frozen=True):
    """A blob that can be had here, of ``size`` bytes. ``offer``: the model to pull for it; None: it is whole here."""

    digest: Sha256
    size: int
    offer: Offer | None


class Repositories:
    """The models of this peer as a registry has them."""

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        local: Callable[[], tuple[StoredModel, ...]],
        swarm: Swarm,
        holders: Holders,
        through: PullThrough,
        upstreams: Upstreams | None,
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._local = local
        self._swarm = swarm
        self._holders = holders
        self._through = through
        self._upstreams = upstreams
        self._remembered: OrderedDict[Sha256, Offer] = OrderedDict()

    async def manifest(self, name: ModelName, digest: Sha256 | None = None) -> Manifest:
        """The manifest of ``name``, or the one with ``digest``. Raises ModelNotFound, NoProviders."""
        if digest is not None:
            return (await self._by_digest(name, digest)).manifest
        try:
            resolved = self._catalog.resolve(str(name), parts=True)
        except ModelNotFound:
            return (await self._upstream(name)).manifest
        if resolved.stored is not None:
            return resolved.stored.manifest
        return (await self._by_digest(name, resolved.digest)).manifest

    def tags(self, name: ModelName) -> list[str]:
        """The tags under which models of this name are known."""
        names = (parse_name(entry.name) for entry in self._catalog.entries())
        same = {each.tag for each in names if (each.host, each.namespace, each.model) == _repository(name)}
        return sorted(same)

    async def blob(self, name: ModelName, digest: Sha256) -> BlobOffer:
        """A blob, here or to be had. Raises BlobNotFound."""
        size = await self._size_here(digest)
        if size is not None:
            return BlobOffer(digest, size, None)
        for offer in [*reversed(self._remembered.values()), *await self._offers(name, digest)]:
            layer = next((layer for layer in offer.manifest.blobs if layer.digest == digest), None)
            if layer is not None:
                return BlobOffer(digest, layer.size, offer)
        raise BlobNotFound(f"blob {digest[:12]} is not here, nor of a model '{name}' that can be had")

    async def read(self, blob: BlobOffer, hold: Hold | None, index: int) -> bytes:
        """A chunk of the blob; waits for it where it is being pulled. Raises what made it impossible."""
        if hold is None:
            return await self._blobs.read_chunk(blob.digest, index)
        return await self._through.read_chunk(hold, blob.digest, index)

    @property
    def through(self) -> PullThrough:
        """Who pulls what is read."""
        return self._through

    # --- inside ------------------------------------------------------------------------------------------------------

    async def _size_here(self, digest: Sha256) -> int | None:
        try:
            await self._blobs.path(digest)
        except MeshmaxError:
            return None
        for stored in self._local():
            for layer in stored.manifest.blobs:
                if layer.digest == digest:
                    return layer.size
        known = await self._blobs.haves(digest)  # pushed a moment ago, its manifest is still to come
        return known[0].size if known else None

    async def _by_digest(self, name: ModelName, digest: Sha256) -> Offer:
        for stored in self._local():
            if stored.manifest.digest == digest:
                return Offer(stored.name, stored.manifest)
        if digest in self._remembered:
            return self._remembered[digest]
        found = None
        with trio.move_on_after(ASK_TIMEOUT_S):
            found = await first_answer(
                self._holders(digest), lambda peer: fetch_model(self._swarm, peer, digest), self._failed
            )
        if found is not None:
            return self._remember(Offer(str(name), found[1].manifest))
        return await self._upstream(name, digest)

    async def _upstream(self, name: ModelName, digest: Sha256 | None = None) -> Offer:
        if self._upstreams is None:
            raise ModelNotFound(f"no peer that can be reached has '{name}'")
        try:
            found = await self._upstreams.find(name, digest)
        except NoProviders as error:
            raise ModelNotFound(f"no peer that can be reached has '{name}'; upstream: {error.message}") from None
        return self._remember(Offer(str(name), found.manifest))

    async def _offers(self, name: ModelName, digest: Sha256) -> list[Offer]:
        """The models of this repository that have the blob, asked for anew: the manifest was given out long ago."""
        known = {model.digest for stored in self._local() for model in stored.manifest.blobs}
        found: list[Offer] = []
        if digest in known:  # here, but damaged or gone
            found += [
                Offer(stored.name, stored.manifest)
                for stored in self._local()
                if any(layer.digest == digest for layer in stored.manifest.blobs)
            ]
        for entry in self._catalog.entries():
            each = parse_name(entry.name)
            if not entry.local and (each.host, each.namespace, each.model) == _repository(name):
                try:
                    found.append(await self._by_digest(each, entry.digest))
                except MeshmaxError as error:
                    _log.info("a manifest could not be had", model=entry.name, error=error.message)
        return found

    def _remember(self, offer: Offer) -> Offer:
        self._remembered[offer.manifest.digest] = offer
        self._remembered.move_to_end(offer.manifest.digest)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return offer

    def _failed(self, peer: PeerId, error: MeshmaxError) -> None:
        _log.info("holder failed", peer=peer, what="a manifest", code=error.code, error=error.message)


def chunks_of(start: int, end: int) -> range:
    """The chunks that hold the bytes [start, end)."""
    return range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES))


def _repository(name: ModelName) -> tuple[str, str, str]:
    return (name.host, name.namespace, name.model)
