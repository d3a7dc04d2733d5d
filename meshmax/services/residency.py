"""Models in this node's memory: does what core.residency decides, with one task per model, and measures its speed.

A model's task holds the engine's block open, so that closing the residency ends every engine process. Answers run in the
task of whoever asked; leaving an answer frees its slot and stops the engine's work. A model whose process has ended is
seen when its answers fail or at the next ask, which loads it anew. A request's num_ctx, num_gpu and num_thread count when
it is the one that loads the model (of our own requests: services.infer_server takes them out of peers'); a model that is
loaded already answers as it was loaded. How much memory there is was read when `look_at_memory` was called last: before each
load on a CPU, and when the figures of the GPUs were read. Not here: what may run where, what is preloaded (services.preload).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Final, Protocol

import msgspec
import trio

from meshmax.base.catalog import LoadedView, ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import Busy, EngineCrashed, EngineUnavailable, MeshmaxError, Refused
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import (
    Ask,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Options,
    Priority,
    is_load_only,
    merge_options,
)
from meshmax.base.status import NO_ENGINE, Load, Speed
from meshmax.core.fair_queue import FairQueue
from meshmax.core.memory import Reading
from meshmax.core.residency import (
    Action,
    Fail,
    ResidencyCore,
    ResidentView,
    Start,
    Unload,
    speed_after_answer,
    speed_after_load,
)
from meshmax.core.residency import Load as LoadModel
from meshmax.ports import Engine, LoadedModel
from meshmax.services.drain import Drain
from meshmax.services.model_memory import ModelMemory
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import QUEUE_WAIT, QUEUED, SHED

NO_ROOM: Final = "there is no room for it in memory now"
STOPPED_S: Final = 600.0  # a model that somebody unloaded is not preloaded again for so long
MAX_MEASURED: Final = 256  # models whose rates are remembered; the one measured longest ago is forgotten first

_log = get_logger("residency")


class _Waiter:
    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.settled = trio.Event()
        self.error: MeshmaxError | None = None
        self.model: LoadedModel | None = None


class _Held:
    """A model that is loading or loaded, with the scope of its task."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.leave = trio.Event()
        self.file: ModelFile | None = None
        self.model: LoadedModel | None = None


class Brought(Protocol):
    """The models that engines bring along (services.backends)."""

    def brings(self, digest: Sha256) -> bool:
        """Whether such an engine runs this model here."""
        ...

    def loaded(self) -> tuple[LoadedView, ...]:
        """What they have in memory."""
        ...

    def parallel(self) -> int:
        """How much they answer at once."""
        ...

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """Load and keep one so long, or unload it (0). Raises ModelNotFound, EngineError."""
        ...


class NothingBrought:
    """There are no such engines."""

    def brings(self, digest: Sha256) -> bool:
        """No."""
        return False

    def loaded(self) -> tuple[LoadedView, ...]:
        """Nothing."""
        return ()

    def parallel(self) -> int:
        """Nothing."""
        return 0

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """Nothing to do."""
        await trio.lowlevel.checkpoint()


class ModelResidency:
    """A Residency; made by `open_residency`."""

    def __init__(
        self,
        engine: Engine,
        model_file: Callable[[Sha256], Awaitable[ModelFile]],
        config: EngineConfig,
        nursery: trio.Nursery,
        on_change: Callable[[], None],
        wall: Callable[[], float],
        on_use: Callable[[Sha256], None] = lambda digest: None,
        drain: Drain | None = None,
        brought: Brought | None = None,
        memory: Callable[[], Reading] = Reading,
    ) -> None:
        self._engine = engine
        self._memory = ModelMemory(config, memory)
        self._brought = brought or NothingBrought()
        self._drain = drain or Drain()
        self._model_file, self._config, self._nursery = model_file, config, nursery
        self._on_change, self._on_use, self._wall = on_change, on_use, wall
        self._queue = FairQueue(config.max_queue, config.max_queue_per_member, config.max_wait_s)
        self._core = ResidencyCore(self._queue, config.max_loaded, self._brought.brings)
        self._waiters: dict[int, _Waiter] = {}
        self._held: dict[Sha256, _Held] = {}
        self._speeds: OrderedDict[Sha256, Speed] = OrderedDict()
        self._stopped: dict[Sha256, float] = {}  # when somebody wanted a model out of memory
        self._asks = 0
        self._closed = False
        self._changed, self._due_s = trio.Event(), -math.inf  # due: when the core is told of time
        self.look_at_memory()

    @asynccontextmanager
    async def open_answer(self, ask: Ask, requester: PeerId | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """Load if needed, wait for a slot, answer. A load-only request yields one Finish ("load" or "unload").

        ``requester``: the member that asks, None for ourselves: whose turn it is, and how many wait, is counted for each.
        Raises ModelNotFound, Busy, EngineError; Draining while this node is taken out of service; Refused (a member's unload).
        """
        if self._closed:
            raise EngineUnavailable("this peer is shutting down")
        if is_load_only(ask.request) and ask.keep_alive_s == 0:  # unloading is no work, and welcome at any time
            async with self._open_answer(ask, requester) as events:
                yield events
            return
        with self._drain.admit() as has_begun:
            async with self._open_answer(ask, requester) as events:
                has_begun()
                yield events

    @asynccontextmanager
    async def _open_answer(self, ask: Ask, requester: PeerId | None) -> AsyncIterator[AsyncIterator[Event]]:
        begun = trio.current_time()
        load_only = is_load_only(ask.request)
        usual_s = self._config.keep_alive_s
        keep_alive_s = self._core.keep_alive_s(ask.digest, usual_s, ask.keep_alive_s, ours=requester is None)
        asked_s = ask.keep_alive_s if requester is None else None
        if load_only and ask.keep_alive_s == 0:
            if requester is not None:
                raise Refused("what a peer has in memory is its own to unload: run `meshmax stop` there")
            await self.unload(ask.digest)
            await self._brought.keep(ask.digest, 0)
            async with aclosing(_one(Finish("unload"))) as events:
                yield events
            return
        self._notice_crash(ask.digest)
        await self._learn_need(ask)
        async with self._turn(ask, requester, keep_alive_s) as (model, waited_for_load):
            load_s = trio.current_time() - begun if waited_for_load else 0.0
            self._on_use(ask.digest)
            if self._brought.brings(ask.digest) and (load_only or asked_s):
                await self._brought.keep(ask.digest, asked_s)
                load_s = trio.current_time() - begun
            if load_only:
                async with aclosing(_one(Finish("load", total_s=load_s, load_s=load_s))) as events:
                    yield events
                return
            async with model.answer(ask.request) as answer:
                async with aclosing(self._measured(ask.digest, answer, begun, load_s)) as events:
                    yield events
            if self._brought.brings(ask.digest) and asked_s == 0:
                await self._brought.keep(ask.digest, 0)

    async def try_preload(self, digest: Sha256, name: str, keep_alive_s: float) -> bool:
        """Load a model that nobody has asked for, where there is room with nothing going for it: whether it was loaded.

        Raises ModelNotFound, EngineError; Draining.
        """
        ask = Ask("preload", digest, name, GenerateRequest(), keep_alive_s, "batch")
        stopped_s = trio.current_time() - self._stopped.get(digest, -math.inf)
        if self._closed or digest in self._held or self._brought.brings(digest) or stopped_s < STOPPED_S:
            await trio.lowlevel.checkpoint()
            return False
        with self._drain.admit() as has_begun:
            await self._learn_need(ask)
            try:
                async with self._turn(ask, None, keep_alive_s, ahead=True):
                    has_begun()
            except Busy:
                return False
        return True

    async def _learn_need(self, ask: Ask) -> None:
        """Find out what a model takes that may have to be loaded. Raises ModelNotFound, StoreError, EngineUnavailable."""
        if ask.digest in self._held or self._queue.waiting(ask.digest) or self._brought.brings(ask.digest):
            return
        file = await self._model_file(ask.digest)
        file = msgspec.structs.replace(file, parameters=_load_options(file, ask.request))
        self._core.on_need(ask.digest, self._memory.need(file))
        if not self._memory.is_of_gpus:
            self.look_at_memory()

    @asynccontextmanager
    async def _turn(
        self, ask: Ask, requester: PeerId | None, keep_alive_s: float, *, ahead: bool = False
    ) -> AsyncIterator[tuple[LoadedModel, bool]]:
        """A slot of the ask's model, and whether we waited for its load. Leaving gives it back, and notices a crash.

        ``ahead``: only load it, in free room. Raises Busy.
        """
        number = self._asks = self._asks + 1
        waiter = self._waiters[number] = _Waiter(ask)
        held = self._held.get(ask.digest)
        ready = held is not None and held.model is not None and not held.leave.is_set()
        begun = trio.current_time()
        try:
            self._do(self._preload(number, ask) if ahead else self._ask(number, ask, requester, keep_alive_s))
            await waiter.settled.wait()
            QUEUE_WAIT.labels(priority=ask.priority).observe(trio.current_time() - begun)
            self._count(ask.priority)
            if waiter.error:
                raise waiter.error
            if waiter.model is None:
                raise EngineCrashed
            yield waiter.model, not ready
        finally:
            del self._waiters[number]
            self._notice_crash(ask.digest)
            self._do(self._core.on_end(number, trio.current_time()))
            self._count(ask.priority)

    def _ask(self, number: int, ask: Ask, requester: PeerId | None, keep_alive_s: float) -> list[Action]:
        try:
            return self._core.on_ask(
                number,
                ask.digest,
                keep_alive_s,
                trio.current_time(),
                takes_slot=not is_load_only(ask.request),
                requester=requester,
                priority=ask.priority,
            )
        except Busy:
            SHED.labels(where="queue", priority=ask.priority).inc()
            raise
        finally:
            self._count(ask.priority)

    def _preload(self, number: int, ask: Ask) -> list[Action]:
        actions = self._core.on_preload(number, ask.digest, ask.keep_alive_s or 0.0, trio.current_time())
        if actions is None:
            raise Busy(NO_ROOM)
        return actions

    def _count(self, priority: Priority) -> None:
        QUEUED.labels(priority=priority).set(self._queue.waiting_of(priority))

    def close(self) -> None:
        """Take no ask any more: peers' streams outlive the nursery that models run in by a moment."""
        self._closed = True

    def loaded(self) -> tuple[LoadedView, ...]:
        """Models in memory, longest remaining first."""
        offset_s = self._wall() - trio.current_time()
        views: list[LoadedView] = []
        asks: dict[Sha256, ResidentView] = {}
        for resident in self._core.snapshot():
            held = self._held.get(resident.digest)
            if held is None or held.file is None or held.model is None or not held.model.alive:
                continue
            if self._brought.brings(resident.digest):
                asks[resident.digest] = resident
                continue
            facts, speed = held.model.facts, self.speed(resident.digest)
            views.append(
                LoadedView(
                    name=held.file.name,
                    digest=resident.digest,
                    size=facts.size,
                    size_vram=facts.size_vram,
                    context_length=facts.context_length,
                    device=facts.device,
                    details=held.file.details,
                    expires_at_s=None if resident.expires_at == math.inf else resident.expires_at + offset_s,
                    running=resident.running,
                    queued=resident.queued,
                    prefill_per_s=speed.prefill_per_s,
                    decode_per_s=speed.decode_per_s,
                    load_s=speed.load_s,
                )
            )
        return (*views, *(self._asked(view, asks.get(view.digest)) for view in self._brought.loaded()))

    def _asked(self, view: LoadedView, asks: ResidentView | None) -> LoadedView:
        """What an engine of another's has in memory, with the asks that it has from here."""
        speed = self.speed(view.digest)
        return msgspec.structs.replace(
            view,
            running=asks.running if asks else 0,
            queued=asks.queued if asks else 0,
            prefill_per_s=speed.prefill_per_s,
            decode_per_s=speed.decode_per_s,
            load_s=speed.load_s,
        )

    def look_at_memory(self) -> None:
        """See how much there is for models now: call it when figures of the GPUs have been read. Cheap."""
        self._do(self._core.on_room(self._memory.room(self._core.needs()), trio.current_time()))

    def held(self) -> frozenset[Sha256]:
        """The models that are in memory, on their way there, or leaving it."""
        return frozenset(self._held)

    def load(self) -> Load:
        """Prompts running and queued now; the capacity of one model, loaded or not, and of engines that bring theirs."""
        brought = self._brought.parallel()
        own = 0 if brought and self._engine.name == NO_ENGINE else self._config.parallel
        return Load(self._core.running, self._core.queued, own + brought, self._config.max_queue)

    def speed(self, digest: Sha256) -> Speed:
        """What was measured of a model since this node started, loaded now or not."""
        return self._speeds.get(digest, Speed())

    async def unload(self, digest: Sha256) -> None:
        """Unload when its running answers have ended; does not wait for them. No error if it is not loaded."""
        await trio.lowlevel.checkpoint()
        self._stopped[digest] = trio.current_time()
        if len(self._stopped) > MAX_MEASURED:
            del self._stopped[min(self._stopped, key=self._stopped.__getitem__)]
        self._do(self._core.on_unload(digest, trio.current_time()))

    async def run_expiry(self) -> None:
        """Unload what nobody used for its keep-alive, until cancelled."""
        while True:
            self._changed, self._due_s = trio.Event(), self._core.deadline()
            with trio.move_on_at(self._due_s):
                await self._changed.wait()
            self._do(self._core.tick(trio.current_time()))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, LoadModel):
                held = self._held[action.digest] = _Held()
                first = next(w.ask for w in self._waiters.values() if w.ask.digest == action.digest)
                self._nursery.start_soon(self._run_model, action.digest, held, first.request)
            elif isinstance(action, Unload):
                self._leave(self._held[action.digest])
            elif isinstance(action, Start):
                waiter = self._waiters[action.ask]
                waiter.model = self._held[waiter.ask.digest].model
                waiter.settled.set()
        if self._core.deadline() < self._due_s:  # one that moved on is seen when the earlier one is due
            self._changed.set()
        self._on_change()

    def _leave(self, held: _Held) -> None:
        held.leave.set()
        if held.model is None:
            held.scope.cancel()

    def _notice_crash(self, digest: Sha256) -> None:
        held = self._held.get(digest)
        if held and held.model and not held.model.alive and not held.leave.is_set():
            _log.warning("engine crashed", digest=digest[:12])
            self._do(self._core.on_crashed(digest, trio.current_time()))

    async def _run_model(self, digest: Sha256, held: _Held, request: InferRequest) -> None:
        try:
            with held.scope:
                await self._hold_model(digest, held, request)
        except MeshmaxError as error:
            if held.model is None:
                self._fail(digest, error)
                return
            _log.warning("engine ended badly", digest=digest[:12], error=error.message)
        del self._held[digest]
        self._do(self._core.on_unloaded(digest, trio.current_time()))

    async def _hold_model(self, digest: Sha256, held: _Held, request: InferRequest) -> None:
        begun = trio.current_time()
        file = await self._model_file(digest)
        held.file = msgspec.structs.replace(file, parameters=_load_options(file, request))
        # The deadline ends with the load: the block below stays open for as long as the model is in memory.
        with trio.CancelScope(deadline=begun + self._config.load_timeout_s) as loading:
            async with self._engine.open_model(held.file) as model:
                loading.deadline = math.inf
                held.model = model
                took_s = trio.current_time() - begun
                self._remember(digest, speed_after_load(self.speed(digest), took_s))
                _log.info("loaded", model=held.file.name, digest=digest[:12], seconds=round(took_s, 3))
                need = self._memory.on_loaded(held.file, model.facts)
                self._do(self._core.on_loaded(digest, model.facts.parallel, trio.current_time(), need))
                await held.leave.wait()
        if loading.cancelled_caught:
            raise EngineUnavailable(f"the model did not load within {self._config.load_timeout_s:g} s")

    def _fail(self, digest: Sha256, error: MeshmaxError) -> None:
        _log.warning("not loaded", digest=digest[:12], code=error.code, error=error.message)
        del self._held[digest]
        actions = self._core.on_load_failed(digest, trio.current_time())
        for action in actions:
            if isinstance(action, Fail):
                self._waiters[action.ask].error = error
                self._waiters[action.ask].settled.set()
        self._do(actions)

    async def _measured(
        self, digest: Sha256, answer: AsyncIterator[Event], begun: float, load_s: float
    ) -> AsyncGenerator[Event, None]:
        async for event in answer:
            if isinstance(event, Finish):
                self._remember(digest, speed_after_answer(self.speed(digest), event))
                # An engine that brings its models along loads them by itself, and tells how long that took.
                load_s += event.load_s
                event = msgspec.structs.replace(event, load_s=load_s, total_s=trio.current_time() - begun)
            yield event

    def _remember(self, digest: Sha256, speed: Speed) -> None:
        self._speeds[digest] = speed
        self._speeds.move_to_end(digest)
        if len(self._speeds) > MAX_MEASURED:
            self._speeds.popitem(last=False)


def _load_options(file: ModelFile, request: InferRequest) -> Options:
    asked = request.options
    loading = Options(num_ctx=asked.num_ctx, num_gpu=asked.num_gpu, num_thread=asked.num_thread or None)
    return merge_options(loading, file.parameters)


async def _one(event: Event) -> AsyncGenerator[Event, None]:
    await trio.lowlevel.checkpoint()
    yield event


@asynccontextmanager
async def open_residency(
    engine: Engine,
    model_file: Callable[[Sha256], Awaitable[ModelFile]],
    config: EngineConfig,
    wall: Callable[[], float] = time.time,
    *,
    on_change: Callable[[], None] = lambda: None,
    on_use: Callable[[Sha256], None] = lambda digest: None,
    drain: Drain | None = None,
    brought: Brought | None = None,
    memory: Callable[[], Reading] = Reading,
) -> AsyncIterator[ModelResidency]:
    """The residency of one node; leaving unloads everything.

    ``model_file`` finds a model on disk (raises ModelNotFound, StoreError). ``on_change`` is called, often, when models or
    load changed; it must be cheap; so must ``on_use``, called when a model begins to answer. ``wall`` tells Unix time.
    ``drain``: whether asks are taken; None: always. ``brought``: models that engines bring along; None: none. ``memory``: the
    machine's, as of now; must be cheap. Raises ConfigError.
    """
    async with trio.open_nursery() as nursery:
        residency = ModelResidency(engine, model_file, config, nursery, on_change, wall, on_use, drain, brought, memory)
        nursery.start_soon(residency.run_expiry)
        try:
            yield residency
        finally:
            residency.close()
            nursery.cancel_scope.cancel()
