"""What the doctor says of how this machine stands to its NAT. A pure function from facts, as core.doctor.

Rules. Behind a NAT all can be well: what a peer lacks is said, with what is used instead. Nothing is an error here but a peer in
a mesh of its own that neither others nor relays reach. Not here: ports as neighbours find them (core.doctor).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final

from meshmax.base.doctor import Finding, LookedBack, MachineFacts, PeerFacts
from meshmax.base.reachability import NatBehaviour, Reachability
from meshmax.base.units import MIB
from meshmax.core.relay_quota import RELAY_BLOB_BYTES

REACH_CODES: Final = (
    "nat_changes_ports", "no_direct_path", "reachable", "reachability_unknown", "relayed_only", "udp_blocked", "unreachable",
)  # fmt: skip
SETTLE_S: Final = 15.0  # after the first connection, for a direct path: what is tried takes under ten seconds
_CIRCUIT: Final = "/p2p-circuit"
_FORWARD: Final = "have the router pass the port on (UPnP does it by itself), for direct connections from everywhere"


def reach_findings(peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    """Nothing where nobody was asked because there is nobody to ask: that is said of the bootstrap nodes."""
    yield from _over_relays(peer)
    where = peer.reachability
    if where is None or (where.state == "unknown" and not where.external_ips and not peer.bootstrap):
        return
    yield from _reached(where, peer, machine)
    if where.nat.udp == "blocked":
        text = "this network lets no UDP out: no DHT, and connections through NAT by TCP and relays alone"
        yield Finding(
            "udp_blocked", "warning", text, "let UDP out in the network's firewall; without it all still works"
        )
    if changes_ports(where.nat) and where.state != "public":
        text = "the NAT of this network uses another port for every destination: some peers may be met over relays only"
        met = where.state == "mapped" or (peer.online and not _stuck(peer))  # all that are here now have direct paths
        yield Finding("nat_changes_ports", "ok" if met else "warning", text, "" if met else _FORWARD)


def changes_ports(nat: NatBehaviour) -> bool:
    """Whether neither UDP nor TCP can be told beforehand how it leaves (RFC 4787, 4.1), as far as that was seen."""
    seen = [each for each in (nat.mapping, nat.tcp_mapping) if each != "unknown"]
    return bool(seen) and all(each != "endpoint-independent" for each in seen)


def ip_of(address: str) -> str:
    """The IP address in a multiaddr or IP:PORT; '' where there is none, and of a way over a relay, which is not the peer's."""
    if _CIRCUIT in address:
        return ""
    parts = address.split("/")
    text = parts[2] if len(parts) > 2 else address.rpartition(":")[0].strip("[]") or address
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def is_translated(told: LookedBack, peer: PeerFacts, machine: MachineFacts) -> bool:
    """Whether a NAT stands between us and who looked back, as far as it can be known: of loopback and links it cannot."""
    seen = ip_of(told.address)
    if not seen or seen in {*machine.networks, *(ip_of(address) for address in peer.control)}:
        return False
    address = ipaddress.ip_address(seen)
    return not (address.is_loopback or address.is_link_local)


def _reached(where: Reachability, peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    # Those that are met although a NAT is between.
    across = [each.name for each in peer.looked_back if is_translated(each, peer, machine)]
    if where.state in ("public", "mapped"):
        yield Finding("reachable", "ok", f"others outside reach this peer: {where.why}")
    elif where.relays or (where.state == "private" and across):
        text = "no one outside reaches this machine's ports by themselves, as behind any NAT; "
        if where.relays:
            through = ", ".join(peer.relays or where.relays)
            text += f"peers reach it over relay{'s' * (len(where.relays) > 1)} {through} and go on to direct paths"
        else:
            text += f"there are direct paths to {', '.join(across)}"
        yield Finding("relayed_only", "ok", text)
    elif where.state == "unknown":
        text = f"it is not known whether others outside reach this peer: {where.why}"
        advice = "" if peer.online else "see that a bootstrap node runs and can be reached from here"
        yield Finding("reachability_unknown", "ok" if peer.online else "warning", text, advice)
    elif peer.mesh:
        text = f"nobody outside connects to this peer ({where.why}), and no relay keeps a place for it"
        text += f"; {where.mapping_why}" if where.mapping_why and not where.mappings else ""
        advice = f"name a bootstrap node that relays (--bootstrap), or {_FORWARD}"
        nobody = not peer.online and all(node.problem for node in peer.bootstrap)
        yield Finding("unreachable", "error" if nobody else "warning", text, advice)


def _stuck(peer: PeerFacts) -> list[LookedBack]:
    return [each for each in peer.looked_back if each.relayed_s is not None and each.relayed_s >= SETTLE_S]


def _over_relays(peer: PeerFacts) -> Iterator[Finding]:
    """Each connected peer to which there was time for a direct path, and none was found."""
    stuck = _stuck(peer)
    if not stuck:
        return
    why = [f"here {_nat_words(peer.reachability.nat if peer.reachability else None)}"]
    why += [f"at {each.name} {_nat_words(each.nat)}" for each in stuck]
    text = f"no direct path to {', '.join(each.name for each in stuck)} was found ({'; '.join(why)}): "
    text += f"prompts work over a relay, models are limited to {RELAY_BLOB_BYTES // MIB} MiB an hour"
    advice = (
        "one of these at either side: UPnP or NAT-PMP switched on in the router, TCP 11435 forwarded to the peer, or a peer"
        " or bootstrap node with a public address that both can reach"
    )
    yield Finding("no_direct_path", "warning", text, advice)


def _nat_words(nat: NatBehaviour | None) -> str:
    if nat is None:
        return "the NAT is not known"
    if nat.udp == "blocked":
        return "UDP is blocked"
    if changes_ports(nat):
        return "the NAT uses another port for every destination"
    return (
        "the NAT keeps its ports"
        if "endpoint-independent" in (nat.mapping, nat.tcp_mapping)
        else "the NAT is not known"
    )
