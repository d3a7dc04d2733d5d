"""How this machine stands in its network: what its NAT does, who can reach it, by which addresses.

Words of RFC 4787 (mapping and filtering), not "cone" and "symmetric". What others say about us is their word: who concludes
anything from it asks several (core.reachability). Not here: what a peer says of itself (base.status).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from meshmax.base.ids import PeerId

Behaviour = Literal["endpoint-independent", "address-dependent", "address-and-port-dependent", "unknown"]
UdpState = Literal["open", "blocked", "unknown"]
# "public": strangers reach our control port at an address of our own; "mapped": through a port mapping of our router;
# "private": nobody does, as far as several tried; "unknown": too few were asked.
ReachState = Literal["unknown", "public", "mapped", "private"]
MappingProtocol = Literal["tcp", "udp"]


class NatBehaviour(msgspec.Struct, frozen=True):
    """What our NAT does (RFC 4787, 4.1 and 5; RFC 5382 for TCP). All "endpoint-independent" and open where there is none."""

    udp: UdpState = "unknown"
    mapping: Behaviour = "unknown"
    filtering: Behaviour = "unknown"
    tcp_mapping: Behaviour = "unknown"


class PortMapping(msgspec.Struct, frozen=True):
    """A port that a router forwards to us. ``expires_s``: monotonic; ``by``: "upnp" or "nat-pmp"."""

    protocol: MappingProtocol
    port: int
    external_ip: str
    external_port: int
    by: Literal["upnp", "nat-pmp"]
    expires_s: float


class Reachability(msgspec.Struct, frozen=True):
    """Where we stand now. ``why`` is a sentence for people.

    ``external_ips``: our addresses as observers see them. ``addresses``: multiaddrs without /p2p at which others reach us from
    outside (our own public ones, mapped ones); ``relays``: those that keep a place for us. ``mapping_why``: how it stands with
    our router's mappings, a sentence for people; '' where it is not asked.
    """

    state: ReachState = "unknown"
    why: str = "nobody outside was asked yet"
    nat: NatBehaviour = NatBehaviour()
    external_ips: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    mappings: tuple[PortMapping, ...] = ()
    relays: tuple[PeerId, ...] = ()
    mapping_why: str = ""


UNKNOWN = Reachability()
