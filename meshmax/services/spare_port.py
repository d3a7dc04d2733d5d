"""A port for a simultaneous open that is prepared before it is asked for, so that an attempt does not wait for observers.

Rules: whoever knows that an attempt is likely soon says so (`prepare`): a relayed connection is on its way. The next `open_port`
takes the spare, ready or not; one that nobody takes within SPARE_S is closed, as its mapping is when our network changes. There
is at most one. A spare that fails costs nothing: a port is opened as if there had been none. Satisfies ports.Puncher. Not here:
how a port is opened (net.punch), attempts (services.attempt).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshmax.base.errors import MeshmaxError
from meshmax.ports import Puncher, PunchPort
from meshmax.telemetry.log import get_logger

SPARE_S: Final = 3.0  # a relayed connection stands in less than one second, and its attempt begins at once

_log = get_logger("attempt")
_Observers = tuple[tuple[str, int], ...]


class _Spare:
    """One port on its way, ready, or failed."""

    def __init__(self, observers: _Observers) -> None:
        self.observers = observers
        self.port: PunchPort | None = None
        self.settled, self.taken, self.released = trio.Event(), trio.Event(), trio.Event()
        self.scope = trio.CancelScope()


class SparePort:
    """See the module. Made by `open_spare_port`."""

    def __init__(
        self, puncher: Puncher, observers: Callable[[], Sequence[tuple[str, int]]], nursery: trio.Nursery
    ) -> None:
        self._puncher, self._observers, self._nursery = puncher, observers, nursery
        self._spare: _Spare | None = None

    def prepare(self) -> None:
        """A port may be wanted soon. Never blocks, never raises."""
        if self._spare is None:
            self._spare = _Spare(tuple(self._observers()))
            self._nursery.start_soon(self._keep, self._spare)

    def forget(self) -> None:
        """Our network is another. Never blocks, never raises."""
        if self._spare is not None:
            self._spare.scope.cancel()
            self._spare = None

    @asynccontextmanager
    async def open_port(self, observers: Sequence[tuple[str, int]]) -> AsyncIterator[PunchPort]:
        """See ports.Puncher."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.observers == tuple(observers):
            spare.taken.set()
            try:
                await spare.settled.wait()
                if spare.port is not None:
                    yield spare.port
                    return
            finally:
                spare.released.set()
        elif spare is not None:
            spare.scope.cancel()
        async with self._puncher.open_port(observers) as port:
            yield port

    async def _keep(self, spare: _Spare) -> None:
        try:
            with spare.scope:
                async with self._puncher.open_port(spare.observers) as spare.port:
                    spare.settled.set()
                    with trio.move_on_after(SPARE_S):
                        await spare.taken.wait()
                    if spare.taken.is_set():
                        await spare.released.wait()
                    elif self._spare is spare:
                        self._spare = None
        except MeshmaxError as error:
            _log.debug("no spare port", error=error.message)
        finally:
            spare.port = None
            spare.settled.set()
            if self._spare is spare:
                self._spare = None


@asynccontextmanager
async def open_spare_port(
    puncher: Puncher, observers: Callable[[], Sequence[tuple[str, int]]]
) -> AsyncIterator[SparePort]:
    """``puncher`` with a spare, until the block is left. ``observers``: whom an attempt would ask now."""
    async with trio.open_nursery() as nursery:
        try:
            yield SparePort(puncher, observers, nursery)
        finally:
            nursery.cancel_scope.cancel()
