"""Over which interfaces and families mDNS goes. Pure; for each the system is asked elsewhere (interfaces, mdns).

Rules: one address an interface and family, since a group is joined once an interface. Loopback is used too: several peers may
run on one machine. IPv6 goes where an interface has more than link-local addresses, and on the others only where that is
all that this machine has: every virtual interface of a container has a link-local one. Interfaces that cannot send to
groups (some tunnels) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from meshmax.net.interfaces import Interface

MAX_WAYS: Final = 32  # sockets that mDNS opens; a machine on more networks than that is no peer's


class Way(msgspec.Struct, frozen=True):
    """An interface and a family: ``ip`` is the address that it is spoken from."""

    interface: str
    index: int
    ip: str
    loopback: bool = False

    @property
    def ipv6(self) -> bool:
        """Its family."""
        return ":" in self.ip


def choose(interfaces: Sequence[Interface], only: Sequence[str] = (), ipv6: bool = True) -> tuple[Way, ...]:
    """The ways to use. ``only``: addresses of the interfaces that may be used, () for all. ``ipv6``: use that at all."""
    if only:
        wanted = {ip.partition("%")[0] for ip in only}
        ways = [way for interface in interfaces for way in _ways(interface, wanted)]
    else:
        bare = all(interface.bare or interface.loopback for interface in interfaces)
        ways = [way for interface in interfaces if interface.multicast for way in _usual(interface, bare)]
    return tuple(way for way in ways if ipv6 or not way.ipv6)[:MAX_WAYS]


def _usual(interface: Interface, bare: bool) -> Iterator[Way]:
    for way in _ways(interface, set(interface.ips)):
        if not way.ipv6 or not (interface.loopback or (interface.bare and not bare)):
            yield way


def _ways(interface: Interface, wanted: set[str]) -> Iterator[Way]:
    for ipv6 in (False, True):
        ip = next((ip for ip in interface.ips if ip in wanted and (":" in ip) == ipv6), None)
        if ip is not None:
            yield Way(interface.name, interface.index, ip, interface.loopback)
