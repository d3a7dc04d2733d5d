"""Keeps the store inside its budget: sweeps when a pull needs room, when one has ended, now and then, and on command.

One sweep at a time. What goes, and in which order, is core.sweep's; that another peer keeps a copy is asked with
services.leases for each model before it goes, and whether the model came into use meanwhile is looked at again in the same
breath in which it is dropped. A pull that does not fit even so waits as for a full disk. Not here: files (store), names
(services.catalog).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final, NoReturn

import msgspec
import trio

from meshmax.base.catalog import Listed
from meshmax.base.errors import MeshmaxError, NoProviders, Refused, StoreFull
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Layer, StoredModel
from meshmax.base.units import format_bytes
from meshmax.core.pins import Pins
from meshmax.core.sweep import Budget, Candidate, Copy, PartialCopy, Sweep, Verdict
from meshmax.core.uses import Uses
from meshmax.services.leases import Leases
from meshmax.store.usage import Usage
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import SWEPT

SWEEP_INTERVAL_S: Final = 300.0
RECENT_S: Final = 60.0  # a model used so lately is in use: whoever pulled it is about to ask it something
HELD_TIMEOUT_S: Final = 5.0  # for whoever works on a partial that is to go
USES_INTERVAL_S: Final = 10.0  # how often what is being sent is noted; shorter than it is shown as being sent
SAVE_INTERVAL_S: Final = 60.0  # how often last uses are written, if there are new ones
ASK_AGAIN_S: Final = 30.0  # until the same holders are asked again about a model that they did not vouch for
MAX_REFUSALS: Final = 1024  # remembered; there are not more models in a status

Held = Callable[[Sha256], AbstractAsyncContextManager[None]]
Holders = Callable[[Sha256], Mapping[PeerId, tuple[str, ...]]]  # peers that have a model whole -> their addresses
_log = get_logger("sweep")


class Report(msgspec.Struct, frozen=True):
    """How a sweep went. ``need``: bytes that had to go, ``lacking``: those that did not, ``freed``: those that did."""

    verdicts: tuple[Verdict, ...]
    budget: Budget
    used: int
    free: int
    need: int
    freed: int
    lacking: int
    dry_run: bool = False


class Ground(msgspec.Struct, frozen=True):
    """What a sweep looks at and does. ``in_use``: digests of models or blobs -> why they must stay."""

    local: Callable[[], Sequence[StoredModel]]
    listing: Callable[[], Awaitable[Sequence[Listed]]]
    usage: Callable[[], Awaitable[Usage]]
    holders: Holders
    in_use: Callable[[], Mapping[Sha256, str]]
    drop_model: Callable[[Sha256], Awaitable[None]]
    drop_partial: Callable[[Sha256], Awaitable[bool]]
    unix_now: Callable[[], float]


class Sweeper:
    """Made by `open_sweeper`."""

    def __init__(
        self,
        ground: Ground,
        leases: Leases,
        pins: Pins,
        uses: Uses,
        budget: Budget,
        *,
        partials_kept_s: float,
        last_copies: bool = False,
    ) -> None:
        self.budget = budget
        self.uses = uses
        self._ground, self._leases, self._pins = ground, leases, pins
        self._partials_kept_s = partials_kept_s
        self._last_copies = last_copies
        self._one = trio.Lock()
        self._admitted: dict[int, dict[Sha256, int]] = {}  # pulls that have their room -> blobs and sizes
        self._count = 0
        self._refusals: dict[Sha256, tuple[float, frozenset[PeerId], str]] = {}  # when, by whom, why
        self._woken = trio.Event()
        self._begun = trio.Event()  # pulls may ask for room before they are all there
        self._needed: Callable[[], frozenset[Sha256]] = frozenset
        self._held: Held = lambda digest: nullcontext()

    def begin(self, needed: Callable[[], frozenset[Sha256]], held: Held) -> None:
        """Sweep from now on; until then all wait. ``needed``: blobs that pulls need; ``held``: alone with a blob."""
        self._needed, self._held = needed, held
        self._begun.set()

    # --- for faces and other services --------------------------------------------------------------------------------

    async def sweep(self, *, free_bytes: int = 0, last_copies: bool = False, dry_run: bool = False) -> Report:
        """Sweep now: until the budget is kept and, in any case, ``free_bytes`` went. ``dry_run``: only tell what would go,
        as far as peers have what they say. Raises StoreError."""
        async with self._one:
            return await self._sweep(self._coming(), free_bytes, last_copies or self._last_copies, dry_run)

    @asynccontextmanager
    async def room(self, layers: Sequence[Layer]) -> AsyncIterator[None]:
        """While inside, a pull of ``layers`` has its room in the budget; others of their room, too.

        Raises StoreFull that says what is lacking when it does not fit whatever is swept.
        """
        blobs = {layer.digest: layer.size for layer in layers}
        self._count += 1
        key = self._count
        if self.budget.is_set:
            await self._make_room(blobs)
        self._admitted[key] = blobs
        try:
            yield
        finally:
            del self._admitted[key]

    def wake(self) -> None:
        """Something was stored: see soon whether it is too much. Cheap."""
        self._woken.set()

    async def run(self) -> NoReturn:
        """Sweep now and then, until cancelled."""
        while True:
            with trio.move_on_after(SWEEP_INTERVAL_S):
                await self._woken.wait()
            self._woken = trio.Event()
            await isolate("sweep", self.sweep)

    # --- one sweep ---------------------------------------------------------------------------------------------------

    async def _make_room(self, blobs: dict[Sha256, int]) -> None:
        async with self._one:
            report = await self._sweep(self._coming() | blobs, 0, self._last_copies, False)
        if report.lacking:
            limit = self.budget.limit_bytes
            rule = f"disk_budget is {format_bytes(limit)}" if limit is not None else ""
            keep = self.budget.keep_free_bytes
            rule += (" and " if rule and keep else "") + (f"keep_free is {format_bytes(keep)}" if keep else "")
            raise StoreFull(
                f"{format_bytes(report.lacking)} more are needed ({rule}) and nothing else may be swept:"
                " `meshmax sweep --dry-run` says why; unpin or remove a model, or raise the budget"
            )

    def _coming(self) -> dict[Sha256, int]:
        return {digest: size for blobs in self._admitted.values() for digest, size in blobs.items()}

    async def _sweep(self, coming: dict[Sha256, int], free_bytes: int, last_copies: bool, dry_run: bool) -> Report:
        await self._begun.wait()
        usage = await self._ground.usage()
        need = max(self.budget.excess(usage.used_bytes, usage.free_bytes, usage.coming(coming)), free_bytes)
        now_s = self._ground.unix_now()
        listed = await self._ground.listing()
        named = {digest for model in listed for digest, _ in model.blobs}
        # Nothing is awaited from here on until the first candidate is tried.
        needed = self._needed() | coming.keys()
        partials = [
            PartialCopy(one.digest, one.size, one.touched_s, _wanted(one.digest, needed, named))
            for one in usage.partials
        ]
        sweep = Sweep(
            self._copies(usage, needed, now_s), partials, need, now_s, self._partials_kept_s, last_copies=last_copies
        )
        while (candidate := sweep.next()) is not None:
            await self._try(sweep, *candidate, coming, dry_run)
        report = Report(
            sweep.verdicts(),
            self.budget,
            usage.used_bytes,
            usage.free_bytes,
            need,
            sweep.freed,
            sweep.lacking,
            dry_run,
        )
        if sweep.lacking and not dry_run:
            _log.info("nothing else may be swept", lacking=sweep.lacking, freed=sweep.freed)
        return report

    def _copies(self, usage: Usage, needed: frozenset[Sha256] | set[Sha256], now_s: float) -> list[Copy]:
        by_digest: dict[Sha256, list[StoredModel]] = {}
        for stored in self._ground.local():
            by_digest.setdefault(stored.manifest.digest, []).append(stored)
        in_use = self._ground.in_use()
        return [self._copy(models, usage, needed, in_use, now_s) for models in by_digest.values()]

    def _copy(
        self,
        models: list[StoredModel],
        usage: Usage,
        needed: frozenset[Sha256] | set[Sha256],
        in_use: Mapping[Sha256, str],
        now_s: float,
    ) -> Copy:
        manifest = models[0].manifest
        came_s = max(model.modified_at_s for model in models)
        last_s = self.uses.last_s(manifest.digest, came_s, now_s)
        kept = self._kept(models[0], needed, in_use)
        if not kept and 0 <= now_s - last_s < RECENT_S:
            kept = "it was used a moment ago"
        return Copy(
            manifest.digest,
            tuple(model.name for model in models),
            manifest.size,
            tuple((blob.digest, usage.blobs.get(blob.digest, 0)) for blob in manifest.blobs),
            last_s,
            kept,
            len(self._ground.holders(manifest.digest)),
        )

    def _kept(self, stored: StoredModel, needed: frozenset[Sha256] | set[Sha256], in_use: Mapping[Sha256, str]) -> str:
        """Why a model must stay whatever else, or ''."""
        manifest = stored.manifest
        if self._pins.keeps(manifest.digest):
            return "it is pinned"
        for digest in (manifest.digest, *(blob.digest for blob in manifest.blobs)):
            if digest in in_use:
                return in_use[digest]
        return "a pull needs its data" if any(blob.digest in needed for blob in manifest.blobs) else ""

    # --- one candidate -----------------------------------------------------------------------------------------------

    async def _try(
        self, sweep: Sweep, candidate: Candidate, confirm: bool, coming: dict[Sha256, int], dry_run: bool
    ) -> None:
        """Drop a candidate, or find out why it stays."""
        await trio.lowlevel.checkpoint()
        if dry_run:
            sweep.gone(candidate)
            return
        try:
            if isinstance(candidate, PartialCopy):
                await self._drop_partial(candidate, coming)
            else:
                await self._drop_copy(candidate, confirm, coming)
        except (Refused, _InUse) as error:
            sweep.refuse(candidate, error.message, for_good=True)
        except MeshmaxError as error:
            sweep.refuse(candidate, error.message)
        else:
            freed = sweep.gone(candidate)
            SWEPT.labels(what="model" if isinstance(candidate, Copy) else "partial").inc(freed)

    async def _drop_partial(self, partial: PartialCopy, coming: dict[Sha256, int]) -> None:
        with trio.move_on_after(HELD_TIMEOUT_S) as scope:
            async with self._held(partial.digest):
                if partial.digest in self._needed() | coming.keys():
                    raise _InUse("a pull needs it")
                if not await self._ground.drop_partial(partial.digest):
                    raise _InUse("it is being fetched")
        if scope.cancelled_caught:
            raise _InUse("it is being worked on")
        _log.info("swept a partial", blob=partial.digest[:12], bytes=partial.size)

    async def _drop_copy(self, copy: Copy, confirm: bool, coming: dict[Sha256, int]) -> None:
        stored = next((one for one in self._ground.local() if one.manifest.digest == copy.digest), None)
        if stored is None:
            raise _InUse("it has gone already")
        holders = self._ground.holders(copy.digest) if confirm else None
        if holders is not None and (reason := self._refused(copy.digest, holders)):
            raise NoProviders(reason)
        try:
            async with self._leases.open(stored.manifest, holders) as lease:
                if reason := self._kept(stored, self._needed() | coming.keys(), self._ground.in_use()):
                    raise _InUse(reason)
                if not lease.commit():
                    raise _InUse("another peer drops its copy and relies on this one")
                _log.info("sweeping", model=copy.names, digest=copy.digest[:12], leased_by=lease.holder or "nobody")
                with trio.CancelScope(shield=True):  # half a model is of no use to anybody; some milliseconds
                    await self._ground.drop_model(copy.digest)
        except NoProviders as error:
            self._remember_refusal(copy.digest, holders or {}, error.message)
            raise

    def _refused(self, digest: Sha256, holders: Mapping[PeerId, object]) -> str:
        """What these same holders said a moment ago, or ''."""
        since_s, peers, reason = self._refusals.get(digest, (-math.inf, frozenset(), ""))
        fresh = trio.current_time() - since_s < ASK_AGAIN_S
        return reason if fresh and not holders.keys() - peers else ""

    def _remember_refusal(self, digest: Sha256, holders: Mapping[PeerId, object], reason: str) -> None:
        self._refusals.pop(digest, None)
        while len(self._refusals) >= MAX_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        self._refusals[digest] = (trio.current_time(), frozenset(holders), reason)


class _InUse(MeshmaxError):
    """It came into use while it was to be swept."""


def _wanted(digest: Sha256, needed: frozenset[Sha256] | set[Sha256], named: set[Sha256]) -> str:
    """Who needs a partial, or ''."""
    if digest in needed:
        return "a pull needs it"
    return "a model that is here needs it: pull that again to repair it" if digest in named else ""


@asynccontextmanager
async def open_sweeper(
    sweeper: Sweeper,
    needed: Callable[[], frozenset[Sha256]],
    held: Held,
    watch_uses: Callable[[], None],
    save_uses: Callable[[dict[Sha256, float]], Awaitable[None]],
) -> AsyncIterator[Sweeper]:
    """The sweeper at work (see `Sweeper.begin`).

    ``watch_uses`` notes what is being used now, ``save_uses`` keeps it over restarts.
    """
    async with trio.open_nursery() as nursery:
        sweeper.begin(needed, held)
        nursery.start_soon(sweeper.run)
        nursery.start_soon(_run_uses, sweeper.uses, watch_uses, save_uses)
        try:
            yield sweeper
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):  # one small file; else a restart would forget the last minute
                await _save(sweeper.uses, save_uses)


async def _run_uses(
    uses: Uses, watch: Callable[[], None], save: Callable[[dict[Sha256, float]], Awaitable[None]]
) -> NoReturn:
    saved_s = trio.current_time()
    while True:
        await trio.sleep(USES_INTERVAL_S)
        watch()
        if trio.current_time() - saved_s >= SAVE_INTERVAL_S:
            saved_s = trio.current_time()
            await _save(uses, save)


async def _save(uses: Uses, save: Callable[[dict[Sha256, float]], Awaitable[None]]) -> None:
    if uses.changed:
        uses.changed = False
        uses.changed |= not await isolate("uses", lambda: save(uses.items()))
