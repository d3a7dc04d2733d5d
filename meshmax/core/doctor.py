"""What follows from what the doctor saw: findings, each with what to do. A pure function from facts.

Rules. Nothing is concluded from what is not known. A peer that can be reached by any rung is reached: what fails beside that
is a warning, and it is an error only where it keeps peers apart or loses something. One that is asked may be wrong, or lie:
what one peer alone says of our clock or our ports is said to be its word, what most of several say is taken for ours.
Each code has a row in docs/troubleshooting. Not here: how facts are gathered (services.doctor).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE, REFUSED_ADDRESS
from meshmax.base.doctor import (
    Diagnosis,
    Facts,
    Finding,
    LookedBack,
    MachineFacts,
    PeerFacts,
    PortKind,
    PortOutcome,
    RefusedPeer,
)
from meshmax.base.units import format_bytes
from meshmax.core.doctor_reach import REACH_CODES, ip_of, is_translated, reach_findings

CLOCK_ERROR_S: Final = 300.0  # certificates bear that much (base.membership)
CLOCK_WARNING_S: Final = 60.0
CLOCK_BACK_S: Final = 60.0
EXPIRES_SOON_S: Final = (
    7 * 86400.0
)  # renewed from a third of 30 days on: with a week left, three weeks brought no renewal
MDNS_STALE_S: Final = (
    150.0  # each asks at least once a minute: who was not heard for two and a half is not heard any more
)
DISK_ERROR_BYTES: Final = 64 << 20  # statuses, peers and certificates are still written, models no longer
DISK_WARNING_BYTES: Final = 2 << 30
CODES: Final = (
    "alone", "bootstrap_silent", "bootstrap_unused", "certificate_expired", "certificate_expiring",
    "clock_off", "clock_off_here", "clock_went_back",
    "copied_identity", "disk_full", "disk_low", "engine_missing", "given_unreached",
    "home_unusable", "identity_unusable", "lane_unreachable",
    "look_back_failed", "loopback_only", "mdns_failing", "mdns_one_way_here", "mdns_one_way_there", "mdns_socket", "membership",
    "nat", "no_bootstrap", "no_multicast", "no_network", "no_peer_running", "other_mesh", "peers_online", "port_taken",
    "port_unreachable", "refused", "rung_failing", "some_cannot_reach", "udp_lost", *REACH_CODES,
)  # fmt: skip

_OTHER_MESH: Final = ("different mesh", "another mesh")  # in what is said to a stranger (services.admission)
_UNREACHED_ISSUER: Final = "issuer was not reached"  # services.joining's
_NO_INTERFACE: Final = ("no interface", "interface is gone", "is the interface up")  # net.mdns's and net.mdns_problem's
_NO_DHT_NODE: Final = "no node of the DHT"  # net.dht's: being alone explains it
_ORDER: Final = {"error": 0, "warning": 1, "ok": 2}
_PORT_NAMES: Final[dict[PortKind, str]] = {"control": "TCP", "lane": "TCP", "udp": "UDP"}
_BAD: Final[frozenset[PortOutcome]] = frozenset({"refused", "silent", "unreachable", "lost"})


def diagnose(facts: Facts, took_s: float = 0.0) -> Diagnosis:
    """All findings, the worst first."""
    found = [*_machine(facts.machine, facts.peer)]
    if facts.peer is None:
        found.append(
            Finding(
                "no_peer_running",
                "warning",
                f"no peer runs on {facts.machine.home}: only what can be checked without one was checked",
                "start one with `meshmax peer`, and ask again",
            )
        )
    else:
        found += _peer(facts.peer, facts.machine)
    found.sort(key=lambda finding: _ORDER[finding.severity])
    return Diagnosis(all(finding.severity == "ok" for finding in found), tuple(found), facts, took_s)


def span(seconds: float) -> str:
    """A length of time in words of one unit: ``3 h``, ``12 min``, ``40 s``, ``5 days``."""
    whole = abs(seconds)
    for unit_s, name in ((2 * 86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if whole >= unit_s:
            return f"{round(whole / min(unit_s, 86400.0))} {name}"
    return f"{round(whole)} s"


# --- this machine --------------------------------------------------------------------------------------------------------


def _machine(machine: MachineFacts, peer: PeerFacts | None) -> Iterator[Finding]:
    if machine.home_problem:
        yield Finding("home_unusable", "error", machine.home_problem, "choose a folder that you may write, with --home")
    if machine.identity_problem:
        advice = "bring back a copy of identity.key, or remove the file and be a new peer"
        yield Finding("identity_unusable", "error", machine.identity_problem, advice)
    if machine.clock_back_s > CLOCK_BACK_S:
        yield Finding(
            "clock_went_back",
            "warning",
            f"the clock of this machine is {span(machine.clock_back_s)} behind the last use of this home",
            "set the clock; time synchronisation (NTP) keeps it right",
        )
    if not machine.networks:
        severity = "ok" if peer and peer.online else "error"
        advice = "" if severity == "ok" else "connect this machine: no cable, no Wi-Fi, or no address was given to it"
        yield Finding("no_network", severity, "this machine is on no network but its own loopback", advice)  # type: ignore[arg-type]
    if machine.mdns_problem and peer is None:
        advice = _mdns_advice(machine.mdns_problem, machine)
        yield Finding("mdns_socket", "warning", f"mDNS cannot work here: {machine.mdns_problem}", advice)
    yield from _disk(machine)
    if machine.engine_problem:
        advice = (
            "this peer stores and routes all the same; install the engine, or set `engine: {kind: none}` on purpose"
        )
        yield Finding("engine_missing", "warning", f"this peer runs no model itself: {machine.engine_problem}", advice)
    for each in machine.ports:
        if each.holder:
            text = f"port {each.port} ({each.what}) is held by {each.holder}: the next free one is used"
            yield Finding("port_taken", "ok", text)


def _mdns_advice(problem: str, machine: MachineFacts) -> str:
    if not machine.networks or any(words in problem for words in _NO_INTERFACE):
        return "bring the network up: plug in the cable, join the Wi-Fi, or switch the interface on"
    return "`ss -ulpn 'sport = 5353'` shows who has the port; multicast may not be allowed here, either"


def _disk(machine: MachineFacts) -> Iterator[Finding]:
    free = machine.disk_free_bytes
    if free is None or free >= DISK_WARNING_BYTES:
        return
    text = f"{format_bytes(free)} are free on the disk of {machine.home}"
    if free < DISK_ERROR_BYTES:
        advice = "make room: `meshmax sweep --free 10GB` removes what was used longest ago and others have"
        yield Finding("disk_full", "error", f"the disk is full: {text}", advice)
    else:
        yield Finding("disk_low", "warning", text, "`meshmax sweep --dry-run` shows what could go")


# --- a peer that runs ------------------------------------------------------------------------------------------------------


def _peer(peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    if unused := [node.address for node in peer.bootstrap if node.problem == BOOTSTRAP_OUTSIDE]:
        text = f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used: {BOOTSTRAP_OUTSIDE}"
        advice = (
            "" if peer.online else "`meshmax mesh new` makes a private mesh, `meshmax join` with a ticket enters one"
        )
        yield Finding("bootstrap_unused", "ok" if peer.online else "warning", text, advice)
        used = tuple(node for node in peer.bootstrap if node.problem != BOOTSTRAP_OUTSIDE)
        peer = msgspec.structs.replace(peer, bootstrap=used)
    elif not peer.bootstrap:
        yield _no_bootstrap(peer)
    yield from _company(peer, machine)
    yield from _given(peer)
    yield from _membership(peer)
    yield from _rungs(peer, machine)
    yield from _clocks(peer.looked_back)
    yield from reach_findings(peer, machine)
    yield from _ports(peer, machine)
    for told in peer.looked_back:
        yield from _one(told, peer, machine)


def _company(peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    if peer.online:
        names = ", ".join(told.name for told in peer.looked_back) or "none was asked"
        more = f" and {peer.not_asked} more that were not asked" if peer.not_asked else ""
        plural = "peer is" if peer.online == 1 else "peers are"
        yield Finding("peers_online", "ok", f"{peer.online} {plural} online: {names}{more}")
        return
    yield Finding("alone", "warning", "no other peer is online", _how_to_meet(peer))
    relayed = peer.reachability is not None and peer.reachability.relays
    if peer.control and all(_is_loopback(address) for address in peer.control) and machine.networks and not relayed:
        text = f"this peer takes connections from this machine alone ({', '.join(peer.control)})"
        yield Finding("loopback_only", "warning", text, "leave out `listen` (or --no-lan), so that others can reach it")


def _given(peer: PeerFacts) -> Iterator[Finding]:
    for given in peer.given:
        if not given.problem:
            continue
        if REFUSED_ADDRESS in given.problem:
            advice = "the open mesh lives on private addresses alone: make a mesh of your own with `meshmax mesh new`"
        else:
            advice = (
                "see that the peer runs there and has that address (`meshmax status`), and that nothing blocks the way"
            )
        yield Finding("given_unreached", "warning", f"{given.address} was not reached: {given.problem}", advice)


def _how_to_meet(peer: PeerFacts) -> str:
    if peer.mesh_problem or any(not _is_elsewhere(refused) for refused in peer.refused):
        return "settle first why this peer is not taken for a member, as said here"
    if any(given.problem for given in peer.given):
        return "the addresses given by --join are said here one by one"
    start = "start `meshmax peer` on another machine of this network"
    if peer.mesh:
        return f"{start} and `meshmax join` there with a ticket (`meshmax ticket` here)"
    return f"{start}; where no multicast passes, `meshmax peer --join ADDRESS` with an address of `meshmax status` over there"


def _membership(peer: PeerFacts) -> Iterator[Finding]:
    for copy in peer.copies:
        advice = "two machines have one identity: stop one, remove `identity.key` in its home, start it again"
        yield Finding("copied_identity", "error", copy, advice)
    yield from _refused(peer)
    if peer.mesh_problem:
        advice = "`meshmax ticket` at a member makes a ticket, `meshmax join` takes it; see that all clocks are right"
        if _UNREACHED_ISSUER in peer.mesh_problem:
            advice = "start the peer that gave the ticket, or check the way to it"
        yield Finding("membership", "error", peer.mesh_problem, advice)
    left_s = peer.certificate_left_s
    if left_s is not None and left_s <= 0:
        text = f"the certificate of this peer expired {span(left_s)} ago"
        advice = "get a ticket from a member with the scope admin (`meshmax ticket`), and `meshmax join` again; check the clock"
        yield Finding("certificate_expired", "error", text, advice)
    elif left_s is not None and left_s < EXPIRES_SOON_S:
        text = f"the certificate of this peer expires in {span(left_s)} and nobody renewed it"
        advice = "be connected with a member that may admit (scope admin), whose clock and ours are right: it renews by itself"
        yield Finding("certificate_expiring", "warning", text, advice)


def _is_elsewhere(refused: RefusedPeer) -> bool:
    return any(words in refused.reason for words in _OTHER_MESH)


def _refused(peer: PeerFacts) -> Iterator[Finding]:
    said: dict[str, list[str]] = {}
    for refused in peer.refused:
        name = refused.name or refused.peer_id[-8:]
        if _is_elsewhere(refused):
            name += f" at {refused.address}" if refused.address else ""
            severity = "ok" if peer.online else "warning"
            advice = "" if peer.online else "if it is yours: `meshmax ticket` there, `meshmax join TICKET` here"
            yield Finding("other_mesh", severity, f"{name} is in another mesh", advice)  # type: ignore[arg-type]
        elif refused.reason != peer.mesh_problem:
            said.setdefault(refused.reason, []).append(name)
    for reason, names in said.items():
        advice = (
            "follow what it says; `meshmax ticket` at a member and `meshmax join TICKET` here make a new certificate"
        )
        verb = "refuses" if len(names) == 1 else "refuse"
        yield Finding("refused", "warning", f"{', '.join(names)} {verb} this peer: {reason}", advice)


def _rungs(peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    for look in peer.rungs:
        report = look.report
        if report.state != "failing" or (not peer.online and report.problem.startswith(_NO_DHT_NODE)):
            continue
        if report.name == "mdns":
            advice = f"it is tried again by itself, and other rungs go on; {_mdns_advice(report.problem, machine)}"
            yield Finding("mdns_failing", "warning", f"mDNS does not work: {report.problem}", advice)
        elif report.name != "rendezvous" or not peer.bootstrap:  # its nodes are named one by one
            text = f"the rung {report.name} does not work: {report.problem}"
            yield Finding(
                "rung_failing", "warning", text, "it is tried again by itself; the sentence says what to change"
            )
    for node in peer.bootstrap:
        if node.problem:
            advice = (
                f"see that it runs (`meshmax bootstrap`) and that {_port_of(node.address)} can be reached from here"
            )
            whose = " (a ticket named it)" if node.source == "ticket" else ""
            text = f"the bootstrap node {node.address}{whose} does not answer: {node.problem}"
            yield Finding("bootstrap_silent", "warning", text, advice)


def _no_bootstrap(peer: PeerFacts) -> Finding:
    lonely = peer.mesh and not peer.online
    advice = "run `meshmax bootstrap` where all can reach it, and name it: --bootstrap ADDRESS" if lonely else ""
    text = "no bootstrap node is configured, nor did a ticket name one: only peers of this network, and given ones, are found"
    return Finding("no_bootstrap", "warning" if lonely else "ok", text, advice)


def _clocks(looked_back: Sequence[LookedBack]) -> Iterator[Finding]:
    told = [each for each in looked_back if each.clock_ahead_s is not None]
    off = [each for each in told if _clock_off_s(each) > CLOCK_WARNING_S]
    ahead = [each for each in off if (each.clock_ahead_s or 0.0) > 0]
    for group, word in ((ahead, "slow"), ([each for each in off if each not in ahead], "fast")):
        if len(told) >= 3 and 2 * len(group) > len(told):
            typical_s = sorted(_clock_off_s(each) for each in group)[len(group) // 2]
            text = f"the clock of this machine is {span(typical_s)} {word}: {len(group)} of {len(told)} peers say so"
            yield _clock(
                "clock_off_here", typical_s, text, "set this machine's clock; time synchronisation (NTP) keeps it right"
            )
            off = [each for each in off if each not in group]
    for each in off:
        word = "ahead of" if (each.clock_ahead_s or 0.0) > 0 else "behind"
        text = f"the clock of {each.name} is {span(_clock_off_s(each))} {word} this machine's: one of them is off"
        yield _clock(
            "clock_off",
            _clock_off_s(each),
            text,
            "set the one that is wrong; time synchronisation (NTP) keeps them right",
        )


def _clock(code: str, off_s: float, text: str, advice: str) -> Finding:
    return Finding(code, "error" if off_s > CLOCK_ERROR_S else "warning", text, advice)


def _clock_off_s(told: LookedBack) -> float:
    return max(abs(told.clock_ahead_s or 0.0) - told.uncertain_s, 0.0)


def _ports(peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    """Only the word of those between whom and us no NAT stands: that a NAT lets nobody in is usual, and no firewall's doing."""
    where = peer.reachability
    otherwise = where is not None and (where.relays or where.state in ("public", "mapped"))
    near = [told for told in peer.looked_back if not is_translated(told, peer, machine)]
    yield from _port(near, "control", "port_unreachable", "warning" if otherwise else "error")
    yield from _port(near, "lane", "lane_unreachable", "warning")
    yield from _port(near, "udp", "udp_lost", "warning")


def _port(looked_back: Sequence[LookedBack], kind: PortKind, code: str, severity: str) -> Iterator[Finding]:
    tried = [(told, port) for told in looked_back for port in told.ports if port.kind == kind]
    tried = [(told, port) for told, port in tried if port.outcome != "not_tried"]
    bad = [(told, port) for told, port in tried if port.outcome in _BAD]
    if not bad:
        return
    port, outcome = bad[0][1].port, bad[0][1].outcome
    name, who = f"{_PORT_NAMES[kind]} port {port}", ", ".join(told.name for told, _ in bad)
    advice = _open_port(name, outcome)
    if len(bad) < len(tried):
        yield Finding("some_cannot_reach", "warning", f"{who} cannot reach {name} of this machine, others can", advice)
        return
    effect = {
        "control": "peers can be met only by this one dialling them",
        "lane": "models that others fetch from here move more slowly",
        "udp": "this peer only asks in the DHT and is found there by nobody",
    }[kind]
    text = f"{name} of this machine cannot be reached from outside ({who}: {_heard(outcome)}): {effect}"
    yield Finding(code, severity, text, advice)  # type: ignore[arg-type]


def _heard(outcome: PortOutcome) -> str:
    return {"refused": "refused", "silent": "no answer", "lost": "the datagram did not arrive"}.get(
        outcome, "no way there"
    )


def _open_port(name: str, outcome: PortOutcome) -> str:
    kind, _, port = name.partition(" port ")
    if outcome == "refused":
        return "nobody listens there for others: leave out `listen` (or --no-lan), or have the router pass the port on"
    return (
        f"let {name} in: `ufw allow {port}/{kind.lower()}` here, and have the router pass it on if there is one between"
    )


# --- one peer that looked back -----------------------------------------------------------------------------------------


def _one(told: LookedBack, peer: PeerFacts, machine: MachineFacts) -> Iterator[Finding]:
    if told.why:
        text = f"{told.name} did not look back: {told.why}"
        yield Finding(
            "look_back_failed", "warning", text, "if it is an older meshmax, update it; else ask again in a moment"
        )
        return
    yield from _multicast(told, peer)
    if is_translated(told, peer, machine):
        yield Finding("nat", "ok", f"{told.name} sees this machine as {ip_of(told.address)}: a NAT stands between")


def _multicast(told: LookedBack, peer: PeerFacts) -> Iterator[Finding]:
    """Who of both sees the other by mDNS, where both climb that rung."""
    works = any(look.report.name == "mdns" and look.report.state == "working" for look in peer.rungs)
    if not works or "mdns" not in told.their_rungs:
        return
    ours, theirs = (
        any(seen.rung == "mdns" and seen.ago_s <= MDNS_STALE_S for seen in side) for side in (told.ours, told.theirs)
    )
    if ours and not theirs:
        text = (
            f"this peer sees {told.name} by mDNS, {told.name} does not see this one: UDP 5353 is blocked at {told.name}"
        )
        advice = f"at {told.name}: let UDP 5353 in (`ufw allow 5353/udp`)"
        yield Finding("mdns_one_way_there", "warning", text, advice)
    elif theirs and not ours:
        text = f"{told.name} sees this peer by mDNS, this one does not see {told.name}: UDP 5353 is blocked at this machine"
        yield Finding("mdns_one_way_here", "warning", text, "let UDP 5353 in here: `ufw allow 5353/udp`")
    elif not ours and _same_network(told, peer):
        text = (
            f"this peer and {told.name} are on one network, and neither sees the other by mDNS: it carries no multicast"
        )
        advice = "allow multicast between clients (Wi-Fi: switch off client isolation), or give one --join address"
        yield Finding("no_multicast", "warning", text, advice)


def _same_network(told: LookedBack, peer: PeerFacts) -> bool:
    """Whether both are in one IPv4 network of 256 addresses, as homes and offices have them; loopback is none."""
    seen = ip_of(told.address)
    if not seen or ":" in seen or _is_loopback(seen) or seen not in {ip_of(address) for address in peer.control}:
        return False
    net = ipaddress.IPv4Network(f"{seen}/24", strict=False)
    others = {ip_of(address) for each in told.ours for address in each.addresses} | {ip_of(told.at)}
    return any(ip and ":" not in ip and ipaddress.IPv4Address(ip) in net for ip in others)


def _port_of(address: str) -> str:
    """The port that a multiaddr names, in words."""
    port = (address.split("/") + [""] * 5)[4]
    return f"TCP and UDP {port} of it" if port.isdigit() else "it"


def _is_loopback(address: str) -> bool:
    ip = ip_of(address)
    return bool(ip) and ipaddress.ip_address(ip).is_loopback
