"""Thousands of pairs behind simulated NATs, in virtual time: the verdicts are the laboratory's, and nothing is left over."""

import itertools
import random
from functools import partial

import msgspec
import pytest

from meshmax.base.ids import PeerId
from meshmax.base.traversal import Candidate
from meshmax.core.attempt_actions import Means, Send
from meshmax.core.candidates import Screen
from meshmax.core.dial_plan import Own, dial_plan
from meshmax.testing.sim_dial import CONTROL_PORT, SimDial, listen
from meshmax.testing.sim_nat import KINDS, SimHost, SimInternet, SimNat
from meshmax.testing.sim_traversal import STUN, TCP_OBSERVER, SimSide, SimSignals
from meshmax.wire.signal import Answer, Offer, Trickle

A, B = PeerId("12D3KooWA"), PeerId("12D3KooWB")
IPS = {A: "198.51.100.1", B: "203.0.113.1"}
SITES = ("open", *(name for name in KINDS if name != "hairpin"))
STRICT = {"port", "reject", "noudp", "sym"}  # they let in only what was sent to: this address and port
CASES = 25  # of each pair of kinds


class Case:
    """Two peers, each in a site of some kind, and a connection over which they signal."""

    def __init__(
        self, a: str, b: str, seed: int, *, cut_at: float | None = None, jitter_s: float | None = None
    ) -> None:
        self.random = random.Random(f"{a} {b} {seed}")
        self.kinds = {A: a, B: b}
        self.net = SimInternet(self.random, self.random.choice((0.0, 0.002, 0.02)) if jitter_s is None else jitter_s)
        self.nats = {us: SimNat(KINDS[kind], IPS[us], self.random) for us, kind in self.kinds.items() if kind in KINDS}
        self.hosts = {us: self._host(us) for us in (A, B)}
        way_s = sum(host.latency_s for host in self.hosts.values()) + self.random.choice((0.0, 0.01, 0.1))
        self.signals = SimSignals(self.net, way_s, self.random.choice((0.0, 0.01, 0.05)), cut_at)
        self.sides = {us: self._side(us, other) for us, other in ((A, B), (B, A))}

    def _host(self, us: PeerId) -> SimHost:
        nat = self.nats.get(us)
        ip = f"192.168.{1 if us == A else 2}.10" if nat else IPS[us]
        return self.net.host(ip, nat, self.random.uniform(0.001, 0.06))

    def _side(self, us: PeerId, other: PeerId) -> SimSide:
        host, udp = self.hosts[us], self.kinds[us] not in ("noudp", "corp")
        known = self.random.random() < 0.5  # that UDP is blocked was learnt before
        means = Means(tcp=True, udp=udp or not known)
        return SimSide(us, other, host, self.signals, self.screen(us, other), means)

    def screen(self, us: PeerId, other: PeerId) -> Screen:
        ip = self.hosts[us].ip
        subnets = (ip.rpartition(".")[0] + ".0/24",) if us in self.nats else ()
        peer = self.hosts[other]
        external = frozenset({self.hosts[us].outer_ip})
        return Screen(lambda at: at == peer.outer_ip, subnets=subnets, own=frozenset({ip}), external=external)

    def run(self, *wishers: PeerId, within_s: float = 0.0) -> None:
        """Let them wish for a path, all within some time of each other, and wait until everything is over."""
        for us in wishers:
            self.net.at(self.random.random() * within_s, self.sides[us].want)
        self.net.run(60.0)

    def check(self, *, agreed: bool = True) -> str | None:
        """What must always hold; the path that came of it. Not ``agreed``: the last word of a handshake may have been lost."""
        for side in self.sides.values():
            assert not side.core.attempts, "an attempt is left over"
            assert not side.runs
            for end in side.paths.values():
                assert end.outcome == "made" or end.tried, "a failure says what was tried"
        a, b = self.sides[A], self.sides[B]
        if agreed:
            assert [path for path, _, _ in a.adopted] == [path for path, _, _ in b.adopted], "both have the same paths"
        allowed = {self.hosts[us].outer_ip for us in (A, B)} | {TCP_OBSERVER[0], STUN[0]}
        for sender, to in self.net.contacts:
            assert to[0] in allowed, f"{sender} sent to a third party: {to}"
        for side in (a, b):
            for wish in side.wishes:
                assert wish is None or wish in [path for path, _, _ in side.adopted]
        return a.adopted[-1][0] if a.adopted else None


def expected(a: str, b: str) -> str | None:
    """The path that the laboratory shows: TCP before UDP."""
    if "corp" in (a, b):
        return None  # nothing but ports 80 and 443 gets out, and who punches has another
    if "sym" in (a, b) and STRICT.issuperset((a, b)):
        return None
    return "punched-tcp"


def udp_expected(a: str, b: str) -> bool:
    return not {"noudp", "corp"} & {a, b} and not ("sym" in (a, b) and STRICT.issuperset((a, b)))


PAIRS = list(itertools.combinations_with_replacement(SITES, 2))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_a_pair_gets_the_path_that_the_laboratory_shows_and_both_agree(a: str, b: str) -> None:
    for seed in range(CASES):
        case = Case(a, b, seed)
        leader = case.random.choice((A, B))
        case.run(leader)
        assert case.check() == expected(a, b), (a, b, seed)
        assert case.sides[leader].wishes == [expected(a, b)]
        for path, _, at_s in case.sides[leader].adopted:
            assert path == "punched-tcp"
            assert at_s < 1.0 + 6 * case.signals.latency_s  # three ways of signalling, a handshake, a lost first SYN


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_without_tcp_a_pair_gets_the_path_by_udp_that_the_laboratory_shows(a: str, b: str) -> None:
    for seed in range(CASES):
        case = Case(a, b, seed)
        for side in case.sides.values():
            side.means = Means(tcp=False, udp=side.means.udp)
        leader = case.random.choice((A, B))
        case.run(leader)
        assert case.check() == ("punched-udp" if udp_expected(a, b) else None), (a, b, seed)
        for _, _, at_s in case.sides[leader].adopted:
            assert at_s < 5.0


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_whoever_wants_it_and_when_glare_ends_in_one_path(a: str, b: str) -> None:
    for seed in range(CASES):
        case = Case(a, b, seed)
        case.run(A, B, within_s=case.random.choice((0.0, 0.01, 0.1, 1.0)))
        assert case.check() == expected(a, b), (a, b, seed)
        for side in case.sides.values():
            assert side.wishes == [expected(a, b)]
            assert len(side.adopted) <= 1


FAULTY = [("port", "port"), ("full", "sym"), ("port", "sym"), ("noudp", "noudp"), ("reject", "addr"), ("open", "corp")]


@pytest.mark.parametrize(("a", "b"), FAULTY)
def test_when_the_relay_dies_in_the_middle_both_still_agree_and_nothing_is_left(a: str, b: str) -> None:
    made = 0
    for seed in range(4 * CASES):
        case = Case(a, b, seed, cut_at=random.Random(seed).uniform(0.0, 1.5))
        case.run(*case.random.choice(((A,), (B,), (A, B))), within_s=0.2)
        path = case.check()
        assert path in (None, expected(a, b), "punched-udp")
        made += path is not None
        assert all(len(side.wishes) <= 1 for side in case.sides.values())
    assert (made > CASES) == (expected(a, b) is not None), "what was agreed on goes on without the relay"


@pytest.mark.parametrize(("a", "b"), FAULTY)
def test_when_a_nat_forgets_its_mappings_the_next_attempt_gets_through(a: str, b: str) -> None:
    for seed in range(2 * CASES):
        case = Case(a, b, seed)
        for nat in list(case.nats.values())[: case.random.choice((1, 2))]:
            case.net.at(case.random.uniform(0.0, 1.5), nat.rebind)
        case.run(A, B, within_s=0.2)
        case.check(agreed=False)
        for side in case.sides.values():
            side.adopted.clear()
            side.wishes.clear()
            side.means = Means(tcp=True, udp=False)
        case.net.now += 60.0
        case.net.after(0.0, case.sides[A].want)
        case.net.run(200.0)
        assert case.check() == expected(a, b), (a, b, seed)


@pytest.mark.parametrize(("a", "b"), FAULTY)
def test_when_both_networks_change_in_the_middle_attempts_begin_again_and_get_through(a: str, b: str) -> None:
    for seed in range(2 * CASES):
        case = Case(a, b, seed)
        at_s = case.random.uniform(0.0, 1.2)
        for side in case.sides.values():
            case.net.at(at_s + case.random.choice((0.0, 0.0, 0.05)), side.change_network)
        case.run(A, B, within_s=0.1)
        case.check(agreed=False)  # who withdrew in the last word of a handshake has begun again, too
        assert [len(side.wishes) for side in case.sides.values()] == [1, 1]
        for side in case.sides.values():
            assert (side.adopted[-1][0] if side.adopted else None) == expected(a, b), (a, b, seed)


@pytest.mark.parametrize("kind", ["port", "sym", "hairpin", "noudp", "corp"])
def test_two_peers_behind_one_nat_meet_inside(kind: str) -> None:
    for seed in range(CASES):
        case = Case("port", "port", seed)
        nat = SimNat(KINDS[kind], IPS[A], case.random)
        for number, us in enumerate((A, B)):
            case.hosts[us].nat, case.hosts[us].ip = nat, f"192.168.1.{10 + number}"
            case.hosts[us].latency_s = 0.001
        case.nats = {A: nat, B: nat}
        case.sides = {us: case._side(us, other) for us, other in ((A, B), (B, A))}
        case.run(A)
        a, b = (case.sides[us].adopted for us in (A, B))
        assert [path for path, _, _ in a] == [path for path, _, _ in b] == ["punched-tcp"]
        assert {to[0] for _, to in case.net.contacts} <= {"192.168.1.10", "192.168.1.11", IPS[A], STUN[0]}


def test_lanes_are_made_beside_each_other_and_beside_a_control_path() -> None:
    for seed in range(CASES):
        case = Case("port", "full", seed)
        for _ in range(3):
            case.net.after(case.random.random() * 0.2, partial(case.sides[A].lead, "lane"))
        case.run(A, B, within_s=0.2)
        case.check(agreed=False)
        for side in case.sides.values():
            assert [path for path, _, _ in side.adopted] == ["punched-tcp"] * 4


def test_in_the_laboratorys_latencies_a_path_is_there_within_half_a_second() -> None:
    for a, b in (("port", "port"), ("full", "sym"), ("noudp", "noudp"), ("reject", "port")):
        case = Case(a, b, 1)
        for host in case.hosts.values():
            host.latency_s = 0.01
        case.signals.latency_s = 0.04  # to the relay and on
        case.run(A)
        assert case.check() == "punched-tcp"
        assert case.sides[A].adopted[0][2] < 0.6


THIRD_PARTIES = (
    ("192.0.2.77", 8080), ("203.0.113.200", 443), ("127.0.0.1", 11434), ("10.0.0.1", 8080), ("192.168.1.1", 8443),
    ("192.168.1.255", 4000), ("192.168.2.1", 4000), ("169.254.169.254", 80), ("224.0.0.251", 5353), ("::1", 11435),
    ("::ffff:127.0.0.1", 11435), ("192.168.1.10", 11435), ("192.168.2.10", 11435), ("198.51.100.1", 22), ("0.0.0.0", 4000),
)  # fmt: skip


class Liar(SimSide):
    """Puts third parties among its candidates, of TCP and in its SDPs."""

    def tell(self, send: Send, *, from_lead: bool, not_before: float = 0.0) -> None:
        message = send.message
        if isinstance(message, Offer | Answer | Trickle):
            chosen = self.net.random.choices(THIRD_PARTIES, k=8)
            candidates = tuple(Candidate("srflx", "tcp", ip, port) for ip, port in chosen)
            lines = "".join(f"a=candidate:1 1 udp 1 {ip} {port} typ srflx\r\n" for ip, port in chosen)
            text = message.sdp + lines if message.sdp else ""
            message = msgspec.structs.replace(message, candidates=(*message.candidates, *candidates), sdp=text)
        super().tell(Send(send.attempt, message), from_lead=from_lead, not_before=not_before)


@pytest.mark.parametrize(("a", "b"), [("port", "port"), ("open", "full"), ("addr", "open"), ("sym", "port")])
def test_a_candidate_that_points_at_a_third_party_is_never_sent_a_packet(a: str, b: str) -> None:
    for seed in range(2 * CASES):
        case = Case(a, b, seed)
        honest = case.sides[A]
        liar = Liar(B, A, case.hosts[B], case.signals, case.screen(B, A), Means(tcp=True, udp=True))
        case.sides[B] = liar
        case.run(*case.random.choice(((A,), (B,), (A, B))))
        contacts = {to for sender, to in case.net.contacts if sender == honest.host.ip}
        assert not contacts & set(THIRD_PARTIES)
        assert case.check() == expected(a, b), "and the true ones among them still count"


# --- from the first dial on ------------------------------------------------------------------------------------------

RELAY = "/ip4/198.18.0.1/tcp/443/p2p/12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq/p2p-circuit/p2p/"
IDS = {
    A: "12D3KooWRTaYaLZDZgq8ygKRwEsZFJC4DT9h4UTvVwwWEsCBHQ5V",
    B: "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8",
}


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_from_the_first_dial_on_every_pair_is_connected_soon_and_moves_to_the_best_path(a: str, b: str) -> None:
    for seed in range(10):
        case = Case(a, b, seed)
        for host in case.hosts.values():
            host.latency_s = 0.01
            listen(host)
        case.signals.latency_s = 0.04
        us, other = case.random.choice(((A, B), (B, A)))
        at: dict[str, float] = {}

        def connected(path: str, case: Case = case, us: PeerId = us, at: dict[str, float] = at) -> None:
            at[path] = case.net.now
            if path == "relay":
                case.sides[us].want()

        theirs, ours = case.hosts[other], case.hosts[us]
        own = Own(PeerId(IDS[us]), (ours.ip,), (ours.ip.rpartition(".")[0] + ".0/24",), (ours.outer_ip,))
        told = [f"/ip4/{theirs.ip}/tcp/{CONTROL_PORT}", RELAY + IDS[other]]
        SimDial(ours, 0.16, connected).run(dial_plan(PeerId(IDS[other]), told, own))
        case.net.run(60.0)
        usable_s = min(at.values())
        assert usable_s < 0.5, "over a relay if not directly"
        reachable = case.kinds[other] == "open" and case.kinds[us] != "corp"
        final = "direct" if "direct" in at else case.sides[us].adopted[-1][0] if case.sides[us].adopted else "relay"
        assert final == ("direct" if reachable else expected(a, b) or "relay"), (a, b, seed)
        if final == "punched-tcp":
            assert case.sides[us].adopted[0][2] < 1.5
