"""Who uses a model in this node's memory, and when: does what core.residency decides, for each ask.

Answers run in the task of whoever asked; leaving an answer frees its slot and stops the engine's work. A model whose
process has ended is seen when its answers fail or at the next ask, which loads it anew; so is one whose engine brought it along
and is gone, or of which there is a file by now that our own engine runs. A request's num_ctx counts at any time:
a model that is loaded with less is loaded anew (core.context says when), and so it is, once, for a prompt that is too long for
what is loaded and names no num_ctx. Its num_gpu and num_thread count when it is the one that loads the model (of our own
requests: services.infer_server takes them out of peers'). How much memory there is was read when `look_at_memory` was
called last: before each load on a CPU, and when the figures of the GPUs were read, never in the middle of a load. Not here: the
models themselves and their tasks (services.held_models), their speeds (services.model_speeds), what may run where,
what is preloaded (services.preload).
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import cache
from typing import Final

import msgspec
import trio

from meshmax.base.catalog import LoadedView, ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import (
    Busy,
    ContextTooLong,
    EngineCrashed,
    EngineUnavailable,
    InvalidRequest,
    MeshmaxError,
    Refused,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, Event, Finish, GenerateRequest, Priority, is_load_only
from meshmax.base.status import NO_ENGINE, Device, Load, Speed
from meshmax.core.context import Wish
from meshmax.core.fair_queue import FairQueue
from meshmax.core.memory import Need, Reading
from meshmax.core.residency import Action, Fail, ResidencyCore, ResidentView, Start, Unload
from meshmax.core.residency import Load as LoadModel
from meshmax.ports import Engine, LoadedModel
from meshmax.services.brought import Brought, NothingBrought
from meshmax.services.drain import Drain
from meshmax.services.held_models import HeldModel, HeldModels
from meshmax.services.model_memory import ModelMemory
from meshmax.services.model_speeds import ModelSpeeds
from meshmax.services.slot_words import SlotWords
from meshmax.services.wanted_context import WantedContexts
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import QUEUE_WAIT, QUEUED, SHED

NO_ROOM: Final = "there is no room for it in memory now"
STOPPED_S: Final = 600.0  # a model that somebody unloaded is not preloaded again for so long
MAX_STOPPED: Final = 256  # of those that are remembered; the one unloaded longest ago is forgotten first

_log = get_logger("residency")
_queue_wait, _queued = cache(QUEUE_WAIT.labels), cache(QUEUED.labels)


class _Waiter:
    def __init__(self, ask: Ask, ahead: bool = False) -> None:
        self.ask, self.ahead = ask, ahead
        self.settled = trio.Event()
        self.error: MeshmaxError | None = None
        self.model: LoadedModel | None = None


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
        self._memory = ModelMemory(config, memory)
        self._brought = brought or NothingBrought()
        self._drain = drain or Drain()
        self._engine_name, self._model_file, self._config = engine.name, model_file, config
        self._on_change, self._on_use, self._wall = on_change, on_use, wall
        self._queue = FairQueue(config.max_queue, config.max_queue_per_member, config.max_wait_s)
        self._core = ResidencyCore(self._queue, config.max_loaded, self._brought.brings)
        self._waiters: dict[int, _Waiter] = {}
        self._speeds = ModelSpeeds()
        self._held = HeldModels(engine, model_file, config, self._memory, self._speeds, nursery, self)
        self._contexts = WantedContexts(model_file, config, self._memory, self._core, self._held, self._brought.brings)
        self._stopped: dict[Sha256, float] = {}  # when somebody wanted a model out of memory
        self._words = SlotWords(self._core.snapshot)
        self._queued: dict[Priority, int] = {"interactive": -1, "batch": -1}  # how many wait, as was told last
        self._asks = 0
        self.moves = 0  # of models into memory and out of it
        self._closed = False
        self._changed, self._due_s = trio.Event(), -math.inf  # due: when the core is told of time
        self.look_at_memory()

    def open_answer(
        self, ask: Ask, requester: PeerId | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Load if needed, wait for a slot, answer. A load-only request yields one Finish ("load" or "unload").

        ``requester``: the member that asks, None for ourselves: whose turn it is, and how many wait, is counted for each.
        Raises ModelNotFound, Busy, EngineError; Draining while this node is taken out of service; Refused (a member's unload).
        """
        if is_load_only(ask.request) and ask.keep_alive_s == 0:
            return self._open_unloaded(ask, requester)
        return self._open_answer(ask, requester)

    @asynccontextmanager
    async def _open_unloaded(self, ask: Ask, requester: PeerId | None) -> AsyncIterator[AsyncIterator[Event]]:
        """To unload is no work, and welcome at any time."""
        self._refuse_closed()
        if requester is not None:
            raise Refused("what a peer has in memory is its own to unload: run `meshmax stop` there")
        await self.unload(ask.digest)
        await self._brought.keep(ask.digest, 0)
        async with aclosing(_one(Finish("unload"))) as events:
            yield events

    @asynccontextmanager
    async def _open_answer(self, ask: Ask, requester: PeerId | None) -> AsyncIterator[AsyncIterator[Event]]:
        self._refuse_closed()
        begun = trio.current_time()
        with self._drain.admit() as has_begun:
            self._notice_crash(ask.digest)
            await self._learn(ask)
            async with AsyncExitStack() as stack:
                try:
                    events = await stack.enter_async_context(self._open_turn(ask, requester, begun))
                except ContextTooLong as error:
                    wish = self._contexts.grown(ask, error.prompt_tokens)
                    if wish is None:
                        raise
                    events = await stack.enter_async_context(self._open_turn(ask, requester, begun, wish))
                has_begun()
                yield events

    @asynccontextmanager
    async def _open_turn(
        self, ask: Ask, requester: PeerId | None, begun: float, wish: Wish | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        load_only, asked_s = is_load_only(ask.request), ask.keep_alive_s if requester is None else None
        brings = self._brought.brings(ask.digest)
        async with self._turn(ask, requester, self._keep_alive_s(ask, requester), wish=wish) as (model, waited_load_s):
            load_s = trio.current_time() - begun if waited_load_s is None else waited_load_s
            self._on_use(ask.digest)
            if brings and (load_only or asked_s):
                await self._brought.keep(ask.digest, asked_s)
                load_s = trio.current_time() - begun
            if load_only:
                async with aclosing(_one(Finish("load", total_s=load_s, load_s=load_s))) as events:
                    yield events
                return
            async with model.answer(ask.request) as answer:
                with self._words.watched(ask) as on_event:
                    async with aclosing(self._measured(ask, answer, on_event, begun, load_s)) as events:
                        yield events
            if brings and asked_s == 0:
                with suppress(InvalidRequest):  # it cannot be unloaded, and the answer is whole all the same
                    await self._brought.keep(ask.digest, 0)

    async def _measured(
        self, ask: Ask, answer: AsyncIterator[Event], on_event: Callable[[Event], None], begun: float, load_s: float
    ) -> AsyncGenerator[Event, None]:
        """``answer``, each event told to ``on_event``, its Finish with the times that it took here."""
        async for event in answer:
            on_event(event)
            yield self._speeds.measured(ask.digest, event, begun, load_s) if isinstance(event, Finish) else event

    def _keep_alive_s(self, ask: Ask, requester: PeerId | None) -> float:
        usual_s = self._config.keep_alive_s
        return self._core.keep_alive_s(ask.digest, usual_s, ask.keep_alive_s, ours=requester is None)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EngineUnavailable("this peer is shutting down")

    async def try_preload(self, digest: Sha256, name: str, keep_alive_s: float) -> bool:
        """Load a model that nobody has asked for, where there is room with nothing going for it: whether it was loaded.

        Raises ModelNotFound, EngineError; Draining.
        """
        ask = Ask("preload", digest, name, GenerateRequest(), keep_alive_s, "batch")
        self._notice_crash(digest)
        if self._closed or self._held.get(digest) or self._brought.brings(digest) or self._was_stopped(digest):
            await trio.lowlevel.checkpoint()
            return False
        with self._drain.admit() as has_begun:
            await self._learn(ask)
            if self._was_stopped(digest):
                return False
            try:
                async with self._turn(ask, None, keep_alive_s, ahead=True):
                    has_begun()
            except Busy:
                return False
        return True

    def _was_stopped(self, digest: Sha256) -> bool:
        return trio.current_time() - self._stopped.get(digest, -math.inf) < STOPPED_S

    async def _learn(self, ask: Ask) -> None:
        """Find out what a model takes that may have to be loaded. Raises ModelNotFound, StoreError, EngineUnavailable."""
        if self._brought.brings(ask.digest):
            return
        anew = await self._contexts.learn(ask.digest, waiting=self._queue.waiting(ask.digest) > 0)
        if (anew or not self._contexts.is_met(ask)) and not self._memory.is_of_gpus:
            self.look_at_memory()

    @asynccontextmanager
    async def _turn(
        self, ask: Ask, requester: PeerId | None, keep_alive_s: float, *, ahead: bool = False, wish: Wish | None = None
    ) -> AsyncIterator[tuple[LoadedModel, float | None]]:
        """A slot of the ask's model, and how long we waited for its load (None: all the time). Leaving gives it back, and
        notices a crash.

        ``ahead``: only load it, in free room. ``wish``: for its context, None: what the ask says. Raises Busy.
        """
        self._refuse_closed()  # again: something was waited for, and the models' nursery may be gone by now
        number = self._asks = self._asks + 1
        waiter = self._waiters[number] = _Waiter(ask, ahead)
        held = self._held.get(ask.digest)
        ready = held if held is not None and held.ready else None
        begun = trio.current_time()
        try:
            if wish is None:
                wish = self._contexts.of(ask, ours=requester is None)
            self._do(
                self._preload(number, ask, wish) if ahead else self._ask(number, ask, requester, keep_alive_s, wish)
            )
            if not waiter.settled.is_set():  # one that need not wait begins at once
                await waiter.settled.wait()
            _queue_wait(priority=ask.priority).observe(trio.current_time() - begun)
            if waiter.error:
                raise waiter.error
            if waiter.model is None:
                raise EngineCrashed
            yield waiter.model, None if ready is None else self._reloaded_s(ask.digest, ready)
        except (EngineCrashed, EngineUnavailable):
            self._on_broken(ask.digest, waiter)
            raise
        finally:
            del self._waiters[number]
            self._notice_crash(ask.digest)
            self._do(self._core.on_end(number, trio.current_time()))

    def _reloaded_s(self, digest: Sha256, before: HeldModel) -> float:
        """How long the model took to be loaded anew, as we waited; what was running before that is no load."""
        held = self._held.get(digest)
        return 0.0 if held is None or held is before else held.load_s

    def _ask(self, number: int, ask: Ask, requester: PeerId | None, keep_alive_s: float, wish: Wish) -> list[Action]:
        try:
            return self._core.on_ask(
                number,
                ask.digest,
                keep_alive_s,
                trio.current_time(),
                takes_slot=not is_load_only(ask.request),
                requester=requester,
                priority=ask.priority,
                wish=wish,
            )
        except Busy:
            SHED.labels(where="queue", priority=ask.priority).inc()
            raise

    def _preload(self, number: int, ask: Ask, wish: Wish) -> list[Action]:
        self._core.on_need(ask.digest, wish.best.need)
        actions = self._core.on_preload(number, ask.digest, ask.keep_alive_s or 0.0, trio.current_time(), wish)
        if actions is None:
            raise Busy(NO_ROOM)
        return actions

    def _tell_queued(self) -> None:
        for priority, told in self._queued.items():
            if (waiting := self._queue.waiting_of(priority)) != told:
                self._queued[priority] = waiting
                _queued(priority=priority).set(waiting)

    def close(self) -> None:
        """Take no ask any more: peers' streams outlive the nursery that models run in by a moment."""
        self._closed = True

    def loaded(self) -> tuple[LoadedView, ...]:
        """Models in memory, longest remaining first."""
        offset_s = self._wall() - trio.current_time()
        views: list[LoadedView] = []
        asks: dict[Sha256, ResidentView] = {}
        for resident in self._core.snapshot():
            held = self._in_memory(resident.digest)
            view = held.view(resident, self.speed(resident.digest), offset_s) if held else None
            if view is None:
                continue
            if self._brought.brings(resident.digest):
                asks[resident.digest] = resident
            else:
                views.append(view)
        return (*views, *(self._asked(view, asks.get(view.digest)) for view in self._brought.loaded()))

    def device(self, digest: Sha256) -> Device | None:
        """Where the model is in memory; None where it is not."""
        if self._brought.brings(digest):
            return next((view.device for view in self._brought.loaded() if view.digest == digest), None)
        held = self._in_memory(digest)
        return held.device if held else None

    def _in_memory(self, digest: Sha256) -> HeldModel | None:
        """A model that is held, on its way in or out too, and not gone."""
        held = self._held.get(digest)
        return None if held is None or self._is_gone(digest, held) else held

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

    def look_at_memory(self, moves: int | None = None) -> None:
        """See how much there is for models now: call it when figures of the GPUs have been read. Cheap.

        ``moves``: as it was before they were read. While a model is on its way in or out the figures tell neither what it
        takes nor what others leave, so what was seen before counts on.
        """
        if self._core.settled and moves in (None, self.moves):
            self._do(self._core.on_room(self._memory.room(self._core.needs()), trio.current_time()))

    def held(self) -> frozenset[Sha256]:
        """The models that are in memory, on their way there, or leaving it."""
        return self._held.digests()

    def load(self) -> Load:
        """Prompts running and queued now; the capacity of one model, loaded or not, and of engines that bring theirs."""
        brought = self._brought.parallel()
        own = 0 if brought and self._engine_name == NO_ENGINE else self._config.parallel
        core = self._core
        return Load(core.running, core.queued, own + brought, self._config.max_queue, self._words.told())

    def speed(self, digest: Sha256) -> Speed:
        """What was measured of a model since this node started, loaded now or not."""
        return self._speeds.speed(digest)

    async def unload(self, digest: Sha256) -> None:
        """Unload when its running answers have ended; does not wait for them. No error if it is not loaded."""
        await trio.lowlevel.checkpoint()
        self._stopped[digest] = trio.current_time()
        if len(self._stopped) > MAX_STOPPED:
            del self._stopped[min(self._stopped, key=self._stopped.__getitem__)]
        for number, waiter in list(self._waiters.items()):  # else it would be loaded anew for who only preloads it
            if waiter.ahead and waiter.ask.digest == digest and not waiter.settled.is_set():
                waiter.error = Busy(NO_ROOM)
                waiter.settled.set()
                self._do(self._core.on_end(number, trio.current_time()))
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
                first = next(w.ask for w in self._waiters.values() if w.ask.digest == action.digest)
                self._held.load(action.digest, first.request, action.context_tokens)
                self.moves += 1
            elif isinstance(action, Unload):
                self.moves += 1
                self._held.leave(action.digest)
            elif isinstance(action, Start):
                waiter = self._waiters[action.ask]
                held = self._held.get(waiter.ask.digest)
                waiter.model = held.model if held else None
                waiter.settled.set()
        if self._core.deadline() < self._due_s:  # one that moved on is seen when the earlier one is due
            self._changed.set()
        self._tell_queued()
        self._words.changed()
        self._on_change()

    def look_at_engines(self) -> None:
        """See which models are gone with the engines that brought them: call it when what engines offer has changed. Cheap."""
        for digest in self._held.digests():
            self._notice_crash(digest)

    def _is_gone(self, digest: Sha256, held: HeldModel) -> bool:
        """Whether it is no more what runs the model, and was not told to leave."""
        return held.crashed or (held.ready and held.served and not self._brought.brings(digest))

    def _on_broken(self, digest: Sha256, waiter: _Waiter) -> None:
        """An answer failed with its engine. Of our own the process tells whether it lives; of another's nobody does."""
        held = self._held.get(digest)
        if held and held.served and waiter.model is held.model:
            held.broken = True
            self._brought.look_at(digest)

    def _notice_crash(self, digest: Sha256) -> None:
        held = self._held.get(digest)
        if held and self._is_gone(digest, held):
            _log.warning("engine crashed" if held.crashed else "left its engine", digest=digest[:12])
            self._do(self._core.on_crashed(digest, trio.current_time()))

    # --- held_models.HeldEvents --------------------------------------------------------------------------------------

    def on_loaded(self, digest: Sha256, parallel: int, need: Need, context_tokens: int) -> None:
        """See HeldEvents."""
        self._contexts.on_loaded()
        self._do(self._core.on_loaded(digest, parallel, trio.current_time(), need, context_tokens))

    def on_unloaded(self, digest: Sha256) -> None:
        """See HeldEvents."""
        self._do(self._core.on_unloaded(digest, trio.current_time()))

    def on_load_failed(self, digest: Sha256, error: MeshmaxError) -> None:
        """See HeldEvents."""
        actions = self._core.on_load_failed(digest, trio.current_time())
        for action in actions:
            if isinstance(action, Fail):
                self._waiters[action.ask].error = error
                self._waiters[action.ask].settled.set()
        self._do(actions)


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
