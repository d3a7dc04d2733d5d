"""Listing what a peer, or its mesh, has: names, manifests, whole blobs, and the chunks of partial ones.

Of other peers only what they tell in their status is known, names and manifests; the blobs of those models are asked of a
holder, and one that does not answer costs the list that model's blobs, which the manifest's digest stands for. Not here:
the list's form (wire.have).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from meshmax.base.catalog import CatalogEntry
from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Manifest
from meshmax.ports import BlobStore
from meshmax.wire.have import MAX_LISTED, MAX_PARTIALS, HaveList, HaveModel, HavePartial

MAX_ASKS: Final = 8  # holders asked at once
ASK_TIMEOUT_S: Final = 10.0

ListBlobs = Callable[[], Awaitable[tuple[list[Sha256], list[Sha256]]]]  # whole ones, partial ones
AskManifest = Callable[[PeerId, Sha256], Awaitable[Manifest]]


class HaveLister:
    """Makes the lists of one peer."""

    def __init__(
        self,
        peer_id: PeerId,
        entries: Callable[[], tuple[CatalogEntry, ...]],
        blobs: BlobStore,
        list_blobs: ListBlobs,
        ask_manifest: AskManifest,
        unix_now: Callable[[], float],
    ) -> None:
        self._peer_id, self._entries, self._blobs = peer_id, entries, blobs
        self._list_blobs, self._ask_manifest, self._unix_now = list_blobs, ask_manifest, unix_now

    async def run(self, mesh: bool) -> HaveList:
        """What this peer has, or with ``mesh`` what it and every peer that is online have. Raises StoreError."""
        whole, parts = await self._list_blobs()
        entries = [entry for entry in self._entries() if entry.local or (mesh and entry.holders)][:MAX_LISTED]
        digests = dict.fromkeys(whole)
        if mesh:
            digests |= dict.fromkeys(await self._remote_blobs(entry for entry in entries if not entry.local))
        partials = [await self._partial(digest) for digest in parts[:MAX_PARTIALS] if digest not in digests]
        return HaveList(
            1,
            self._peer_id,
            int(self._unix_now()),
            mesh,
            tuple(HaveModel(entry.name, entry.digest) for entry in entries),
            tuple(list(digests)[:MAX_LISTED]),
            tuple(one for one in partials if one is not None),
        )

    async def _partial(self, digest: Sha256) -> HavePartial | None:
        known = await self._blobs.haves(digest)
        return HavePartial(digest, known[1].count, known[1].bits) if known and known[1].total else None

    async def _remote_blobs(self, entries: Iterable[CatalogEntry]) -> list[Sha256]:
        found: dict[Sha256, None] = {}
        places = trio.CapacityLimiter(MAX_ASKS)
        async with trio.open_nursery() as nursery:
            for entry in {entry.digest: entry for entry in entries}.values():
                nursery.start_soon(self._ask, entry, found, places)
        return list(found)

    async def _ask(self, entry: CatalogEntry, found: dict[Sha256, None], places: trio.CapacityLimiter) -> None:
        async with places:
            for holder in entry.holders[:2]:
                with trio.move_on_after(ASK_TIMEOUT_S):
                    try:
                        manifest = await self._ask_manifest(holder, entry.digest)
                    except MeshmaxError:
                        continue  # the manifest's digest is in the list all the same
                    found |= dict.fromkeys(blob.digest for blob in manifest.blobs)
                    return
