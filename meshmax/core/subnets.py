"""Which addresses probably belong to one party: /24 of IPv4, /48 of IPv6, as far as the internet goes; and to whom one means
anything.

Identities cost nothing, addresses in many networks do. So tables, look-ups and stores bound what comes from one subnet. On a
LAN or on loopback everybody shares a subnet, and whoever is there was let in: those are not bounded.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final

IPV4_PREFIX: Final = 24
IPV6_PREFIX: Final = 48  # what a site is given (RFC 6177), often for nothing: 65,536 networks of /64
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


def may_tell(ip: str, to: str) -> bool:
    """Whether the address ``ip`` means the same to who is at ``to``.

    One of a LAN means nothing, or somebody else, to who is elsewhere; loopback to who is on another machine; a zone to anybody.
    """
    if subnet_of(ip) is not None:
        return True
    if "%" in ip or subnet_of(to) is not None:
        return False
    return _is_loopback(to) or not _is_loopback(ip)


@lru_cache(_CACHED)
def _is_loopback(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip.partition("%")[0]).is_loopback
    except ValueError:
        return False


def ip_of(address: str) -> str:
    """The IP address in a multiaddr of ours; the whole text where there is none, as in simulated networks."""
    parts = address.split("/")
    return parts[parts.index("tcp") - 1] if "tcp" in parts[2:] else address
