"""What runs models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from meshmax.base.catalog import ModelDescription, ModelFile, OfferedModel
from meshmax.base.ids import Sha256
from meshmax.base.inference import Event, InferRequest
from meshmax.base.status import Device, Gpu


class LoadedFacts(msgspec.Struct, frozen=True):
    """How a model was loaded. Sizes in bytes; ``parallel`` answers at once."""

    size: int
    size_vram: int
    context_length: int
    device: Device
    parallel: int


class LoadedModel(Protocol):
    """A model in memory."""

    @property
    def facts(self) -> LoadedFacts:
        """How it was loaded."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine's process has ended."""
        ...

    def answer(self, request: InferRequest) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The answer's events; the last is a Finish. Leaving the block early stops the engine's work within a second.

        Where the request has a ``said``, these are the rest of the answer, nothing of it repeated, and Finish counts the
        rest alone; CapabilityMissing where the engine cannot go on from there.

        Raises CapabilityMissing, ContextTooLong, InvalidRequest before the first event, EngineCrashed at any time.
        """
        ...


class Engine(Protocol):
    """Something that runs models."""

    @property
    def name(self) -> str:
        """What it is called in logs and messages."""
        ...

    async def devices(self) -> tuple[Gpu, ...]:
        """The GPUs that this engine can really use; () is an answer."""
        ...

    def open_model(self, model: ModelFile) -> AbstractAsyncContextManager[LoadedModel]:
        """Load a model; leaving the block unloads it and ends every process it had. Raises EngineUnavailable, EngineCrashed."""
        ...


class Backend(Engine, Protocol):
    """An engine that brings its own models along: a server that is already there. Its memory is its own to fill."""

    async def look(self) -> tuple[OfferedModel, ...]:
        """What it offers now. Raises EngineUnavailable: there is nothing, or nothing that may be used; the message says why."""
        ...

    async def describe(self, digest: Sha256) -> ModelDescription:
        """What it says of one of its models. Raises ModelNotFound, EngineError."""
        ...

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """Load one of its models and keep it so long (None: its own default, negative: for ever, 0: unload), if it can.

        Raises ModelNotFound, EngineError, InvalidRequest (it can unload none).
        """
        ...
