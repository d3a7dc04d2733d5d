"""Port mappings by UPnP (IGD), with miniupnpc; satisfies ports.PortMapper.

The library blocks, so it runs in a thread, one at a time; what takes longer than its deadline is left to itself there, and until
it ends nothing else is asked: what a hostile router can keep busy is one thread. Whatever answers first on the LAN is the
router: its word counts for no more than what others see (core.reachability). Not here: what is asked for (core.port_mapping).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import trio

from meshmax.base.errors import Busy, ConnectError, Refused
from meshmax.base.reachability import MappingProtocol

DISCOVER_MS: Final = 2000  # what the library waits for answers
FIND_S: Final = 8.0  # with the import and reading the router's description
ANSWER_S: Final = 5.0  # some home routers take seconds
DESCRIPTION: Final = "meshmax"
MAX_REASON: Final = 100  # characters of a router's that are shown

T = TypeVar("T")


class Upnp:
    """See the module. ``interface``: an IP address of the interface to search on; '' for the system's choice."""

    name: Literal["upnp"] = "upnp"

    def __init__(self, interface: str = "") -> None:
        self._interface = interface
        self._limiter = trio.CapacityLimiter(1)
        self._router: Any = None

    async def find(self) -> str:
        """See ports.PortMapper."""
        self._router = None
        router, external_ip = await self._run(FIND_S, self._search)
        self._router = router
        return external_ip

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        """See ports.PortMapper."""
        router = self._found()

        def add(seconds: int) -> bool:
            arguments = (external_port, protocol.upper(), router.lanaddr, port, DESCRIPTION, "", seconds)
            return bool(router.addportmapping(*arguments))

        try:
            await self._run(ANSWER_S, lambda: add(lifetime_s))
        except Refused as error:
            if "OnlyPermanentLeasesSupported" not in error.message:
                raise
            await self._run(ANSWER_S, lambda: add(0))
            return external_port, 0
        return external_port, lifetime_s

    async def remove(self, protocol: MappingProtocol, port: int, external_port: int) -> None:
        """See ports.PortMapper."""
        router = self._found()
        await self._run(ANSWER_S, lambda: router.deleteportmapping(external_port, protocol.upper()))

    def _found(self) -> Any:
        if self._router is None:
            raise ConnectError("no router was found by UPnP")
        return self._router

    def _search(self) -> tuple[Any, str]:
        import miniupnpc

        router = miniupnpc.UPnP(multicastif=self._interface) if self._interface else miniupnpc.UPnP()
        router.discoverdelay = DISCOVER_MS
        router.discover()
        router.selectigd()
        return router, str(ipaddress.ip_address(router.externalipaddress()))

    async def _run(self, within_s: float, work: Callable[[], T]) -> T:
        with trio.move_on_after(within_s):
            try:
                return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)  # type: ignore[call-arg]  # its stubs are older
            except Exception as error:
                raise _translated(error) from error
        raise ConnectError("the router does not speak UPnP", [("", "upnp", f"no answer in {within_s:.0f} s")])


def _translated(error: Exception) -> Exception:
    """The library raises Exception itself, with the router's word for it."""
    reason = str(error)[:MAX_REASON] or type(error).__name__
    if "ConflictInMappingEntry" in reason:
        return Busy("the port is mapped to another machine")
    if type(error) is not Exception or "No UPnP device" in reason or "Invalid" in reason:
        return ConnectError("the router does not speak UPnP", [("", "upnp", reason)])
    return Refused(f"the router refuses: {reason}")
