"""Port mappings in the background: searches a router, asks, renews, gives back; what and when is core.port_mapping's.

All ways are tried at once, the first in the order given counts of those that answer: NAT-PMP answers within a round trip, where
UPnP takes two seconds. Nothing waits for any of it. Where our network changes, what was asked in the one before is given up.
At the end what was mapped is given back, for END_S at most. Not here: how a router is spoken to (ports.PortMapper).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from meshmax.base.errors import Busy, ConnectError, MeshmaxError
from meshmax.base.reachability import PortMapping
from meshmax.core.backoff import Random
from meshmax.core.port_mapping import Action, Ask, Give, PortMappings, PortWanted, Search
from meshmax.ports import PortMapper
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

END_S = 2.0  # a router that answers takes 20 ms a mapping
CHECK_S = 5.0  # how often what is wanted is looked at: ports are bound anew rarely

_log = get_logger("port_mapping")


class PortMappingService:
    """See the module. ``ports``: those that others should reach, none while no mapping is wanted."""

    def __init__(
        self, mappers: Sequence[PortMapper], ports: Callable[[], Iterable[PortWanted]], random: Random
    ) -> None:
        self._mappers, self._ports = tuple(mappers), ports
        self._core = PortMappings(random)
        self._mapper: PortMapper | None = None
        self._asking: set[trio.CancelScope] = set()  # of searches, and questions for mappings
        self._stopped = False
        self._watchers: list[Callable[[], None]] = []
        self._woken = trio.Event()
        self._told: tuple[object, ...] = ()

    @property
    def mappings(self) -> tuple[PortMapping, ...]:
        """What our router forwards to us, by its own word."""
        return self._core.mappings

    @property
    def why(self) -> str:
        """How it stands, for people."""
        return self._core.why

    def external_port(self, wanted: PortWanted) -> int:
        """Where a port of ours is mapped; 0: nowhere."""
        return next(
            (e.external_port for e in self.mappings if (e.protocol, e.port) == (wanted.protocol, wanted.port)), 0
        )

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change`` when `mappings` are others. It must not block, and is kept for ever."""
        self._watchers.append(on_change)

    def look_again(self) -> None:
        """The network changed. Cheap, never raises."""
        self._core.on_network(trio.current_time())
        for scope in self._asking:
            scope.cancel()
        self._woken.set()

    def check(self) -> None:
        """`ports` may be others. Cheap."""
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                self._woken = trio.Event()
                self._core.on_wanted(self._ports())
                for action in self._core.tick(trio.current_time()):
                    scope = trio.CancelScope(shield=isinstance(action, Ask))  # what nobody knows of would stay mapped
                    if not isinstance(action, Give):
                        self._asking.add(scope)
                    nursery.start_soon(self._do_alone, action, scope)
                self._tell()
                wait_s = max(0.0, self._core.deadline() - trio.current_time())
                with trio.move_on_after(min(wait_s, CHECK_S)):
                    await self._woken.wait()

    def stop_asking(self) -> None:
        """Questions that are under way have END_S to be answered."""
        self._stopped = True
        for scope in self._asking:
            scope.deadline = min(scope.deadline, trio.current_time() + END_S)

    async def end(self) -> None:
        """Give everything back."""
        async with trio.open_nursery() as nursery:
            for action in self._core.end():
                nursery.start_soon(self._do_alone, action, trio.CancelScope())

    def _tell(self) -> None:
        # A renewal is no news.
        told = tuple((each.protocol, each.port, each.external_ip, each.external_port) for each in self.mappings)
        if told != self._told:
            self._told = told
            _log.info("port mappings", mapped=len(told), why=self.why)
            for watcher in self._watchers:
                watcher()

    async def _do_alone(self, action: Action, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await isolate("port_mapping", partial(self._do, action))
        finally:
            self._asking.discard(scope)
        self._woken.set()

    async def _do(self, action: Action) -> None:
        match action:
            case Search():
                await self._search()
            case Ask():
                await self._ask(action)
            case Give(mapping):
                mapper = next((each for each in self._mappers if each.name == mapping.by), None)
                if mapper is not None:
                    await mapper.remove(mapping.protocol, mapping.port, mapping.external_port)

    async def _search(self) -> None:
        found: dict[str, str] = {}

        async def search(mapper: PortMapper) -> None:
            try:
                found[mapper.name] = await mapper.find()
            except MeshmaxError as error:
                _log.debug("no router", by=mapper.name, error=error.message)

        async with trio.open_nursery() as nursery:
            for mapper in self._mappers:
                nursery.start_soon(search, mapper)
        for mapper in self._mappers:
            if mapper.name in found:
                self._mapper = mapper
                self._core.on_router(mapper.name, found[mapper.name], trio.current_time())
                return
        self._core.on_no_router(trio.current_time())

    async def _ask(self, ask: Ask) -> None:
        if self._stopped:
            return
        wanted, mapper = ask.wanted, self._mapper
        assert mapper is not None
        try:
            granted = await mapper.add(wanted.protocol, wanted.port, ask.external_port, ask.lifetime_s)
        except Busy:
            self._core.on_taken(wanted, trio.current_time())
        except ConnectError:
            self._core.on_lost(wanted, trio.current_time())
        except MeshmaxError as error:
            self._core.on_refused(wanted, error.message, trio.current_time())
        else:
            self._core.on_granted(wanted, *granted, trio.current_time())


@asynccontextmanager
async def open_port_mapping(
    mappers: Sequence[PortMapper], ports: Callable[[], Iterable[PortWanted]], random: Random
) -> AsyncIterator[PortMappingService]:
    """Port mappings until the block ends, which gives them back."""
    service = PortMappingService(mappers, ports, random)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            try:
                yield service
            finally:
                service.stop_asking()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(deadline=trio.current_time() + END_S, shield=True):
            await service.end()
