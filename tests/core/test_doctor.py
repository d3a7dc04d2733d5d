"""A table of cases: what was seen, and which findings follow."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE, RungReport, SeenBy
from meshmax.base.doctor import (
    BootstrapSeen,
    Diagnosis,
    Facts,
    GivenSeen,
    LocalPort,
    LookedBack,
    MachineFacts,
    PeerFacts,
    PortOutcome,
    PortSeen,
    RefusedPeer,
    RungLook,
)
from meshmax.base.ids import PeerId
from meshmax.base.reachability import NatBehaviour, Reachability
from meshmax.core.doctor import CODES, diagnose, span

B = PeerId("12D3KooWB")
MDNS = RungLook(RungReport("mdns", "working", found=1, first_found_s=0.1), 1, 0.1)
SAW = (SeenBy("mdns", ("/ip4/192.168.1.7/tcp/11435",), 1.0),)
MACHINE = MachineFacts("/home/me/.meshmax", ("192.168.1.5",), disk_free_bytes=100 << 30)
GOOD = LookedBack(
    B,
    "B",
    "in",
    ours=SAW,
    theirs=(SeenBy("mdns", ("/ip4/192.168.1.5/tcp/11435",), 1.0),),
    their_rungs=("cached", "mdns"),
    at="/ip4/192.168.1.7/tcp/40000",
    address="/ip4/192.168.1.5/tcp/11435",
    clock_ahead_s=0.01,
    uncertain_s=0.02,
    ports=(PortSeen("control", 11435, "open"), PortSeen("lane", 11436, "open"), PortSeen("udp", 11435, "arrived")),
)
PEER = PeerFacts(
    (MDNS,),
    online=1,
    looked_back=(GOOD,),
    bootstrap=(BootstrapSeen("/ip4/10.0.0.1/tcp/11435"),),
    control=("192.168.1.5:11435",),
)


def told(**changes: Any) -> LookedBack:
    return msgspec.structs.replace(GOOD, **changes)


def peer(*looked_back: LookedBack, **changes: Any) -> Facts:
    if looked_back:
        changes |= {"looked_back": looked_back, "online": len(looked_back)}
    return Facts(MACHINE, msgspec.structs.replace(PEER, **changes))


def machine(**changes: Any) -> Facts:
    return Facts(msgspec.structs.replace(MACHINE, **changes), PEER)


def alone(**changes: Any) -> Facts:
    return peer(online=0, looked_back=(), **changes)


def tried(control: PortOutcome = "open", lane: PortOutcome = "open", udp: PortOutcome = "arrived") -> LookedBack:
    ports = (PortSeen("control", 11435, control), PortSeen("lane", 11436, lane), PortSeen("udp", 11435, udp))
    return told(ports=ports)


def across() -> LookedBack:
    """A peer beyond our NAT, connected directly, that finds no port of ours."""
    ports = tuple(
        msgspec.structs.replace(port, outcome="lost" if port.kind == "udp" else "silent") for port in GOOD.ports
    )
    return told(address="/ip4/203.0.113.5/tcp/5000", at="/ip4/198.51.100.7/tcp/40000", ports=ports)


def relayed(for_s: float) -> LookedBack:
    ports = tuple(msgspec.structs.replace(port, outcome="not_tried") for port in GOOD.ports)
    return told(address="", at="", ports=ports, relayed_s=for_s)


def rung(name: str, state: str = "failing", problem: str = "no route to host") -> RungLook:
    return RungLook(RungReport(name, state, problem))  # type: ignore[arg-type]


def not_ok(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.code: finding.severity for finding in diagnosis.findings if finding.severity != "ok"}


HOURS_3 = 10_800.0
CARRIER = NatBehaviour("open", "address-and-port-dependent", "address-and-port-dependent", "address-and-port-dependent")
OTHER = RefusedPeer(B, "/ip4/192.168.1.7/tcp/11435", "the two peers are in different meshes")

CASES: list[tuple[str, Facts, dict[str, str]]] = [
    ("all is well", Facts(MACHINE, PEER), {}),
    ("no peer runs", Facts(MACHINE), {"no_peer_running": "warning"}),
    ("no peer runs and mdns cannot", Facts(msgspec.structs.replace(MACHINE, mdns_problem="address in use")),
     {"no_peer_running": "warning", "mdns_socket": "warning"}),
    ("alone", alone(), {"alone": "warning"}),
    ("alone on loopback", alone(control=("127.0.0.1:11435",)), {"alone": "warning", "loopback_only": "warning"}),
    ("alone on loopback, with a relay",
     alone(control=("127.0.0.1:11435",), reachability=Reachability("private", "x", relays=(B,))),
     {"alone": "warning"}),
    ("on loopback in company", peer(control=("127.0.0.1:11435",)), {}),
    ("alone, and no node of the DHT",
     alone(rungs=(MDNS, rung("dht", problem="no node of the DHT answers"))), {"alone": "warning"}),
    ("a given address is silent", alone(given=(GivenSeen("/a", "Connection refused"), GivenSeen("/b"))),
     {"alone": "warning", "given_unreached": "warning"}),
    ("alone in a private mesh", alone(mesh="m", bootstrap=()), {"alone": "warning", "no_bootstrap": "warning"}),
    ("no bootstrap on a lan", peer(bootstrap=()), {}),
    ("B does not see us", peer(told(theirs=())), {"mdns_one_way_there": "warning"}),
    ("B saw us long ago", peer(told(theirs=(SeenBy("mdns", (), 600.0),))), {"mdns_one_way_there": "warning"}),
    ("we do not see B", peer(told(ours=())), {"mdns_one_way_here": "warning"}),
    ("neither sees the other", peer(told(ours=(), theirs=())), {"no_multicast": "warning"}),
    ("neither, in two networks", peer(told(ours=(), theirs=(), at="/ip4/192.168.9.7/tcp/1")), {}),
    ("neither, on loopback",
     peer(told(ours=(), theirs=(), at="/ip4/127.0.0.1/tcp/1", address="/ip4/127.0.0.1/tcp/2"), control=("127.0.0.1:1",)), {}),
    ("B does not climb mdns", peer(told(theirs=(), their_rungs=("cached",))), {}),
    ("our mdns fails", peer(told(ours=()), rungs=(rung("mdns"),)), {"mdns_failing": "warning"}),
    ("our mdns is off", peer(told(ours=()), rungs=(rung("mdns", "off", "--no-lan"),)), {}),
    ("another rung fails", peer(rungs=(MDNS, rung("dht"))), {"rung_failing": "warning"}),
    ("a bootstrap node is silent",
     peer(rungs=(MDNS, rung("rendezvous")), bootstrap=(BootstrapSeen("/a"), BootstrapSeen("/b", "refused"))),
     {"bootstrap_silent": "warning"}),
    ("a bootstrap node outside, in the open mesh",
     alone(rungs=(MDNS, rung("rendezvous", "off", BOOTSTRAP_OUTSIDE)), bootstrap=(BootstrapSeen("/b", BOOTSTRAP_OUTSIDE),),
           reachability=Reachability()), {"alone": "warning", "bootstrap_unused": "warning"}),
    ("the same in company", peer(bootstrap=(BootstrapSeen("/b", BOOTSTRAP_OUTSIDE),)), {}),
    ("another mesh, alone", alone(refused=(OTHER,)), {"alone": "warning", "other_mesh": "warning"}),
    ("another mesh, in company", peer(refused=(OTHER,)), {}),
    ("revoked", peer(refused=(RefusedPeer(B, "", "your certificate was revoked"),)), {"refused": "warning"}),
    ("clock off by three hours", peer(told(clock_ahead_s=HOURS_3)), {"clock_off": "error"}),
    ("clock off by two minutes", peer(told(clock_ahead_s=-120.0)), {"clock_off": "warning"}),
    ("clock off within what is certain", peer(told(clock_ahead_s=61.0, uncertain_s=2.0)), {}),
    ("our clock off, most say", peer(*[told(clock_ahead_s=HOURS_3)] * 3), {"clock_off_here": "error"}),
    ("one of three clocks off", peer(told(), told(), told(clock_ahead_s=HOURS_3)), {"clock_off": "error"}),
    ("clocks off in both directions", peer(told(clock_ahead_s=HOURS_3), told(clock_ahead_s=-HOURS_3)), {"clock_off": "error"}),
    ("port refused", peer(tried("refused")), {"port_unreachable": "error"}),
    ("port silent", peer(tried("silent")), {"port_unreachable": "error"}),
    ("one of two cannot reach the port", peer(tried("silent"), tried()), {"some_cannot_reach": "warning"}),
    ("lane silent", peer(tried(lane="silent")), {"lane_unreachable": "warning"}),
    ("udp lost", peer(tried(udp="lost")), {"udp_lost": "warning"}),
    ("nothing tried", peer(tried("not_tried", "not_tried", "not_tried")), {}),
    ("no look back", peer(told(why="it did not answer", ports=(), clock_ahead_s=None)), {"look_back_failed": "warning"}),
    ("nat", peer(told(address="/ip4/203.0.113.5/tcp/5000")), {}),
    ("copied", peer(copies=("another machine has our identity",)), {"copied_identity": "error"}),
    ("membership", peer(mesh_problem="the certificate was revoked"), {"membership": "error"}),
    ("certificate expires soon", peer(certificate_left_s=86400.0), {"certificate_expiring": "warning"}),
    ("certificate expired", peer(certificate_left_s=-5.0), {"certificate_expired": "error"}),
    ("certificate fresh", peer(certificate_left_s=20 * 86400.0), {}),
    ("disk full", machine(disk_free_bytes=1), {"disk_full": "error"}),
    ("disk low", machine(disk_free_bytes=1 << 30), {"disk_low": "warning"}),
    ("engine missing", machine(engine_problem="xllamacpp is not installed"), {"engine_missing": "warning"}),
    ("home", machine(home_problem="it cannot be written"), {"home_unusable": "error"}),
    ("identity", machine(identity_problem="identity.key is damaged"), {"identity_unusable": "error"}),
    ("clock went back", machine(clock_back_s=HOURS_3), {"clock_went_back": "warning"}),
    ("no network, in company", machine(networks=()), {}),
    ("no network, alone", Facts(msgspec.structs.replace(MACHINE, networks=()), alone().peer),
     {"alone": "warning", "no_network": "error"}),
    ("reached from outside", peer(reachability=Reachability("public", "two say so"), mesh="m"), {}),
    ("nobody was asked", peer(reachability=Reachability(), bootstrap=()), {}),
    ("nobody answered", alone(reachability=Reachability()), {"alone": "warning", "reachability_unknown": "warning"}),
    ("nobody answered, in company", peer(reachability=Reachability()), {}),
    ("behind a nat, with a relay", peer(reachability=Reachability("private", "dropped", relays=(B,)), mesh="m"), {}),
    ("behind a nat, without one", peer(reachability=Reachability("private", "dropped"), mesh="m"),
     {"unreachable": "warning"}),
    ("behind a nat, in the open mesh", peer(reachability=Reachability("private", "dropped")), {}),
    ("a port that a relay makes up for", peer(tried("silent"), reachability=Reachability("private", "x", relays=(B,))),
     {"port_unreachable": "warning"}),
    ("udp is blocked", peer(reachability=Reachability("public", "x", NatBehaviour(udp="blocked"))), {"udp_blocked": "warning"}),
    ("a carrier's nat, with direct paths", peer(reachability=Reachability("private", "x", CARRIER, relays=(B,))), {}),
    ("a carrier's nat, alone", alone(reachability=Reachability("private", "x", CARRIER, relays=(B,))),
     {"alone": "warning", "nat_changes_ports": "warning"}),
    ("punched through a nat, ports closed",
     peer(across(), mesh="m", reachability=Reachability("private", "x", relays=(B,)), relays=("box",)), {}),
    ("punched through a nat, no relay", peer(across(), mesh="m", reachability=Reachability("private", "x")), {}),
    ("punched through a nat, the bootstrap node is down",
     peer(across(), mesh="m", reachability=Reachability("unknown", "nobody answered"),
          bootstrap=(BootstrapSeen("/b", "refused"),)), {"bootstrap_silent": "warning"}),
    ("nobody can be met",
     alone(mesh="m", reachability=Reachability("private", "x"), bootstrap=(BootstrapSeen("/b", "refused"),)),
     {"alone": "warning", "bootstrap_silent": "warning", "unreachable": "error"}),
    ("over a relay", peer(relayed(60.0), mesh="m", reachability=Reachability("private", "x", CARRIER, relays=(B,))),
     {"no_direct_path": "warning", "nat_changes_ports": "warning"}),
    ("over a relay a moment ago", peer(relayed(3.0), mesh="m"), {}),
    ("a carrier's nat with a mapping", peer(reachability=Reachability("mapped", "x", CARRIER)), {}),
    ("a nat that changes udp ports alone",
     peer(reachability=Reachability("private", "x", msgspec.structs.replace(CARRIER, tcp_mapping="endpoint-independent"))), {}),
    ("port taken", machine(ports=(LocalPort("API", 11434, "Ollama"), LocalPort("peers", 11435))), {}),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_was_seen_leads_to_findings(facts: Facts, expected: dict[str, str]) -> None:
    diagnosis = diagnose(facts)
    assert not_ok(diagnosis) == expected
    assert diagnosis.well == (not expected)
    for finding in diagnosis.findings:
        assert finding.code in CODES
        assert finding.sentence
        assert finding.severity == "ok" or finding.advice


def test_every_code_is_reached_by_a_case() -> None:
    reached = {finding.code for _, facts, _ in CASES for finding in diagnose(facts).findings}
    assert reached == set(CODES)


def test_the_worst_comes_first() -> None:
    order = [finding.severity for finding in diagnose(ALL).findings]
    assert order == sorted(order, key=["error", "warning", "ok"].index)


ALL = Facts(
    msgspec.structs.replace(MACHINE, disk_free_bytes=1, engine_problem="x"), msgspec.structs.replace(PEER, online=1)
)


def sentences(facts: Facts) -> str:
    return "\n".join(f"{finding.sentence} -> {finding.advice}" for finding in diagnose(facts).findings)


def test_sentences_say_who_and_what_to_do() -> None:
    assert "this peer sees B by mDNS, B does not see this one: UDP 5353 is blocked at B" in sentences(
        peer(told(theirs=()))
    )
    assert "in another mesh" in sentences(alone(refused=(OTHER,)))
    assert "the clock of B is 3 h behind this machine's" in sentences(peer(told(clock_ahead_s=-HOURS_3)))
    assert "this machine is 3 h slow: 3 of 3" in sentences(peer(*[told(clock_ahead_s=HOURS_3)] * 3))
    learnt = sentences(peer(bootstrap=(BootstrapSeen("/b", "refused", "ticket"),)))
    assert "the bootstrap node /b (a ticket named it) does not answer: refused" in learnt
    silent = sentences(peer(tried("silent")))
    assert "TCP port 11435 of this machine cannot be reached from outside" in silent
    assert "ufw allow 11435/tcp" in silent
    assert "leave out `listen`" in sentences(peer(tried("refused")))
    assert "meshmax join" in sentences(alone(mesh="m"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (-10_800, "3 h"), (86_400, "24 h"), (3 * 86_400, "3 days")],
)
def test_lengths_of_time_have_one_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_advice_fits_the_case() -> None:
    assert "TCP and UDP 7001 of it" in sentences(peer(bootstrap=(BootstrapSeen("/ip4/10.0.0.1/tcp/7001", "silent"),)))
    foreign = GivenSeen("/ip4/8.8.8.8/tcp/1", "this mesh does not connect to that address")
    assert "meshmax mesh new" in sentences(alone(given=(foreign,)))
    assert "start the peer that gave the ticket" in sentences(
        alone(mesh_problem="not joined yet: the ticket's issuer was not reached (tried once)")
    )


def test_one_refusal_by_several_is_said_once_by_their_names() -> None:
    refusals = tuple(RefusedPeer(B, "/a", "your certificate was revoked", name) for name in ("ann", "bob"))
    told_all = sentences(alone(mesh="m", refused=refusals))
    assert "ann, bob refuse this peer: your certificate was revoked" in told_all
    assert "(`meshmax ticket` here)" not in told_all
    assert (
        "refuse"
        not in sentences(alone(refused=refusals, mesh_problem="your certificate was revoked")).partition("settle")[0]
    )


def test_a_sighting_by_mdns_counts_for_two_and_a_half_minutes() -> None:
    for ago_s, expected in ((150.0, {}), (151.0, {"mdns_one_way_there": "warning"})):
        assert not_ok(diagnose(peer(told(theirs=(SeenBy("mdns", (), ago_s),))))) == expected


def test_a_peer_over_a_relay_is_named_with_why_and_what_helps() -> None:
    natted = (
        (NatBehaviour(udp="blocked"), "UDP is blocked"),
        (CARRIER, "the NAT uses another port for every destination"),
        (NatBehaviour("open", "endpoint-independent"), "the NAT keeps its ports"),
        (NatBehaviour(), "the NAT is not known"),
    )
    for nat, why in natted:
        for theirs, their_why in (*natted, (None, "the NAT is not known")):
            other = msgspec.structs.replace(relayed(60.0), nat=theirs)
            said = sentences(peer(other, reachability=Reachability("private", "x", nat, relays=(B,))))
            assert f"no direct path to B was found (here {why}; at B {their_why})" in said
            assert "models are limited to 32 MiB an hour" in said
            assert "UPnP or NAT-PMP" in said
            assert "TCP 11435" in said
            assert "a NAT stands between" not in said


def test_a_nat_with_relays_is_one_sentence_that_names_them() -> None:
    where = Reachability("private", "x", relays=(B,))
    said = sentences(peer(across(), mesh="m", reachability=where, relays=("203.0.113.9",)))
    assert "as behind any NAT; peers reach it over relay 203.0.113.9 and go on to direct paths" in said
    assert "ufw" not in said


def test_mdns_without_a_network_is_told_to_bring_one_up_not_to_look_for_who_has_the_port() -> None:
    lonely = msgspec.structs.replace(MACHINE, networks=())
    for facts in (
        alone(rungs=(rung("mdns", problem="no interface is up"),)),
        alone(rungs=(rung("mdns", problem="eth0: the network is not reachable: is the interface up?"),)),
        Facts(msgspec.structs.replace(lonely, mdns_problem="UDP 5353: No such device")),
    ):
        assert "bring the network up" in sentences(facts)
        assert "ss -ulpn" not in sentences(facts)
    assert "ss -ulpn" in sentences(alone(rungs=(rung("mdns", problem="UDP port 5353 is held by another program"),)))


def test_a_bootstrap_node_that_is_not_used_is_not_said_to_be_missing() -> None:
    outside = alone(bootstrap=(BootstrapSeen("/b", BOOTSTRAP_OUTSIDE),))
    assert f"/b is not used: {BOOTSTRAP_OUTSIDE}" in sentences(outside)
    assert "no bootstrap node is configured" not in sentences(outside)
    assert "does not answer" not in sentences(outside)
