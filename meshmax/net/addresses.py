"""Addresses: multiaddrs as text, the interfaces of this machine, and what counts as a local network.

A multiaddr is read here by hand (``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEER]``, and over a relay such a one with
``/p2p-circuit[/p2p/PEER]`` behind it), because these few forms are all that TCP needs and everything here comes from
strangers. Not here: which of them to dial (swarm).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import PeerId, parse_peer_id
from meshmax.core.candidates import leads_here
from meshmax.net.interfaces import Interface, is_zoned, recent_interfaces, running_interfaces

MAX_MULTIADDR: Final = 400  # characters; a DNS name has at most 253, a PeerId 52
_CIRCUIT: Final = "/p2p-circuit"
# RFC 1035, 2.3.4: labels of 1 to 63 characters, 253 in all; on longer ones the resolver fails with no OSError.
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")


class Endpoint(msgspec.Struct, frozen=True):
    """Where a peer listens. ``host`` is an IP address (IPv6 may end in %zone) or, with ``name``, a DNS name."""

    host: str
    port: int
    peer_id: PeerId | None = None
    name: bool = False


class Circuit(msgspec.Struct, frozen=True):
    """A way over a relay (libp2p specs, circuit relay v2). ``relay`` names its PeerId; ``target`` is who is reached so."""

    relay: Endpoint
    target: PeerId | None = None


def is_circuit(multiaddr: str) -> bool:
    """Whether ``multiaddr`` leads over a relay, or claims to."""
    return _CIRCUIT in multiaddr


def parse_circuit(multiaddr: str) -> Circuit:
    """The way over a relay that ``multiaddr`` names. Raises InvalidRequest that says what is accepted."""
    before, circuit, after = multiaddr.partition(_CIRCUIT)
    if circuit and len(multiaddr) <= MAX_MULTIADDR and (not after or after.startswith("/p2p/")):
        relay = parse_endpoint(before)
        if relay.peer_id is not None:
            return Circuit(relay, parse_peer_id(after.removeprefix("/p2p/")) if after else None)
    raise InvalidRequest(
        f"'{multiaddr[:100]}' is not an address over a relay: write /ip4/203.0.113.5/tcp/11435/p2p/<PeerId of the relay>"
        "/p2p-circuit and, if known, /p2p/<PeerId> at the end"
    )


def parse_endpoint(multiaddr: str) -> Endpoint:
    """The endpoint that ``multiaddr`` names. Raises InvalidRequest that says what is accepted."""
    parts = multiaddr.split("/") if len(multiaddr) <= MAX_MULTIADDR else []
    zone = ""
    if parts[1:2] == ["ip6zone"] and len(parts) > 3:
        zone = "%" + parts[2]
        parts = ["", *parts[3:]]
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp" or parts[5:6] not in ([], ["p2p"]):
        raise _invalid(multiaddr)
    kind, host, port = parts[1], parts[2], parts[4]
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= 65535):
        raise _invalid(multiaddr)
    peer_id = parse_peer_id(parts[6]) if len(parts) == 7 else None
    if kind in ("dns", "dns4", "dns6"):
        if not _DNS_NAME.fullmatch(host):
            raise _invalid(multiaddr)
        return Endpoint(host, int(port), peer_id, name=True)
    try:
        if kind == "ip4":
            return Endpoint(str(ipaddress.IPv4Address(host)), int(port), peer_id)
        if kind == "ip6":
            return Endpoint(str(ipaddress.IPv6Address(host + zone)), int(port), peer_id)
    except ValueError:
        pass
    raise _invalid(multiaddr)


def multiaddr_of(ip: str, port: int, peer_id: PeerId | None = None) -> str:
    """``/ip4/1.2.3.4/tcp/5[/p2p/PEER]``; an IPv6 zone is written as /ip6zone."""
    address, _, zone = ip.partition("%")
    kind = "ip6" if ":" in address else "ip4"
    head = f"/ip6zone/{zone}" if zone else ""
    return f"{head}/{kind}/{address}/tcp/{port}" + (f"/p2p/{peer_id}" if peer_id else "")


def is_lan_address(ip: str) -> bool:
    """Whether ``ip`` is loopback, private or link-local, which is where an open mesh lives. False for what is no address.

    IPv6: unique local (fc00::/7) and link-local; an IPv4-mapped address counts as the IPv4 address in it.
    """
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_lan_address(str(address.ipv4_mapped))
        return address.is_loopback or address.is_link_local or address in _UNIQUE_LOCAL
    # Not `is_private`, which also holds documentation, benchmark and other networks that are nobody's LAN.
    return address.is_loopback or address.is_link_local or any(address in network for network in _PRIVATE)


def allow_any(ip: str) -> bool:
    """Every address; for meshes whose members prove themselves."""
    return bool(ip)


def interface_addresses() -> list[str]:
    """IP addresses of the interfaces that run or ran a moment ago: IPv4 before IPv6, loopback last; link-local with a zone."""
    return list(_in_order(recent_interfaces()))


@lru_cache(maxsize=1)  # they seldom change, and each status tells them
def _in_order(interfaces: tuple[Interface, ...]) -> tuple[str, ...]:
    found = [f"{ip}%{interface.name}" if is_zoned(ip) else ip for interface in interfaces for ip in interface.ips]
    return tuple(sorted(dict.fromkeys(found), key=_preference))


def running_addresses() -> tuple[str, ...]:
    """IP addresses by which a change of the network is known, sorted: without loopback, and without interfaces that have
    link-local IPv6 addresses only unless all are such. So what containers' virtual interfaces do is no news. Raises OSError.
    """
    interfaces = [interface for interface in running_interfaces() if not interface.loopback]
    some = [interface for interface in interfaces if not interface.bare] or interfaces
    return tuple(sorted({ip for interface in some for ip in interface.ips if interface.bare or not is_zoned(ip)}))


def concrete_addresses(host: str, interfaces: list[str]) -> list[str]:
    """The addresses at which somebody who bound ``host`` can be reached: itself, or every interface for 0.0.0.0 and ::.

    Loopback ones come last. IPv6 link-local ones only where there is nothing else, and without the zone, which each reader has
    to know for itself.
    """
    if host == "0.0.0.0":  # noqa: S104 -- compared, not bound
        return [ip for ip in interfaces if ":" not in ip]
    if host == "::":
        bare = all("%" in ip or ipaddress.ip_address(ip).is_loopback for ip in interfaces)
        return [ip.partition("%")[0] for ip in interfaces if ":" in ip and ("%" not in ip or bare)]
    return [host]


def without_own_loopback(multiaddrs: Sequence[str], own: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    """``multiaddrs`` of a peer without those on loopback, unless it is on this machine, whose IP addresses ``own`` gives.

    Peers tell loopback addresses for others on their machine; on any other they lead to whoever listens there.
    """
    hosts = {multiaddr: _host(multiaddr) for multiaddr in dict.fromkeys(multiaddrs)}
    loopback = {multiaddr for multiaddr, host in hosts.items() if host and leads_here(host)}
    if not loopback or len(loopback) == len(hosts) or {hosts[each] for each in hosts.keys() - loopback} & set(own()):
        return tuple(hosts)
    return tuple(multiaddr for multiaddr in hosts if multiaddr not in loopback)


def is_only_here(multiaddrs: Sequence[str]) -> bool:
    """Whether ``multiaddrs``, of one peer, lead to its own machine alone: it listens on loopback."""
    return bool(multiaddrs) and all(leads_here(_host(multiaddr)) for multiaddr in multiaddrs)


def _host(multiaddr: str) -> str:
    """Its IP address, or '' where it has none."""
    try:
        endpoint = parse_endpoint(multiaddr)
    except InvalidRequest:
        return ""
    return "" if endpoint.name else endpoint.host


def with_zones(multiaddr: str, zones: Sequence[str]) -> tuple[str, ...]:
    """``multiaddr``, or, where it is IPv6 link-local and names no zone, one for each of ``zones`` (interface names)."""
    host = _host(multiaddr)
    if not host or "%" in host or not is_zoned(host):
        return (multiaddr,)
    return tuple(f"/ip6zone/{zone}{multiaddr}" for zone in zones)


_PRIVATE: Final = tuple(map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))
_UNIQUE_LOCAL: Final = ipaddress.IPv6Network("fc00::/7")


def _preference(ip: str) -> tuple[bool, bool, bool]:
    address = ipaddress.ip_address(ip)
    return address.is_loopback, address.is_link_local, address.version == 6


def _invalid(multiaddr: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{multiaddr[:100]}' is not an address of a peer: write /ip4/192.168.1.2/tcp/11435, with /ip6/ or /dns/ for other "
        "kinds of host and, if known, /p2p/<PeerId> at the end"
    )
