"""Several engines as one: the peer's own, which runs files of the store, and backends that bring their models along.

Who runs what: a model with a file is the own engine's, where there is one; any other is of the first backend that offers it,
in the order of the configuration. Not here: when backends are looked at, what they offer (services.backends).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from meshmax.base.catalog import ModelFile
from meshmax.base.errors import EngineUnavailable
from meshmax.base.ids import Sha256
from meshmax.base.status import Gpu
from meshmax.ports import Backend, Engine, LoadedModel


class SeveralEngines:
    """An Engine. ``owners``: the backend that runs each model now."""

    def __init__(self, own: Engine, owners: Callable[[], Mapping[Sha256, Backend]]) -> None:
        self._own = own
        self._owners = owners

    @property
    def name(self) -> str:
        """The own engine's: what it may run is in the store; what backends run is told by model."""
        return self._own.name

    async def devices(self) -> tuple[Gpu, ...]:
        """The own engine's: what is beneath a backend is its own."""
        return await self._own.devices()

    def open_model(self, model: ModelFile) -> AbstractAsyncContextManager[LoadedModel]:
        """See ports.Engine; a model without a path is a backend's."""
        if model.path:
            return self._own.open_model(model)
        backend = self._owners().get(model.digest)
        if backend is None:
            raise EngineUnavailable(f"the server that had '{model.name}' does not offer it any more")
        return backend.open_model(model)
