"""Networks, told apart by their subnets, and which of them let no UDP out.

Rules: a network is the set of /24s of our IPv4 addresses, of /64s where there are none. Many homes share 192.168.1.0/24, so
what is remembered is only where to begin: the next look corrects it. It counts for REMEMBER_S, for MAX_NETWORKS at most; the
oldest goes first. Not here: files (store.networks_file), looking (services.reachability).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

import msgspec

MAX_NETWORKS: Final = 64  # that block UDP; more than one person visits in REMEMBER_S
REMEMBER_S: Final = 30 * 86400.0


def network_of(ips: Sequence[str]) -> str:
    """The subnets of our addresses, sorted, with spaces between; '' where there is none but loopback and link-local."""
    found: dict[int, set[str]] = {4: set(), 6: set()}
    for ip in ips:
        try:
            address = ipaddress.ip_address(ip.partition("%")[0])
        except ValueError:
            continue
        if not address.is_loopback and not address.is_link_local:
            prefix = 24 if address.version == 4 else 64
            found[address.version].add(str(ipaddress.ip_network((address, prefix), strict=False)))
    return " ".join(sorted(found[4] or found[6]))


class BlockedNetworks(msgspec.Struct, forbid_unknown_fields=True):
    """Networks that let no UDP out, and when that was seen last (Unix seconds), oldest first."""

    seen: dict[str, float] = {}

    def has(self, network: str, unix_s: float) -> bool:
        """Whether ``network`` is one of them."""
        at = self.seen.get(network)
        return at is not None and 0 <= unix_s - at < REMEMBER_S

    def note(self, network: str, blocked: bool, unix_s: float) -> bool:
        """It was seen just now whether UDP is blocked there; whether that is worth being written down."""
        before = self.seen.pop(network, None)
        if not blocked or not network:
            return before is not None
        self.seen[network] = unix_s
        while len(self.seen) > MAX_NETWORKS:
            del self.seen[next(iter(self.seen))]
        return before is None or not 0 <= unix_s - before < REMEMBER_S / 30
