"""The network interfaces of this machine, as they are now, or were a moment ago, since a look takes milliseconds.

An interface counts when it runs: it is up, and there is a carrier (a cable that is plugged in, a wireless network joined).
Not here: which of their addresses peers are told (addresses).
"""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from typing import Any, Final

import msgspec

RECENT_S: Final = 3.0  # services.network_watch looks each two seconds, so that a status does not look itself

_MULTICAST_FLAG: Final = "multicast"


class Interface(msgspec.Struct, frozen=True):
    """One that runs. ``ips`` are without zones, as the system lists them. ``multicast``: it can send to groups."""

    name: str
    index: int
    ips: tuple[str, ...]
    multicast: bool = True
    networks: tuple[str, ...] = ()  # of its addresses, as CIDR

    @property
    def loopback(self) -> bool:
        """It leads to this machine only."""
        return bool(self.ips) and all(ipaddress.ip_address(ip).is_loopback for ip in self.ips)

    @property
    def bare(self) -> bool:
        """It has no address but link-local IPv6 ones, as the virtual interfaces of containers have."""
        return all(is_zoned(ip) for ip in self.ips)


def is_zoned(ip: str) -> bool:
    """Whether ``ip`` (without zone) means something on one link only: IPv6, link-local."""
    address = ipaddress.ip_address(ip)
    return address.version == 6 and address.is_link_local


class _Look(threading.local):
    """The last one of this thread, since each thread may be in a network namespace of its own."""

    seen: tuple[Interface, ...] = ()
    until_s = -math.inf  # of the monotonic clock: as long as it is recent


_last: Final = _Look()


def recent_interfaces() -> tuple[Interface, ...]:
    """As `running_interfaces`, or what that or this said at most RECENT_S ago, so never older than a change seen since."""
    return _last.seen if time.monotonic() < _last.until_s else running_interfaces()


def running_interfaces() -> tuple[Interface, ...]:
    """All that run and have an address, in the system's order. Takes milliseconds. Raises OSError."""
    _last.seen = _look_now()
    _last.until_s = time.monotonic() + RECENT_S
    return _last.seen


def _look_now() -> tuple[Interface, ...]:
    import ifaddr
    import psutil

    stats = psutil.net_if_stats()
    found: dict[str, Interface] = {}
    for adapter in ifaddr.get_adapters():
        name = str(adapter.name).partition(":")[0]  # Linux lists further addresses of eth0 as eth0:1
        facts = stats.get(name)
        ips = tuple(str(entry.ip if isinstance(entry.ip, str) else entry.ip[0]) for entry in adapter.ips)
        if (facts is not None and not facts.isup) or not ips:
            continue
        networks = (f"{ip}/{entry.network_prefix}" for ip, entry in zip(ips, adapter.ips, strict=True))
        cidr = (str(ipaddress.ip_network(text, strict=False)) for text in networks)
        before = found.get(name, Interface(name, int(adapter.index or 0), ()))
        found[name] = Interface(
            name,
            before.index,
            tuple(dict.fromkeys((*before.ips, *ips))),
            _multicast(facts),
            tuple(dict.fromkeys((*before.networks, *cidr))),
        )
    return tuple(found.values())


def _multicast(facts: Any) -> bool:
    flags = getattr(facts, "flags", "")
    return not flags or _MULTICAST_FLAG in flags.split(",") or "loopback" in flags.split(",")
