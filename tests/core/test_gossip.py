"""Who tells whom what: notices of neighbours, wants and bodies; word of a peer goes two hops and ends with it."""

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus
from meshmax.core.clones import Clones
from meshmax.core.gossip import DOUBT_S, MAX_PENDING, PEEK_S, PUSH_BYTES, WANT_AGAIN_S, Gossip, NewsLog
from meshmax.core.peers import PeerTable
from meshmax.wire.status import GONE, MAX_WANTS, key_of

IDS = [peer_id_of(bytes([n]) * 32) for n in range(1, 60)]


class Peer:
    """The cores of one peer, and its neighbours in a mesh of such."""

    def __init__(self, peer_id: PeerId, limit: int = 64) -> None:
        self.peer_id = peer_id
        self.table = PeerTable(peer_id, limit, random.Random(peer_id))
        self.gossip = Gossip(peer_id, self.table, Clones("own"))
        self.statuses: dict[bytes, PeerStatus] = {}
        self.sequence = 0

    def issue(self, size: int = 100, leaving: bool = False) -> None:
        self.sequence += 1
        status = PeerStatus(
            self.peer_id, self.sequence, 0, "x", "0", instance="i", changed=self.sequence, leaving=leaving
        )
        payload = self.peer_id.encode() + self.sequence.to_bytes(4, "big") + bytes(size)
        BODIES[payload] = status
        self.gossip.on_own(status, Signed(self.peer_id, payload, bytes(64)))


BODIES: dict[bytes, PeerStatus] = {}


class Mesh:
    def __init__(self, count: int, limit: int = 64) -> None:
        self.peers = [Peer(peer_id, limit) for peer_id in IDS[:count]]
        self.links: set[tuple[int, int]] = set()
        self.now = 0.0
        self.bodies = 0
        for peer in self.peers:
            peer.issue()

    def join(self, a: int, b: int) -> None:
        self.links |= {(a, b), (b, a)}
        for one, other in ((a, b), (b, a)):
            self.peers[one].table.on_connected(IDS[other], "", self.now)
            self.peers[one].gossip.on_connected(IDS[other])

    def part(self, a: int, b: int) -> None:
        self.links -= {(a, b), (b, a)}
        for one, other in ((a, b), (b, a)):
            self.peers[one].table.on_disconnected(IDS[other], self.now)
            self.peers[one].gossip.on_disconnected(IDS[other])

    def beat(self, rounds: int = 1) -> None:
        """Everybody sends everything to all neighbours, as often."""
        for _ in range(rounds):
            self.now += 2.0
            sent = deque((a, b, self.peers[a].gossip.message_for(IDS[b], self.now)) for a, b in sorted(self.links))
            for a, b, out in sent:
                gossip = self.peers[b].gossip
                for signed in out.statuses:
                    self.bodies += 1
                    if not gossip.is_known(signed, IDS[a]) and gossip.is_welcome(signed, IDS[a]):
                        gossip.on_status(BODIES[signed.payload], signed, IDS[a], self.now)
                gossip.on_notices(IDS[a], out.notices, self.now)
                gossip.on_wants(IDS[a], out.wants)
            for peer in self.peers:
                peer.table.tick(self.now)

    def sequence(self, peer: int, of: int) -> int | None:
        entry = self.peers[peer].table.entry(IDS[of])
        return entry.status.sequence if entry and entry.status else None


def line(count: int) -> Mesh:
    mesh = Mesh(count)
    for n in range(count - 1):
        mesh.join(n, n + 1)
    mesh.beat(4)
    return mesh


def test_word_of_a_peer_goes_to_its_neighbours_and_theirs_and_no_further() -> None:
    mesh = line(4)
    assert [mesh.sequence(peer, 0) for peer in (1, 2, 3)] == [1, 1, None]


def test_news_reach_who_keeps_the_peer_and_nothing_is_said_twice() -> None:
    mesh = line(3)
    before = mesh.bodies
    mesh.beat(5)
    assert mesh.bodies == before
    mesh.peers[0].issue()
    mesh.beat(4)
    assert [mesh.sequence(peer, 0) for peer in (1, 2)] == [2, 2]
    assert mesh.bodies == before + 2


def test_a_peer_that_nobody_vouches_for_any_more_is_forgotten() -> None:
    mesh = line(3)
    mesh.part(0, 1)
    mesh.beat(5)
    assert mesh.peers[2].table.entry(IDS[0]) is None


def test_a_body_that_was_not_wanted_is_not_looked_at_and_one_that_was_is_taken_once() -> None:
    mesh = Mesh(2)
    mesh.join(0, 1)
    gossip = mesh.peers[0].gossip
    stranger = Signed(IDS[9], b"x", bytes(64))
    assert not gossip.is_welcome(stranger, IDS[1])
    assert gossip.is_welcome(Signed(IDS[1], b"its own", bytes(64)), IDS[1])
    assert gossip.is_welcome(Signed(IDS[0], b"ours, as a copy of us would sign", bytes(64)), IDS[1])
    gossip.on_notices(IDS[1], [(key_of(IDS[9]), 1)], 10.0)
    assert not gossip.is_welcome(stranger, IDS[1])  # not asked for yet
    assert gossip.message_for(IDS[1], 10.0).wants == [key_of(IDS[9])]
    assert not gossip.is_welcome(stranger, IDS[5])  # nobody else was asked
    assert gossip.is_welcome(stranger, IDS[1])
    assert not gossip.is_welcome(stranger, IDS[1])


def test_a_neighbour_that_names_thousands_and_brings_none_fills_nothing() -> None:
    mesh = Mesh(2, limit=100_000)
    mesh.join(0, 1)
    gossip = mesh.peers[0].gossip
    for beat in range(100):
        gossip.on_notices(IDS[1], [((beat * 1000 + n).to_bytes(8, "big"), 1) for n in range(1000)], beat * 2.0)
        assert len(gossip.message_for(IDS[1], beat * 2.0).wants) <= MAX_WANTS
    assert len(gossip._neighbours[IDS[1]].awaited) <= MAX_PENDING
    assert len(gossip._asked) <= MAX_PENDING


def test_a_neighbour_whose_own_status_is_lacking_is_asked_for_it_first_and_not_with_each_message() -> None:
    mesh = Mesh(2)
    mesh.join(0, 1)
    gossip, own = mesh.peers[0].gossip, key_of(IDS[1])
    assert gossip.message_for(IDS[1], 0.0).wants == []  # it is about to tell it
    gossip.on_notices(IDS[1], [(n.to_bytes(8, "big"), 1) for n in range(1000)], 0.0)
    wants = gossip.message_for(IDS[1], 0.0).wants
    assert (wants[0], len(wants)) == (own, MAX_WANTS)
    assert gossip.message_for(IDS[1], 2.0).wants == []
    assert gossip.message_for(IDS[1], WANT_AGAIN_S).wants == [own]
    mesh.beat(2)
    assert mesh.sequence(0, 1) == 1
    assert gossip.message_for(IDS[1], 60.0).wants == []


def test_a_farewell_is_known_to_all_who_keep_the_peer_and_no_old_word_brings_it_back() -> None:
    mesh = line(3)
    mesh.peers[0].issue(leaving=True)
    mesh.beat(1)
    mesh.part(0, 1)
    mesh.beat(4)
    for peer in (1, 2):
        entry = mesh.peers[peer].table.entry(IDS[0])
        assert entry
        assert entry.leaving
        assert entry.dial_at is None
        assert all(shown.peer_id != IDS[0] for shown in mesh.peers[peer].table.shown(mesh.now))
    old = Signed(IDS[0], b"old", bytes(64))
    assert not mesh.peers[2].gossip.on_status(PeerStatus(IDS[0], 1, 0, "x", "0", changed=1), old, IDS[1], mesh.now)


def test_a_large_status_is_named_first_and_fetched_once() -> None:
    mesh = Mesh(2)
    mesh.join(0, 1)
    mesh.beat(3)
    mesh.peers[0].issue(PUSH_BYTES + 1)
    out = mesh.peers[0].gossip.message_for(IDS[1], mesh.now)
    assert out.statuses == ()
    assert out.notices == [(key_of(IDS[0]), 2)]
    mesh.peers[0].gossip.start_afresh(IDS[1])
    mesh.beat(4)
    assert mesh.sequence(1, 0) == 2


def test_a_full_table_looks_at_one_unknown_peer_now_and_then() -> None:
    mesh = Mesh(2, limit=2)
    mesh.join(0, 1)
    mesh.beat(2)
    gossip = mesh.peers[0].gossip
    mesh.peers[0].table.on_sighting(IDS[30], ["/ip4/10.0.0.1/tcp/1"], 0.0)
    strangers = [(key_of(peer), 1) for peer in IDS[10:20]]
    gossip.on_notices(IDS[1], strangers, 10.0)
    assert len(gossip.message_for(IDS[1], 10.0).wants) == 1
    gossip.on_notices(IDS[1], strangers, 10.0 + PEEK_S)
    assert len(gossip.message_for(IDS[1], 10.0 + PEEK_S).wants) == 1


def test_what_a_neighbour_itself_does_not_tell_for_seconds_is_wanted_of_others() -> None:
    mesh = Mesh(3)
    mesh.join(0, 1)
    mesh.join(0, 2)
    mesh.beat(3)
    gossip = mesh.peers[0].gossip
    gossip.on_notices(IDS[1], [(key_of(IDS[2]), 9)], mesh.now)
    assert gossip.message_for(IDS[1], mesh.now).wants == []
    assert gossip.message_for(IDS[1], mesh.now + DOUBT_S).wants == [key_of(IDS[2])]


def test_a_neighbour_that_begins_afresh_is_told_all_of_who_is_there_and_nothing_of_who_is_gone() -> None:
    mesh = line(3)
    mesh.part(1, 2)
    gossip = mesh.peers[1].gossip
    assert (key_of(IDS[2]), GONE) in gossip.message_for(IDS[0], mesh.now).notices
    gossip.on_fresh(IDS[0])
    out = gossip.message_for(IDS[0], mesh.now)
    assert [notice for notice in out.notices if notice[1] == GONE] == []
    assert [signed.signer for signed in out.statuses] == [IDS[1]]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=60), st.integers(0, 60))
def test_a_log_tells_the_newest_of_each_key_that_changed_since(changes: list[tuple[int, int]], at: int) -> None:
    log: NewsLog[int] = NewsLog(8)
    for n, (key, value) in enumerate(changes):
        if n == at:
            version = log.version
            log_then = dict(changes[:n])
        log.put(bytes([key]), value)
    if at < len(changes):
        told = log.since(version)
        assert len({key for key, _ in told}) == len(told) <= 8
        latest = {bytes([key]): value for key, value in changes}
        assert all(latest[key] == value for key, value in told)
        if len({key for key, _ in changes}) <= 8:
            merged = {bytes([key]): value for key, value in log_then.items()} | dict(told)
            assert merged == latest


EVENTS = st.lists(
    st.tuples(st.sampled_from(["join", "part", "issue", "beat"]), st.integers(0, 6), st.integers(0, 6)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_whatever_happened_neighbours_agree_in_the_end_and_no_ghost_stays(
    events: list[tuple[str, int, int]],
) -> None:
    mesh = Mesh(7)
    for kind, a, b in events:
        if kind == "join" and a != b and (a, b) not in mesh.links:
            mesh.join(a, b)
        elif kind == "part" and (a, b) in mesh.links:
            mesh.part(a, b)
        elif kind == "issue":
            mesh.peers[a].issue()
        elif kind == "beat":
            mesh.beat()
    mesh.beat(12)
    for a, b in mesh.links:
        assert mesh.sequence(a, b) == mesh.peers[b].sequence
    for a in range(7):
        near = {b for (c, b) in mesh.links if c == a}
        for b in set(range(7)) - near - {a}:
            entry = mesh.peers[a].table.entry(IDS[b])
            assert entry is None or not entry.connected
            if entry is not None and not entry.seen:
                assert any((c, b) in mesh.links for c in near)
