"""Dialling a peer whose addresses are of many kinds: which ways are tried, in which order, how long after the beginning.

Rules. What worked from this network before comes first, at once. Then private addresses of networks that we are in (or where
the peer is behind the same external address as we are), public ones and names a moment later; relays RELAY_S after that, unless
no direct way is left or none ever worked from here: then at once. A private address of a network that is not ours is probably
somebody else's machine, or a site that is routed to: it is tried last, by itself, and delays nothing. A relay at which we hold
a place goes before others, since the way to it is there already; it is tried, after those that the peer named, even where
the peer named none: members of one mesh know the same bootstrap nodes, and what was heard of the peer may be older than its
place there. Loopback addresses count only where the peer is on this
machine. Never over a relay that is ourselves or the peer. Each address at most once, MAX_ADDRESSES of the peer's and
MAX_REMEMBERED of ours in all, MAX_RELAYS relays.
Not here: how it is dialled (services.connector), punching, which needs a connection first (core.upgrades), what worked before
(core.path_memory).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.core.candidates import leads_here

PUBLIC_S: Final = 0.05  # a LAN answers within that
RELAY_S: Final = 0.15  # the direct ways have had a round trip on a continent; a relay costs its owner something
NEXT_RELAY_S: Final = 0.25  # between two relays
FAR_PRIVATE_S: Final = 0.5  # a relay is there by then
MAX_REMEMBERED: Final = 4
MAX_RELAYS: Final = 3

Place = Literal["near", "public", "far", "loopback", "circuit", "odd"]
CIRCUIT: Final = "/p2p-circuit"
_P2P: Final = "/p2p/"


class Own(msgspec.Struct, frozen=True):
    """Where we stand. ``networks``: of our interfaces, as CIDR; () where nothing is known, and then every private address may
    be of one of ours. ``relays``: at which we hold a place, ``circuits``: how these are reached, as circuit multiaddrs;
    ``over_relays``: whether we can go over relays at all; ``here``: whether we listen on loopback alone.
    """

    peer_id: PeerId
    ips: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    external_ips: tuple[str, ...] = ()
    relays: tuple[PeerId, ...] = ()
    over_relays: bool = True
    circuits: tuple[str, ...] = ()
    here: bool = False


class Step(msgspec.Struct, frozen=True):
    """``addresses`` are tried side by side ``delay_s`` after the beginning. ``why``: for people and logs."""

    method: Literal["direct", "relay"]
    addresses: tuple[str, ...]
    delay_s: float
    why: str


class Address(msgspec.Struct, frozen=True):
    """A multiaddr taken apart. ``host``: IP address, name, or '' where it is of another form; of a circuit, the relay's."""

    text: str
    host: str = ""
    is_ip: bool = False
    relay: PeerId | None = None  # of a circuit
    target: PeerId | None = None  # who is said to be at the end


def dial_plan(
    target: PeerId, addresses: Sequence[str], own: Own, worked: Sequence[str] = (), directless: bool = False
) -> tuple[Step, ...]:
    """The steps, by their delays. ``worked``: addresses at which the peer was reached from the network that we are in now,
    newest first. ``directless``: from here it was reached by other ways only.
    """
    given = [parse(text) for text in dict.fromkeys((*worked[:MAX_REMEMBERED], *addresses[:MAX_ADDRESSES]))]
    known = set(worked[:MAX_REMEMBERED])
    by_place: dict[Place, list[Address]] = {}
    local = _is_here(given, own)
    for each in given:
        by_place.setdefault(_place(each, own, given), []).append(each)
    before = [
        each for place in ("near", "public", "far", "odd") for each in by_place.get(place, ()) if each.text in known
    ]
    steps = [
        _direct(before, 0.0, "it worked from this network before"),
        _direct(_rest(by_place, "near", known), 0.0, "it is in a network of ours"),
        _direct(by_place.get("loopback", ()) if local else (), 0.0, "it is on this machine"),
    ]
    wait_s = PUBLIC_S if any(step.addresses for step in steps) else 0.0
    steps.append(_direct([*_rest(by_place, "public", known), *_rest(by_place, "odd", known)], wait_s, "it is public"))
    circuits = _circuits(by_place.get("circuit", ()), target, own)
    first = any(step.addresses for step in steps) and not directless
    for number, circuit in enumerate(circuits):
        delay_s = (RELAY_S if first else 0.0) + number * NEXT_RELAY_S
        why = (
            "the relay keeps a place for it"
            if circuit in given
            else "the relay keeps a place for us, and perhaps for it"
        )
        steps.append(Step("relay", (circuit.text,), delay_s, why))
    far_s = FAR_PRIVATE_S if any(step.addresses for step in steps) else 0.0
    steps.append(_direct(_rest(by_place, "far", known), far_s, "it is in a private network that may be another one"))
    return tuple(sorted((step for step in steps if step.addresses), key=lambda step: step.delay_s))


def parse(text: str) -> Address:
    """``text`` taken apart; what has another form keeps its text only."""
    outer, circuit, inner = text.partition(CIRCUIT)
    head, _, peer = outer.partition(_P2P)
    parts = head.split("/")
    zone = ""
    if parts[1:2] == ["ip6zone"] and len(parts) > 3:
        zone, parts = "%" + parts[2], ["", *parts[3:]]
    if len(parts) != 5 or parts[3] != "tcp" or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6"):
        return Address(text)
    named = PeerId(peer) if peer else None
    is_ip = parts[1] in ("ip4", "ip6") and _try_ip(parts[2]) is not None
    if not circuit:
        return Address(text, parts[2] + zone, is_ip, None, named)
    inner_peer = inner.removeprefix(_P2P)
    if named is None or CIRCUIT in inner or (inner and not inner.startswith(_P2P)):
        return Address(text)
    return Address(text, parts[2], is_ip, named, PeerId(inner_peer) if inner_peer else None)


def _rest(by_place: dict[Place, list[Address]], place: Place, known: Iterable[str]) -> list[Address]:
    return [each for each in by_place.get(place, ()) if each.text not in known]


def _direct(addresses: Iterable[Address], delay_s: float, why: str) -> Step:
    return Step("direct", tuple(each.text for each in addresses), delay_s, why)


def _circuits(found: Iterable[Address], target: PeerId, own: Own) -> list[Address]:
    """One address a relay: of those that are named, ours first; then the rest of ours."""
    chosen: dict[PeerId, Address] = {}
    for each in found:
        if each.relay not in (None, own.peer_id, target) and each.target in (None, target):
            chosen.setdefault(PeerId(str(each.relay)), each)
    ranked = sorted(chosen, key=lambda relay: own.relays.index(relay) if relay in own.relays else len(own.relays))
    for each in (parse(text.partition(CIRCUIT)[0] + CIRCUIT) for text in own.circuits):  # without us as the target
        if each.relay not in (None, own.peer_id, target, *chosen):
            chosen[PeerId(str(each.relay))] = each
            ranked.append(PeerId(str(each.relay)))
    return [chosen[relay] for relay in ranked][:MAX_RELAYS] if own.over_relays else []


def _is_here(given: Sequence[Address], own: Own) -> bool:
    """Whether the peer may be on this machine: it is where we are, or both of us tell loopback alone."""
    if any(each.host in own.ips for each in given if not each.relay and not leads_here(each.host)):
        return True
    hosts = [each.host for each in given if each.host]
    return own.here and bool(hosts) and all(leads_here(host) for host in hosts)


def _place(address: Address, own: Own, given: Sequence[Address]) -> Place:
    if address.relay is not None:
        return "circuit"
    if CIRCUIT in address.text or not address.host:
        return "odd" if CIRCUIT not in address.text else "circuit"
    if not address.is_ip:
        return "loopback" if leads_here(address.host) else "public"
    ip = ipaddress.ip_address(address.host.partition("%")[0])
    if leads_here(address.host):
        return "loopback"
    if not _is_private(ip):
        return "public"
    shares = any(each.host in own.external_ips for each in given if each.is_ip and not each.relay)
    return "near" if shares or not own.networks or ip.is_link_local or _in(ip, own.networks) else "far"


def _is_private(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_link_local or any(ip in net for net in _PRIVATE if net.version == ip.version)


def _in(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Sequence[str]) -> bool:
    nets = (ipaddress.ip_network(text, strict=False) for text in networks)
    return any(ip in net for net in nets if net.version == ip.version)


def _try_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


# RFC 1918, RFC 6598 (carriers), RFC 4193
_PRIVATE: Final = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
