"""Models on their way into memory, in it, and on their way out: one task for each, which holds the engine's block open.

So closing the nursery ends every engine process. A load that takes longer than its timeout is given up. What comes of a
model is told in the task that saw it (`HeldEvents`), after the table says so. Not here: which model is loaded and when it
goes (core.residency), who may use it (services.residency).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import structlog
import trio

from meshmax.base.catalog import LoadedView, ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import EngineUnavailable, MeshmaxError
from meshmax.base.ids import Sha256
from meshmax.base.inference import InferRequest, Options, merge_options
from meshmax.base.status import Device, Speed
from meshmax.core.memory import Need, context_tokens
from meshmax.core.residency import ResidentView
from meshmax.ports import Engine, LoadedModel
from meshmax.services.model_memory import ModelMemory
from meshmax.services.model_speeds import ModelSpeeds
from meshmax.telemetry.log import get_logger

_log = get_logger("residency")


class HeldEvents(Protocol):
    """Who is told what came of a model."""

    def on_loaded(self, digest: Sha256, parallel: int, need: Need, context_tokens: int) -> None:
        """It is in memory, takes ``need`` there, and answers ``parallel`` asks at once, each with ``context_tokens``."""
        ...

    def on_load_failed(self, digest: Sha256, error: MeshmaxError) -> None:
        """It could not be loaded."""
        ...

    def on_unloaded(self, digest: Sha256) -> None:
        """It has left memory, or its load was given up."""
        ...


class HeldModel:
    """A model that is loading or loaded, with the scope of its task."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.leave = trio.Event()
        self.file: ModelFile | None = None
        self.model: LoadedModel | None = None
        self.load_s = 0.0
        self.broken = False  # an answer failed because its engine was not there any more

    @property
    def ready(self) -> bool:
        """Whether it is in memory and to stay."""
        return self.model is not None and not self.leave.is_set()

    @property
    def crashed(self) -> bool:
        """Whether it was, and has ended by itself."""
        ended = self.model is not None and (self.broken or not self.model.alive)
        return ended and not self.leave.is_set()

    @property
    def served(self) -> bool:
        """Whether an engine runs it that brings it along: no file of ours was loaded."""
        return self.file is not None and not self.file.path

    @property
    def device(self) -> Device | None:
        """Where it is in memory and to stay; None unless it is."""
        return None if self.model is None or self.leave.is_set() or not self.model.alive else self.model.facts.device

    def view(self, resident: ResidentView, speed: Speed, offset_s: float) -> LoadedView | None:
        """It as people see it; None unless it is in memory. ``offset_s``: from the core's clock to Unix time."""
        if self.file is None or self.model is None or not self.model.alive:
            return None
        facts = self.model.facts
        return LoadedView(
            name=self.file.name,
            digest=resident.digest,
            size=facts.size,
            size_vram=facts.size_vram,
            context_length=facts.context_length,
            device=facts.device,
            details=self.file.details,
            expires_at_s=None if resident.expires_at == math.inf else resident.expires_at + offset_s,
            running=resident.running,
            queued=resident.queued,
            prefill_per_s=speed.prefill_per_s,
            decode_per_s=speed.decode_per_s,
            load_s=speed.load_s,
        )


class HeldModels:
    """Owned by a residency, whose ``nursery`` the models' tasks run in."""

    def __init__(
        self,
        engine: Engine,
        model_file: Callable[[Sha256], Awaitable[ModelFile]],
        config: EngineConfig,
        memory: ModelMemory,
        speeds: ModelSpeeds,
        nursery: trio.Nursery,
        events: HeldEvents,
    ) -> None:
        self._engine, self._model_file, self._config = engine, model_file, config
        self._memory, self._speeds, self._nursery, self._events = memory, speeds, nursery, events
        self._held: dict[Sha256, HeldModel] = {}

    def get(self, digest: Sha256) -> HeldModel | None:
        """The model, on its way in or out too."""
        return self._held.get(digest)

    def digests(self) -> frozenset[Sha256]:
        """All of them."""
        return frozenset(self._held)

    def load(self, digest: Sha256, request: InferRequest, tokens: int) -> None:
        """Begin to load a model that is not held, as ``request`` wants it, but with ``tokens`` of context (0: its own)."""
        held = self._held[digest] = HeldModel()
        self._nursery.start_soon(self._run, digest, held, request, tokens)

    def leave(self, digest: Sha256) -> None:
        """Begin to unload one that is held, or give its load up."""
        held = self._held[digest]
        held.leave.set()
        if held.model is None:
            held.scope.cancel()

    async def _run(self, digest: Sha256, held: HeldModel, request: InferRequest, tokens: int) -> None:
        # It outlives the prompt in whose task it was started, and serves others: its lines are not of that one.
        structlog.contextvars.clear_contextvars()
        try:
            with held.scope:
                await self._hold(digest, held, request, tokens)
        except MeshmaxError as error:
            if held.model is None:
                _log.warning("not loaded", digest=digest[:12], code=error.code, error=error.message)
                del self._held[digest]
                self._events.on_load_failed(digest, error)
                return
            _log.warning("engine ended badly", digest=digest[:12], error=error.message)
        del self._held[digest]
        self._events.on_unloaded(digest)

    async def _hold(self, digest: Sha256, held: HeldModel, request: InferRequest, tokens: int) -> None:
        begun = trio.current_time()
        file = await self._model_file(digest)
        held.file = file_to_load(file, request, self._config, tokens)
        # The deadline ends with the load: the block below stays open for as long as the model is in memory.
        with trio.CancelScope(deadline=begun + self._config.load_timeout_s) as loading:
            async with self._engine.open_model(held.file) as model:
                loading.deadline = math.inf
                held.model = model
                held.load_s = took_s = trio.current_time() - begun
                self._speeds.on_load(digest, took_s)
                facts, need = model.facts, self._memory.on_loaded(held.file, model.facts)
                what = {"model": held.file.name, "digest": digest[:12], "context": facts.context_length}
                _log.info("loaded", **what, seconds=round(took_s, 3))
                self._events.on_loaded(digest, facts.parallel, need, facts.context_length)
                await held.leave.wait()
        if loading.cancelled_caught:
            raise EngineUnavailable(f"the model did not load within {self._config.load_timeout_s:g} s")


def file_to_load(file: ModelFile, request: InferRequest, config: EngineConfig, tokens: int = 0) -> ModelFile:
    """``file`` with the options of ``request`` that count for a load, and ``tokens`` of context; 0, or as many as it has by
    itself: its own."""
    asked = request.options
    num_ctx = tokens if tokens and tokens != context_tokens(file, config) else None
    loading = Options(num_ctx=num_ctx, num_gpu=asked.num_gpu, num_thread=asked.num_thread or None)
    return msgspec.structs.replace(file, parameters=merge_options(loading, file.parameters))
