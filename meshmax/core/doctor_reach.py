"""What the doctor says of how this machine stands to its NAT. A pure function from facts, as core.doctor.

Rules. Behind a NAT all can be well: what a peer lacks is said, with what is used instead. Nothing is an error here but a peer in
a mesh of its own that neither others nor relays reach. Not here: ports as neighbours find them (core.doctor).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from meshmax.base.doctor import Finding, PeerFacts
from meshmax.base.reachability import NatBehaviour, Reachability

REACH_CODES: Final = (
    "nat_changes_ports", "reachable", "reachability_unknown", "relayed_only", "udp_blocked", "unreachable",
)  # fmt: skip
_FORWARD: Final = "have the router pass the port on (UPnP does it by itself), for direct connections from everywhere"


def reach_findings(peer: PeerFacts) -> Iterator[Finding]:
    """Nothing where nobody was asked because there is nobody to ask: that is said of the bootstrap nodes."""
    where = peer.reachability
    if where is None or (where.state == "unknown" and not where.external_ips and not peer.bootstrap):
        return
    yield from _reached(where, peer)
    if where.nat.udp == "blocked":
        text = "this network lets no UDP out: no DHT, and connections through NAT by TCP and relays alone"
        yield Finding(
            "udp_blocked", "warning", text, "let UDP out in the network's firewall; without it all still works"
        )
    if changes_ports(where.nat) and where.state != "public":
        text = "the NAT of this network uses another port for every destination: some peers are met over relays only"
        yield Finding("nat_changes_ports", "ok" if where.state == "mapped" else "warning", text, _FORWARD)


def changes_ports(nat: NatBehaviour) -> bool:
    """Whether neither UDP nor TCP can be told beforehand how it leaves (RFC 4787, 4.1), as far as that was seen."""
    seen = [each for each in (nat.mapping, nat.tcp_mapping) if each != "unknown"]
    return bool(seen) and all(each != "endpoint-independent" for each in seen)


def _reached(where: Reachability, peer: PeerFacts) -> Iterator[Finding]:
    if where.state in ("public", "mapped"):
        yield Finding("reachable", "ok", f"others outside reach this peer: {where.why}")
    elif where.state == "unknown":
        text = f"it is not known whether others outside reach this peer: {where.why}"
        advice = "" if peer.online else "see that a bootstrap node runs and can be reached from here"
        yield Finding("reachability_unknown", "ok" if peer.online else "warning", text, advice)
    elif where.relays:
        many = f"{len(where.relays)} relays keep" if len(where.relays) > 1 else "a relay keeps"
        text = f"nobody outside connects to this peer directly ({where.why}); {many} a place for it, so it is met all the same"
        yield Finding("relayed_only", "ok", text)
    elif peer.mesh:
        text = f"nobody outside connects to this peer ({where.why}), and no relay keeps a place for it"
        text += f"; {where.mapping_why}" if where.mapping_why and not where.mappings else ""
        advice = f"name a bootstrap node that relays (--bootstrap), or {_FORWARD}"
        yield Finding("unreachable", "warning", text, advice)
