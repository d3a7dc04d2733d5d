"""The engine of a peer that only stores and routes: it has no device and runs nothing."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.errors import EngineUnavailable
from meshmax.base.status import NO_ENGINE, Gpu
from meshmax.ports import LoadedModel


class NoEngine:
    """Satisfies ports.Engine by refusing."""

    name = NO_ENGINE

    async def devices(self) -> tuple[Gpu, ...]:
        """None."""
        await trio.lowlevel.checkpoint()
        return ()

    def open_model(self, model: ModelFile) -> AbstractAsyncContextManager[LoadedModel]:
        """Raises EngineUnavailable."""
        raise EngineUnavailable("this peer runs no models (engine: none); ask another one")
