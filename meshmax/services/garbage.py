"""Pins, last uses, leases and the sweeper of one node, put together. For meshmax.node.

`Kept` is read before anything else, since names and the store heed pins; the sweeper is made before pulls, which ask it for
room, and begins when they are open. Not here: what each part decides (core.pins, core.uses, core.lease, core.sweep).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from meshmax.base.config import Config
from meshmax.base.ids import PeerId, Sha256
from meshmax.core.pins import Pins
from meshmax.core.sweep import parse_budget
from meshmax.core.uses import Uses
from meshmax.ports import Presence, RunSync, Swarm
from meshmax.services.catalog import CatalogService
from meshmax.services.leases import Leases
from meshmax.services.outflow import Outflow
from meshmax.services.pins import Pinning
from meshmax.services.residency import ModelResidency
from meshmax.services.sweep import Ground, Sweeper, open_sweeper
from meshmax.store import Store
from meshmax.store.sweep_files import load_pins, load_uses, save_pins, save_uses
from meshmax.store.usage import Usage, read_usage

_DAY_S: Final = 86400.0


class Kept:
    """What is kept in the home ``home``. Raises ConfigError if pins cannot be read; blocks briefly."""

    def __init__(self, home: Path, unix_now: Callable[[], float]) -> None:
        self.home = home
        self.pins = Pins(load_pins(home))
        self.uses = Uses(load_uses(home))
        self._unix_now = unix_now

    def used(self, digest: Sha256) -> None:
        """A model of ours is being used."""
        self.uses.note(digest, self._unix_now())


class Parts(Protocol):
    """What sweeping needs of a node."""

    config: Config
    swarm: Swarm
    store: Store
    catalog: CatalogService
    residency: ModelResidency

    @property
    def presence(self) -> Presence:
        """Who is there."""
        ...

    def now(self) -> float:
        """Unix time in seconds."""
        ...


class NeedsBlobs(Protocol):
    """Pulls, as far as sweeping heeds them."""

    def needed(self) -> frozenset[Sha256]:
        """Blobs that pulls need."""
        ...

    def held(self, digest: Sha256) -> AbstractAsyncContextManager[None]:
        """Alone with a blob."""
        ...


class Garbage:
    """The parts, made; `open` sets them to work. ``node``'s presence and pulls are looked up late."""

    def __init__(self, node: Parts, kept: Kept, outflow: Outflow, run_sync: RunSync) -> None:
        self._node, self._kept, self._outflow, self._run_sync = node, kept, outflow, run_sync
        node.store.models.guard = kept.pins.require_free
        self.leases = Leases(node.swarm, node.store.blobs, node.catalog.local)
        self.leases.register()
        self.pinning = Pinning(kept.pins, node.catalog, self._save_pins)
        self.sweeper = Sweeper(
            self._ground(),
            self.leases,
            kept.pins,
            kept.uses,
            parse_budget(node.config.disk_budget, node.config.keep_free),
            partials_kept_s=node.config.partials_kept_days * _DAY_S,
            last_copies=node.config.sweep_last_copies,
        )

    @asynccontextmanager
    async def open(self, pulls: NeedsBlobs) -> AsyncIterator[None]:
        """Sweep until the block is left."""
        async with open_sweeper(self.sweeper, pulls.needed, pulls.held, self._watch_uses, self._save_uses):
            yield

    def _ground(self) -> Ground:
        node, store = self._node, self._node.store
        return Ground(
            node.catalog.local,
            store.models.listing,
            self._usage,
            self._holders,
            self._in_use,
            node.catalog.drop,
            store.blobs.drop_partial,
            node.now,
        )

    async def _usage(self) -> Usage:
        return await self._run_sync(partial(read_usage, self._node.store.blobs.layout))

    def _holders(self, digest: Sha256) -> Mapping[PeerId, tuple[str, ...]]:
        # A peer that drains is asked last: it may be about to leave.
        views = sorted(self._node.presence.peers(), key=lambda view: view.state == "draining")
        return {
            view.peer_id: view.status.addresses
            for view in views
            if view.status and view.state in ("online", "draining")
            if any(model.digest == digest and model.is_copy for model in view.status.models)
        }

    def _in_use(self) -> Mapping[Sha256, str]:
        sending = dict.fromkeys(self._outflow.sending(), "it is being sent to a peer")
        return sending | dict.fromkeys(self._node.residency.held(), "it is loaded")

    def _watch_uses(self) -> None:
        sending = self._outflow.sending()
        for stored in self._node.catalog.local() if sending else ():
            if any(blob.digest in sending for blob in stored.manifest.blobs):
                self._kept.used(stored.manifest.digest)

    async def _save_pins(self, pins: Mapping[str, Sha256]) -> None:
        await self._run_sync(partial(save_pins, self._kept.home, pins))

    async def _save_uses(self, uses: dict[Sha256, float]) -> None:
        await self._run_sync(partial(save_uses, self._kept.home, uses))
