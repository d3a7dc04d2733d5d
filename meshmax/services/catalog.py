"""Names at work: our store's models and the mesh's, kept in step. Satisfies ports.Catalog.

Owns the list of local models (read anew from the store after each change) and what was first seen under each name. When a
name gets another meaning and what it meant before has no other name here and no other peer online, that is kept under
NAME:TAG-DIGEST: nothing that may be the last copy is lost unasked. Adding and copying sign a model record with our key, so
that others can fetch by it; a model that was here before us (in an Ollama store) gets its record in the background. Not
here: what a name means (core.catalog), transfers (services.pull).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal, NoReturn, Protocol

import msgspec
import trio

from meshmax.base.catalog import CatalogEntry, ModelDescription, OfferedModel, Resolved
from meshmax.base.errors import (
    BlobNotFound,
    InvalidRequest,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    OutOfScope,
)
from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.model import Manifest, ModelRecord, Signed, StoredModel
from meshmax.base.names import ModelName, parse_name, split_digest
from meshmax.base.status import PeerView
from meshmax.core.catalog import FirstSeen, held_elsewhere, merge, name_of_kept, resolve
from meshmax.core.pins import Pins
from meshmax.core.refusal import MAX_NAMED
from meshmax.ports import BlobStore, ModelStore, Progress, Signer
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire.chunkmap import encode_map, map_address
from meshmax.wire.manifest import parse_manifest
from meshmax.wire.signed import MODEL_RECORD_DOMAIN, sign

HOLDER_DEADLINE_S: Final = 5.0  # to describe a model; one that lives answers in milliseconds
DESCRIBE_DEADLINE_S: Final = 15.0  # for all holders: a person waits for it

_log = get_logger("catalog")


class Brought(Protocol):
    """The models that engines bring along (services.backends)."""

    def offered(self) -> tuple[OfferedModel, ...]:
        """All of them."""
        ...

    def by_digest(self, digest: Sha256) -> OfferedModel | None:
        """One of them, or None."""
        ...

    async def describe(self, digest: Sha256) -> ModelDescription:
        """What its engine says of it. Raises ModelNotFound, EngineError."""
        ...


AskPeer = Callable[[PeerId, Sha256], Awaitable[ModelDescription]]


class CatalogService:
    """Made by `open_catalog`."""

    def __init__(
        self,
        models: ModelStore,
        blobs: BlobStore,
        signer: Signer,
        unix_now: Callable[[], float],
        peers: Callable[[], tuple[PeerView, ...]],
        fractions: Callable[[], Mapping[Sha256, float]],
        ask_peer: AskPeer,
        first_seen: FirstSeen,
        on_change: Callable[[], None],
        pins: Pins | None = None,
        brought: Brought | None = None,
    ) -> None:
        """``brought``: what engines of this node bring along; None: nothing."""
        self._models = models
        self._blobs = blobs
        self._signer = signer
        self._unix_now = unix_now
        self._peers = peers
        self._fractions = fractions
        self._ask_peer = ask_peer
        self._first_seen = first_seen
        self._on_change = on_change
        self._pins = pins or Pins()
        self._brought = brought
        self._local: tuple[StoredModel, ...] = ()
        self._read: tuple[StoredModel, ...] = ()  # the list as it was read last, which the mesh was told of
        # Held while a name changes and while the list is read: none that is of before a change is taken for one of after it.
        self._changing = trio.Lock()
        self._dropping: set[Sha256] = set()
        self._unsigned = trio.Event()  # set while there are models without a record that nobody has tried to sign
        self._tried: set[tuple[str, Sha256]] = set()
        self._signing: set[tuple[str, Sha256]] = set()  # those that somebody reads and signs right now
        self._of: tuple[object, ...] = ()  # what the entries below were made of
        self._entries: tuple[CatalogEntry, ...] = ()

    # --- ports.Catalog -----------------------------------------------------------------------------------------------

    def entries(self) -> tuple[CatalogEntry, ...]:
        """Every model, local and remote, newest first. Made anew only where something changed, since each prompt asks."""
        # Not their loads, which change with every prompt anywhere.
        views = tuple((view.peer_id, view.state, view.status and view.status.models) for view in self._peers()[1:])
        of = (self._local, self._offered(), views, dict(self._fractions()), self._pins.items())
        if of != self._of:
            self._of, self._entries = of, self._merged(parts=False)
        return self._entries

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        """What ``name`` (or NAME@DIGEST) means here and now; ``parts``: see ports. Raises InvalidName, ModelNotFound."""
        pinned = self._pins.of(parse_name(split_digest(name)[0]).key)
        try:
            return resolve(name, self.entries(), self._local, self._first_seen, pinned)
        except ModelNotFound:
            if not parts:
                raise
        return resolve(name, self._merged(parts=True), self._local, self._first_seen, pinned)

    async def describe(self, name: str, verbose: bool = False) -> ModelDescription:
        """From our store, else of who has it, then never verbose.

        Raises InvalidName, ModelNotFound, NoProviders, OutOfScope, EngineError.
        """
        resolved = self.resolve(name)
        if resolved.stored:
            return await self._models.describe(resolved.digest, verbose)
        if self._brought is not None and self._brought.by_digest(resolved.digest):
            with trio.move_on_after(DESCRIBE_DEADLINE_S):
                return await self._brought.describe(resolved.digest)
        refused: OutOfScope | None = None
        with trio.move_on_after(DESCRIBE_DEADLINE_S):
            for holder in resolved.entry.anywhere:
                try:
                    with trio.move_on_after(HOLDER_DEADLINE_S):
                        return await self._ask_peer(holder, resolved.digest)
                except OutOfScope as error:
                    refused = error
                except MeshmaxError:
                    continue  # the next holder may answer; when none does, the caller is told below
        if refused is not None:
            raise refused  # what the person can do something about
        raise NoProviders(self._mute(name, resolved.entry.anywhere))

    def _mute(self, name: str, holders: Sequence[PeerId]) -> str:
        """That none of ``holders`` answered, and what helps."""
        names = {view.peer_id: view.status.name for view in self._peers() if view.status and view.status.name}
        who = ", ".join(names.get(holder, holder) for holder in holders[:MAX_NAMED])
        told = f" ({who})" if who else ""
        return f"no peer that has '{name}' answered{told}: try again in a moment, and see with `meshmax peers` who is there"

    async def copy(self, source: str, destination: str) -> StoredModel:
        """Let ``destination`` mean what ``source`` (a name or NAME@DIGEST) means here. Raises InvalidName, ModelNotFound."""
        target = parse_name(destination)
        stored = self._stored(source)
        return await self._put(target, stored.manifest)

    async def delete(self, name: str) -> None:
        """Forget a name of ours and every blob that only it needed.

        Raises InvalidName, ModelNotFound, InvalidRequest (it is pinned).
        """
        parsed = parse_name(name)
        async with self._changing:
            self._stored(name)
            self._pins.require_free(parsed, None)
            await self._models.delete(parsed)
            self._local = self._others(parsed)
            self._first_seen.forget(parsed.key)
        await self.refresh()

    async def add(self, name: str, path: Path, link: bool, progress: Progress) -> StoredModel:
        """Ingest a GGUF file, sign a model record, tell the mesh. Raises InvalidName, InvalidRequest, StoreFull."""
        target = parse_name(name)
        manifest = await self._models.ingest(path, link, progress)
        return await self._put(target, manifest)

    async def publish(self, name: ModelName, manifest: Manifest) -> StoredModel:
        """Let ``name`` mean a model whose blobs are all whole here, with a record of ours, and tell the mesh.

        Raises BlobNotFound, ManifestInvalid.
        """
        return await self._put(name, manifest)

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """As ModelStore.put, but what may be the last copy of another model is kept, and told. The lists are not read anew."""
        digest = parse_manifest(raw_manifest).digest
        # Of what is to be kept; signed before, since that may read a whole blob.
        records: dict[Sha256, Signed | None] = {}
        while True:
            async with self._changing:
                self._pins.require_free(name, digest)
                last = self._last_copy(name, digest)
                if last is None or last.digest in records:
                    kept = "" if last is None else await self._keep(name, last, records[last.digest])
                    stored = await self._models.put(name, raw_manifest, record)
                    self._take((stored, *self._others(name)))
                    return msgspec.structs.replace(stored, kept=kept)
            records[last.digest] = await self._try_record(name_of_kept(name, last.digest), last)

    def _last_copy(self, name: ModelName, new_digest: Sha256) -> Manifest | None:
        """What ``name``, which is about to mean ``new_digest``, means now, if it is to be kept.

        It is where nobody else who is online has that model, and no other name here means it.
        """
        old = self._named(name.key)
        if old is None or old.manifest.digest == new_digest:
            return None
        digest = old.manifest.digest
        if any(stored.manifest.digest == digest for stored in self._others(name)):
            return None
        return None if held_elsewhere(digest, self._peers()[1:]) else old.manifest

    async def _keep(self, name: ModelName, manifest: Manifest, record: Signed | None) -> str:
        """Give what ``name`` means now a further name, which is returned."""
        kept = name_of_kept(name, manifest.digest)
        stored = await self._models.put(kept, manifest.raw, record)
        self._take((stored, *self._others(kept)))
        _log.info("kept the last copy", name=str(name), kept=str(kept))
        return str(kept)

    def _others(self, name: ModelName) -> tuple[StoredModel, ...]:
        """The models here under every other name."""
        return tuple(stored for stored in self._local if parse_name(stored.name).key != name.key)

    async def drop(self, digest: Sha256) -> None:
        """A sweep takes our copy of a model, all of its names; what the names mean stays as it is. Raises StoreError."""
        going = [stored for stored in self._local if stored.manifest.digest == digest]
        # At once, so that nobody turns to it any more.
        self._dropping.add(digest)
        self._take(self._local)
        try:
            async with self._changing:
                for name in [parse_name(stored.name) for stored in going]:
                    named = self._named(name.key)
                    if named is not None and named.manifest.digest != digest:
                        continue  # it came to mean another model while this waited for its turn
                    self._first_seen.note(name.key, digest)
                    with suppress(ModelNotFound):  # deleted meanwhile
                        await self._models.delete(name)
        finally:
            self._dropping.discard(digest)
        await self.refresh()

    def _take(self, models: tuple[StoredModel, ...]) -> None:
        """``models`` are here, but for what a sweep takes now."""
        self._local = tuple(stored for stored in models if stored.manifest.digest not in self._dropping)

    # --- for meshmax.node -------------------------------------------------------------------------------------------------

    def local(self) -> tuple[StoredModel, ...]:
        """The models that are whole in our store, newest first."""
        return self._local

    def by_digest(self, digest: Sha256) -> StoredModel:
        """A model of ours. Raises ModelNotFound."""
        stored = next((stored for stored in self._local if stored.manifest.digest == digest), None)
        if stored is None:
            raise ModelNotFound(f"no model with digest {digest[:12]} is here")
        return stored

    async def refresh(self) -> None:
        """Read the local models anew; tell the mesh. What has no record gets one in the background."""
        async with self._changing:
            self._read = await self._models.models()
            self._take(self._read)
        self._on_change()
        unsigned = self._without_record()
        self._tried &= unsigned
        if unsigned - self._tried:
            self._unsigned.set()

    async def refresh_if_changed(self) -> bool:
        """Take up what other programs changed in the store, which they may share; True if there was something.

        New models get records of ours in the task of the caller, which takes as long as reading them.
        """
        async with self._changing:
            models = await self._models.models()
            if models == self._read == self._local:
                return False
            self._read = models
            self._take(models)
        self._on_change()
        await self.sign_missing_records()
        return True

    def note_names(self) -> bool:
        """Remember what each name of the mesh means when it is first seen; True if one was new, or taken back."""
        taken_back = self._first_seen.review(self._peers(), trio.current_time())
        new = [
            entry
            for entry in self.entries()
            # Of several that have it the nearest is taken for the one that offered it.
            if self._first_seen.note(parse_name(entry.name).key, entry.digest, self._origin(entry))
        ]
        return taken_back or bool(new)

    async def sign_missing_records(self) -> None:
        """Give every local model that has none a record of ours, so that peers can fetch it without taking it on trial."""
        for stored in self._local:
            key = (stored.name, stored.manifest.digest)
            if stored.record is None and key not in self._signing and key in self._without_record():
                self._tried.add(key)
                self._signing.add(key)
                try:
                    await isolate("record", partial(self._sign, parse_name(stored.name), stored.manifest))
                finally:
                    self._signing.discard(key)

    async def run_signing(self) -> NoReturn:
        """Sign what is here without a record, now and when more comes, as by adoption; what failed is tried with the next."""
        while True:
            await self.sign_missing_records()
            await self._unsigned.wait()
            self._unsigned = trio.Event()

    def _without_record(self) -> set[tuple[str, Sha256]]:
        return {(stored.name, stored.manifest.digest) for stored in self._local if stored.record is None}

    # --- inside ------------------------------------------------------------------------------------------------------

    def _merged(self, *, parts: bool) -> tuple[CatalogEntry, ...]:
        views, own = self._peers()[1:], self._signer.peer_id
        merged = merge(own, self._local, views, self._fractions(), parts=parts, offered=self._offered())
        if not self._pins.items():
            return merged
        return tuple(
            msgspec.structs.replace(entry, pinned=True) if self._pins.keeps(entry.digest) else entry for entry in merged
        )

    def _offered(self) -> tuple[OfferedModel, ...]:
        return self._brought.offered() if self._brought is not None else ()

    def _origin(self, entry: CatalogEntry) -> PeerId | Literal[""]:
        return "" if entry.is_here else entry.anywhere[0]

    def _stored(self, name: str) -> StoredModel:
        text, digest = split_digest(name)
        stored = self._named(parse_name(text).key)
        if stored is None or not stored.manifest.digest.startswith(digest or ""):
            raise self._not_stored(name)
        return stored

    def _not_stored(self, name: str) -> MeshmaxError:
        """Why a verb that is about files has nothing to work on: an engine here may run the model all the same."""
        missing = ModelNotFound(f"model '{name}' not found")
        try:
            digest = self.resolve(name).digest
        except MeshmaxError:
            return missing
        offer = self._brought.by_digest(digest) if self._brought is not None else None
        if offer is None:
            return missing
        return InvalidRequest(f"'{name[:200]}' is no file of this peer: {offer.origin} brings it along, and keeps it")

    def _named(self, key: str) -> StoredModel | None:
        return next((stored for stored in self._local if parse_name(stored.name).key == key), None)

    async def _put(self, name: ModelName, manifest: Manifest) -> StoredModel:
        stored = await self.put(name, manifest.raw, await self._record(name, manifest))
        await self._on_ours(name, manifest)
        return stored

    async def _sign(self, name: ModelName, manifest: Manifest) -> None:
        """Give what ``name`` means a record, unless it was deleted or came to mean something else while that was made."""
        record = await self._record(name, manifest)
        async with self._changing:
            named = self._named(name.key)
            if named is None or named.manifest.digest != manifest.digest:
                return
            stored = await self._models.put(name, manifest.raw, record)
            self._take((stored, *self._others(name)))
        await self._on_ours(name, manifest)

    async def _on_ours(self, name: ModelName, manifest: Manifest) -> None:
        """There is a record of ours of what ``name`` means."""
        self._first_seen.forget(name.key)
        self._first_seen.note(name.key, manifest.digest)
        await self.refresh()

    async def _try_record(self, name: ModelName, manifest: Manifest) -> Signed | None:
        try:
            return await self._record(name, manifest)
        except BlobNotFound:
            return None  # a map is missing: better a model without a record than none

    async def _record(self, name: ModelName, manifest: Manifest) -> Signed:
        maps: dict[Sha256, MapAddress] = {}
        for layer in manifest.blobs:
            known = await self._blobs.haves(layer.digest)
            if known is None:
                raise BlobNotFound(f"blob {layer.digest[:12]} of {name} is not in the store")
            maps[layer.digest] = map_address(encode_map(known[0]))
        now_s = self._unix_now()
        # The clock in milliseconds grows over restarts too, which a counter kept in memory would not.
        record = ModelRecord(name.full, manifest.digest, maps, self._signer.peer_id, int(now_s * 1000), int(now_s))
        return sign(MODEL_RECORD_DOMAIN, record, self._signer.peer_id, self._signer.sign)


@asynccontextmanager
async def open_catalog(catalog: CatalogService) -> AsyncIterator[CatalogService]:
    """The catalog with the store's models read, signing missing records in the background."""
    await catalog.refresh()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.run_signing)
        try:
            yield catalog
        finally:
            nursery.cancel_scope.cancel()
