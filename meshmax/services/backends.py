"""What engines of others bring along: looks at each of them now and then, and tells which models they have and where.

Rules: each backend is looked at by a task of its own, so that one that hangs holds up no other; one that says no is asked
again after a pause, the longer the more often it did; what it offered is withdrawn at once, but for one that is busy or
slow with the MISSES-th look. Nothing waits for a look, the start of the node least of
all. A model of the same digest in our own store is run by our own engine, where there is one. Not here: interfaces
(engine.ollama, engine.openai_compat), names (core.catalog), queues (services.residency).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import trio

from meshmax.base.catalog import BackendReport, LoadedView, ModelDescription, ModelFile, OfferedModel
from meshmax.base.errors import Busy, EngineUnavailable, MeshmaxError, ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.status import ModelPresence, Speed
from meshmax.ports import Backend
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

LOOK_S: Final = 5.0  # between looks at one that answers: what it has in memory is shown with this delay
LOOK_DEADLINE_S: Final = 20.0  # for a whole look, of several calls
MISSES: Final = 2  # looks at one that is busy or slow before its models are withdrawn
MAX_PAUSE_S: Final = 60.0  # between looks at one that is not there

_log = get_logger("backends")


class Backends:
    """Run by `open_backends`. The methods that ask a backend raise ModelNotFound, EngineError.

    ``problems``: why each backend offers nothing, '' where it does.
    """

    def __init__(
        self,
        backends: Sequence[Backend] = (),
        on_change: Callable[[], None] = lambda: None,
        runs_itself: Callable[[Sha256], bool] = lambda digest: False,
        unasked: str = "",
    ) -> None:
        """``runs_itself``: whether our own engine runs a model, from our store. ``on_change`` must be cheap.

        ``unasked``: name of the engine that is looked for though nobody asked for it: that it is not there is no news.
        """
        self._unasked = unasked
        self._backends = tuple(backends)
        self._runs_itself = runs_itself
        self._on_change = on_change
        self._offers: list[tuple[OfferedModel, ...]] = [() for _ in self._backends]
        self._met = [False for _ in self._backends]  # whether each has ever offered something
        self.problems: list[str] = ["" for _ in self._backends]
        self._wake = [trio.Event() for _ in self._backends]
        self._owners: dict[Sha256, Backend] = {}
        self._table: dict[Sha256, OfferedModel] = {}

    def __len__(self) -> int:
        """How many backends there may be."""
        return len(self._backends)

    # --- what there is -----------------------------------------------------------------------------------------------

    def offered(self) -> tuple[OfferedModel, ...]:
        """Every model that a backend brings, each name of it once, in the order of the backends."""
        named: dict[tuple[str, Sha256], OfferedModel] = {}
        for offers in self._offers:
            for offer in offers:
                named.setdefault((offer.name.lower(), offer.digest), offer)
        return tuple(named.values())

    def parallel(self) -> int:
        """Answers at once of all backends that offer something."""
        return sum(offers[0].parallel for offers in self._offers if offers)

    def reports(self) -> tuple[BackendReport, ...]:
        """How each backend stands; nothing of one that nobody asked for and that never was there."""
        return tuple(
            BackendReport(backend.name, len(offers), offers[0].origin if offers else "", problem)
            for backend, offers, problem, met in zip(
                self._backends, self._offers, self.problems, self._met, strict=True
            )
            if met or backend.name != self._unasked
        )

    def owners(self) -> Mapping[Sha256, Backend]:
        """Who runs which model."""
        return self._owners

    def brings(self, digest: Sha256) -> bool:
        """Whether a backend runs the model here: one offers it, and our own engine does not run it."""
        return digest in self._owners and not self._runs_itself(digest)

    def by_digest(self, digest: Sha256) -> OfferedModel | None:
        """A model that a backend brings, or None."""
        return self._table.get(digest)

    def model_file(self, digest: Sha256) -> ModelFile:
        """What its engine needs: no file. Raises ModelNotFound."""
        offer = self._table.get(digest)
        if offer is None:
            raise ModelNotFound(f"no model with digest {digest[:12]} is here")
        return ModelFile(digest, offer.name, "", offer.size, offer.details)

    def loaded(self) -> tuple[LoadedView, ...]:
        """What backends have in memory, as they said last."""
        return tuple(
            LoadedView(
                offer.name,
                offer.digest,
                offer.loaded.size,
                offer.loaded.size_vram,
                offer.loaded.context_length or offer.details.context_length,
                offer.device,
                offer.details,
                offer.loaded.expires_at_s,
                origin=offer.origin,
            )
            for offer in self._table.values()
            if offer.loaded is not None and not self._runs_itself(offer.digest)
        )

    # --- what is asked of them ---------------------------------------------------------------------------------------

    async def describe(self, digest: Sha256) -> ModelDescription:
        """What its engine says of a model."""
        return await self._owner(digest).describe(digest)

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """See ports.Backend; a model that is nobody's here is left alone."""
        backend = self._owners.get(digest)
        if backend is None or not self.brings(digest):
            await trio.lowlevel.checkpoint()
            return
        try:
            await backend.keep(digest, keep_alive_s)
        finally:
            self.look_at(digest)

    def look_at(self, digest: Sha256) -> None:
        """Look at the backend of a model soon: something has happened there."""
        backend = self._owners.get(digest)
        for place, one in enumerate(self._backends):
            if one is backend:
                self._wake[place].set()

    def _owner(self, digest: Sha256) -> Backend:
        backend = self._owners.get(digest)
        if backend is None:
            raise ModelNotFound(f"no model with digest {digest[:12]} is here")
        return backend

    # --- looking -----------------------------------------------------------------------------------------------------

    async def run_looks(self, place: int) -> NoReturn:
        """Look at one backend until cancelled."""
        misses = 0
        while True:
            # Before the look: what happens in the middle of one may be more than it has seen.
            self._wake[place] = trio.Event()
            error = await self._try_look(place)
            misses = misses + 1 if error else 0
            if error is not None and (misses >= MISSES or not isinstance(error, Busy)):
                self._take(place, ())
            pause_s = LOOK_S
            if error is not None:
                wanted_s = error.retry_after_s if isinstance(error, Busy) else 0.0
                pause_s = min(max(LOOK_S * 2 ** min(misses - 1, 10), wanted_s), MAX_PAUSE_S)
            with trio.move_on_after(pause_s):
                await self._wake[place].wait()
                await trio.sleep(LOOK_S / 10)  # what happened there takes a moment to be seen

    async def _try_look(self, place: int) -> MeshmaxError | None:
        """Look once; the error where it failed."""
        error: MeshmaxError | None = EngineUnavailable("its answers could not be read")

        async def look() -> None:
            nonlocal error
            try:
                with trio.fail_after(LOOK_DEADLINE_S):
                    found = await self._backends[place].look()
            except trio.TooSlowError:
                error = Busy(f"it did not answer within {LOOK_DEADLINE_S:g} s")
            except MeshmaxError as failure:
                error = failure
            else:
                error = None
                self._take(place, found)

        await isolate("backend", look)
        self._tell(place, error)
        return error

    def _tell(self, place: int, error: MeshmaxError | None) -> None:
        """One line in the log a change."""
        why = error.message if error else ""
        if why and why != self.problems[place]:
            name = self._backends[place].name
            level = _log.warning if self._offers[place] or name != self._unasked else _log.debug
            level("backend not there", engine=name, why=why)
        self.problems[place] = why

    def _take(self, place: int, found: tuple[OfferedModel, ...]) -> None:
        if found == self._offers[place]:
            return
        if bool(found) != bool(self._offers[place]):
            _log.info("backend", engine=self._backends[place].name, models=len(found))
        self._offers[place] = found
        self._met[place] = True
        owners: dict[Sha256, Backend] = {}
        table: dict[Sha256, OfferedModel] = {}
        for backend, offers in zip(self._backends, self._offers, strict=True):
            for offer in offers:
                if offer.digest not in owners or owners[offer.digest] is backend:
                    owners[offer.digest] = backend
                    table.setdefault(offer.digest, offer)
        self._owners, self._table = owners, table
        self._on_change()


@asynccontextmanager
async def open_backends(backends: Backends) -> AsyncIterator[Backends]:
    """Look at each of the backends for as long as the block lasts; nothing is known of them before."""
    async with trio.open_nursery() as nursery:
        for place in range(len(backends)):
            nursery.start_soon(backends.run_looks, place)
        yield backends
        nursery.cancel_scope.cancel()


def served_presence(offer: OfferedModel, names: Sequence[str], speed: Speed) -> ModelPresence:
    """What our status says of a model that an engine brings along. ``names``: full ones."""
    details = offer.details
    return ModelPresence(
        offer.digest,
        tuple(names),
        "loaded" if offer.loaded else "disk",
        offer.size,
        device=offer.device,
        family=details.family,
        parameter_size=details.parameter_size,
        quantization_level=details.quantization_level,
        context_length=details.context_length,
        embedding_length=details.embedding_length,
        capabilities=details.capabilities,
        modified_at_s=int(offer.modified_at_s),
        prefill_per_s=speed.prefill_per_s,
        decode_per_s=speed.decode_per_s,
        load_s=speed.load_s,
        engine=offer.engine,
        served=True,
    )
