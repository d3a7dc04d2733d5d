"""Which candidates of a peer we send packets to.

A peer's word is no proof of where it is: candidates that point at others would have us knock at strangers' doors. So a public
address counts only if a node that we know has vouched for it, or if the peer is connected with us from there; a private one
only where both of us seem to be in that private network: we share our external address or, where nobody outside has seen ours,
it is in a subnet of ours. Never loopback, link-local, multicast, reserved or unspecified addresses, nor our own; ports from
1024 up, and 80 and 443. The same for the candidates in an SDP, which is written anew from what was read, so that nothing else
in it reaches anybody. Not here: who vouches (wire.voucher), sending.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from meshmax.base.traversal import MAX_IP, Candidate
from meshmax.wire import sdp

MAX_TARGETS: Final = 16  # of one attempt and method; each gets some ten packets
LOWEST_PORT: Final = 1024
LOW_PORTS: Final = (80, 443)  # where networks let nothing else out
_SESSION: Final = 1  # of a rewritten SDP; nobody compares it

_IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Net: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _nets(*texts: str) -> tuple[_Net, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# RFC 1918, RFC 6598 (carriers), RFC 4193
_PRIVATE: Final = _nets("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
# Nobody's address, or one that means another: this network, loopback, link-local, protocol assignments, relay anycast,
# multicast, reserved and broadcast; of IPv6: unspecified, loopback, mapped and compatible IPv4, NAT64, Teredo, 6to4.
_NEVER: Final = _nets(
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2002::/16", "fe80::/10",
    "fec0::/10", "ff00::/8",
)  # fmt: skip


def is_private(ip: str) -> bool:
    """Whether ``ip`` is an address of a private or a carrier's network. False for what is no address."""
    address = try_ip(ip)
    return address is not None and any(address in net for net in _PRIVATE if net.version == address.version)


def leads_here(host: str) -> bool:
    """Whether ``host``, an IP address or a name, is this machine by its form: loopback or unspecified, to which connections
    go to loopback, also as IPv4 in IPv6, or localhost (RFC 6761, 6.3)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.rstrip(".").lower()
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or (mapped or address).is_unspecified


def may_lead_elsewhere(ip: str, port: int) -> bool:
    """Whether others' word may have us connect there at all: to no address of _NEVER, at no port of a system service."""
    address = try_ip(ip)
    if address is None or not _port_allowed(port):
        return False
    return not any(address in net for net in _NEVER if net.version == address.version)


def try_ip(text: str) -> _IP | None:
    """The address that ``text`` is; None for anything else, names and zones included."""
    try:
        return ipaddress.ip_address(text) if len(text) <= MAX_IP and "%" not in text else None
    except ValueError:
        return None


class Screen(msgspec.Struct, frozen=True):
    """What we know when a peer's candidates come; addresses in canonical text, as ``ipaddress`` writes it.

    ``vouched``: has a node that we know vouched for the peer at this IP? ``connected``: IPs from which the peer is connected
    with us. ``subnets``: of our interfaces, as CIDR. ``own``: our interfaces' IPs. ``external``: how observers see us.
    ``relays``: IPs of TURN servers that we use ourselves, at which relayed candidates may be.
    """

    vouched: Callable[[str], bool]
    connected: frozenset[str] = frozenset()
    subnets: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()
    external: frozenset[str] = frozenset()
    relays: frozenset[str] = frozenset()

    def allows(self, candidate: Candidate) -> bool:
        """See the module."""
        address = try_ip(candidate.ip)
        if address is None or str(address) in self.own:
            return False
        if not may_lead_elsewhere(candidate.ip, candidate.port):
            return False
        if candidate.kind == "relay":
            return str(address) in self.relays
        if any(address in net for net in _PRIVATE if net.version == address.version):
            return self._shares(address)
        return self._proved(str(address)) and not self._is_edge(address)

    def targets(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Those of TCP that are allowed, each address once, at most MAX_TARGETS."""
        allowed: dict[tuple[str, int], Candidate] = {}
        for candidate in candidates:
            if candidate.transport == "tcp" and self.allows(candidate):
                ip = str(ipaddress.ip_address(candidate.ip))
                allowed.setdefault((ip, candidate.port), Candidate(candidate.kind, "tcp", ip, candidate.port))
        return tuple(allowed.values())[:MAX_TARGETS]

    def sdp(self, text: str) -> str:
        """``text``, written anew with the allowed candidates only. Raises RemoteProtocolError: it is no data channel's."""
        description = sdp.decode(text)
        allowed = tuple(
            each for each in description.candidates if self.allows(Candidate(each.kind, "udp", each.ip, each.port))
        )
        return sdp.encode(msgspec.structs.replace(description, candidates=allowed), _SESSION)

    def _proved(self, ip: str) -> bool:
        return ip in self.connected or self.vouched(ip)

    def _shares(self, address: _IP) -> bool:
        if str(address) in self.connected:
            return True
        if self.external and not any(self._proved(ip) for ip in self.external):
            return False  # it is elsewhere: in many networks somebody has this same private address
        for text in self.subnets:
            net = ipaddress.ip_network(text, strict=False)
            if net.version == address.version and address in net:
                return not _is_edge_of(address, net)
        return bool(self.external)  # behind one address is one private network, or a carrier's

    def _is_edge(self, address: _IP) -> bool:
        nets = (ipaddress.ip_network(text, strict=False) for text in self.subnets)
        return any(_is_edge_of(address, net) for net in nets if net.version == address.version)


def _is_edge_of(address: _IP, net: _Net) -> bool:
    """Whether it is the broadcast address or the network's own; a net of two or one address (RFC 3021) has none."""
    if net.num_addresses <= 2 or net.version == 6:
        return False
    return address in (net.network_address, net.broadcast_address)


def _port_allowed(port: int) -> bool:
    return LOWEST_PORT <= port <= 65535 or port in LOW_PORTS
