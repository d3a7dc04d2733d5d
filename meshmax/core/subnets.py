"""Which addresses probably belong to one party: /24 of IPv4, /64 of IPv6, as far as the internet goes.

Identities cost nothing, addresses in many networks do. So tables, look-ups and stores bound what comes from one subnet. On a
LAN or on loopback everybody shares a subnet, and whoever is there was let in: those are not bounded.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final

IPV4_PREFIX: Final = 24
IPV6_PREFIX: Final = 64
_CACHED: Final = 4096  # addresses whose subnet is remembered


@lru_cache(_CACHED)
def subnet_of(ip: str) -> str | None:
    """The subnet of a public address; None for addresses of a LAN, for loopback, and for what is no address."""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return None
    if not address.is_global:
        return None
    prefix = IPV4_PREFIX if address.version == 4 else IPV6_PREFIX
    return str(ipaddress.ip_network((address, prefix), strict=False))


def source_of(ip: str) -> str:
    """Whom to count what came from ``ip`` for: its subnet, or the address itself where there is none."""
    return subnet_of(ip) or ip


def ip_of(address: str) -> str:
    """The IP address in a multiaddr of ours; the whole text where there is none, as in simulated networks."""
    parts = address.split("/")
    return parts[parts.index("tcp") - 1] if "tcp" in parts[2:] else address
