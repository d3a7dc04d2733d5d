"""How often strangers are served: so many events a second for each source, and so many in all.

Rules: a source is an IPv4 address or an IPv6 network of 64 bits, since a household commands all addresses of one. Each may
come ``burst`` times at once and ``per_s`` times a second from then on; all together ``total_per_s``, with a burst of one
second. What is refused counts for nobody. Of more than ``max_sources`` the one that has waited longest is forgotten (and
starts afresh), so a flood of addresses meets the bound of all together. Time is passed in. Not here: what is done for a
source.
"""

from __future__ import annotations

import ipaddress
from typing import Final

MAX_SOURCES: Final = 4096  # remembered at once, each about 200 bytes


def source_of(ip: str) -> str:
    """Who counts as one: the IPv4 address (also one mapped into IPv6), the first 64 bits of an IPv6 address."""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


class Rates:
    """Token buckets by source, and one over all."""

    __slots__ = ("_all", "_burst", "_max_sources", "_per_s", "_sources", "_total_per_s")

    def __init__(self, per_s: float, burst: float, total_per_s: float, max_sources: int = MAX_SOURCES) -> None:
        self._per_s, self._burst, self._total_per_s, self._max_sources = per_s, burst, total_per_s, max_sources
        self._sources: dict[
            str, tuple[float, float]
        ] = {}  # tokens and when they were counted, least recently seen first
        self._all = (total_per_s, 0.0)

    def take(self, source: str, now: float) -> bool:
        """Whether ``source`` is served once more now."""
        own = _refilled(self._sources.pop(source, (self._burst, now)), self._per_s, self._burst, now)
        everybody = _refilled(self._all, self._total_per_s, self._total_per_s, now)
        taken = own >= 1 and everybody >= 1
        self._sources[source] = (own - taken, now)
        self._all = (everybody - taken, now)
        if len(self._sources) > self._max_sources:
            del self._sources[next(iter(self._sources))]
        return taken

    @property
    def sources(self) -> int:
        """How many are remembered."""
        return len(self._sources)


def _refilled(counted: tuple[float, float], per_s: float, most: float, now: float) -> float:
    tokens, at = counted
    return min(most, tokens + max(0.0, now - at) * per_s)
