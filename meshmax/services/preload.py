"""Loads models before anybody asks this peer for them: does what core.demand.Preloading decides, one model at a time.

Not here: what is loaded, and what goes for it (services.residency: nothing goes for a preloaded one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NoReturn, Protocol

import trio

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, is_load_only
from meshmax.base.status import Demand, PeerView
from meshmax.core.demand import DemandTable, Preloading
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

LOOK_S: Final = 1.0  # between looks at what is short; a heartbeat brings news every two
USUAL_KEEP_ALIVE_S: Final = 300.0  # of what is preloaded, where models are kept for ever

_log = get_logger("preload")


class Preloadable(Protocol):
    """Where models are loaded: services.residency."""

    async def try_preload(self, digest: Sha256, name: str, keep_alive_s: float) -> bool:
        """Whether it was loaded, in free room."""
        ...


class Preloads:
    """What is asked for by way of this node, and what it preloads; ``keep_alive_s``: 0 preloads nothing."""

    def __init__(
        self, own: PeerId, residency: Preloadable, peers: Callable[[], Sequence[PeerView]], keep_alive_s: float
    ) -> None:
        self._core = Preloading(own)
        self._table = DemandTable()
        self._residency, self._peers = residency, peers
        self._keep_alive_s = USUAL_KEEP_ALIVE_S if keep_alive_s < 0 else keep_alive_s

    def on_ask(self, ask: Ask) -> None:
        """A prompt has come in by our own API. Cheap."""
        if not is_load_only(ask.request) and ask.keep_alive_s != 0:
            self._table.on_request(ask.digest, trio.current_time())

    def demand(self) -> tuple[Demand, ...]:
        """What neighbours are told."""
        return self._table.told(trio.current_time())

    async def run(self) -> NoReturn:
        """Preload until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            if self._keep_alive_s:
                await isolate("preload", self._look)

    async def _look(self) -> None:
        model = self._core.choose(self._peers(), self.demand(), trio.current_time())
        if model is None:
            return
        name, loaded = model.names[0] if model.names else model.digest[:12], False
        try:
            loaded = await self._residency.try_preload(model.digest, name, self._keep_alive_s)
        except MeshmaxError as error:
            _log.warning("not preloaded", model=name, code=error.code, error=error.message)
        finally:
            self._core.on_tried(model.digest, loaded, trio.current_time())
        if loaded:
            _log.info("preloaded", model=name, digest=model.digest[:12])
