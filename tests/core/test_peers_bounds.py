"""The table of peers under any sequence of events: bounds, dials at once, ghosts; partitions; refusals; enough neighbours."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.model import Signed
from meshmax.base.status import MAX_ADDRESSES, PeerStatus, Vitals
from meshmax.core.neighbours import MAX_NEIGHBOURS, NEIGHBOURS, TRIALS
from meshmax.core.peers import (
    CANARY_BACKOFF_S,
    DIALS_AT_ONCE,
    GONE_AFTER_S,
    GOSSIP_DIALS,
    MAX_BACKOFF_S,
    REFUSED_S,
    RESERVED,
    SPREAD_S,
    PeerTable,
)

IDS = [peer_id_of(n.to_bytes(32, "big")) for n in range(200)]
OWN, LIMIT = IDS[0], 24


def at(number: int) -> str:
    return f"/ip4/10.0.{number // 256}.{number % 256}/tcp/1"


def table(limit: int = 256) -> PeerTable:
    return PeerTable(OWN, limit, random.Random(7))


def said(peer: PeerId, sequence: int, leaving: bool = False) -> tuple[PeerStatus, Signed]:
    status = PeerStatus(peer, sequence, 0, "x", "0", addresses=(at(sequence % 5),), changed=sequence, leaving=leaving)
    return status, Signed(peer, sequence.to_bytes(8, "big"), bytes(64))


KINDS = [
    "sight",
    "hear",
    "name",
    "connect",
    "lose",
    "fail",
    "refuse",
    "beat",
    "say",
    "told",
    "untold",
    "leave",
    "vitals",
    "tick",
]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 60), st.floats(0.0, 8.0)), max_size=150)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_no_sequence_of_events_breaks_a_bound_or_shows_a_ghost(events: list[tuple[str, int, float]]) -> None:
    peers, now, sequence = table(LIMIT), 0.0, 0
    alive: dict[PeerId, float] = {}
    for kind, number, pause_s in events:
        now, sequence, peer = now + pause_s, sequence + 1, IDS[number]
        connected = (entry := peers.entry(peer)) is not None and entry.connected
        if kind in ("sight", "name"):
            peers.on_sighting(peer, [at(number)], now, named=kind == "name")
        elif kind == "connect":
            peers.on_connected(peer, at(number), now)
            alive[peer] = now
        elif kind == "lose":
            peers.on_disconnected(peer, now)
        elif kind == "fail":
            peers.on_dial_failed(peer, now)
        elif kind == "refuse":
            peers.on_refused(peer, at(number), "another mesh", now)
        elif kind == "beat" and connected:
            peers.on_round_trip(peer, 0.01, now)
            alive[peer] = now
        elif kind in ("hear", "say", "leave"):
            peers.on_status(*said(peer, sequence, kind == "leave"), bearer=IDS[61] if kind == "hear" else peer, now=now)
        elif kind in ("told", "untold") and entry:
            peers.on_told(entry, IDS[62], there=kind == "told")
        elif kind == "vitals":
            peers.on_vitals(peer, Vitals("", sequence, 0))
        elif kind == "tick":
            peers.review(now)
        peers.tick(now)
        check(peers, alive, now)


def check(peers: PeerTable, alive: dict[PeerId, float], now: float) -> None:
    entries = list(peers.entries())
    connected = [entry for entry in entries if entry.connected]
    dialing = [entry for entry in entries if entry.dialing]
    assert len(entries) <= max(LIMIT, len(connected) + len(dialing) + 1)
    assert len(dialing) <= DIALS_AT_ONCE
    # One that is heard of first and seen later counts no more, one that is dialled stays.
    assert sum(not (entry.seen or entry.named) for entry in dialing) <= GOSSIP_DIALS
    assert not any(entry.connected and entry.dialing for entry in entries)
    for entry in peers.shown(now):
        assert entry.peer_id != OWN
        assert not entry.leaving
        assert entry.connected or now - alive[entry.peer_id] <= GONE_AFTER_S
    deadline = peers.deadline()
    assert deadline is None or deadline > now  # who serves the table sleeps: what is due was given out


def test_who_has_enough_neighbours_dials_no_more_but_whom_a_person_named() -> None:
    peers = table()
    for number in range(1, 100):
        peers.on_sighting(IDS[number], [at(number)], 0.0)
    met = 0
    now = 5.0
    while dials := peers.tick(now):
        for dial in dials:
            peers.on_connected(dial.peer_id, "", now, chosen=True)
            met += 1
    assert met == NEIGHBOURS
    assert peers.deadline() is None
    peers.on_sighting(IDS[150], [at(150)], now, asked=True)
    assert [dial.peer_id for dial in peers.tick(now + 2.0)] == [IDS[150]]


def test_enough_neighbours_are_tried_out_against_others_one_by_one() -> None:
    peers = table()
    for number in range(1, 100):
        peers.on_sighting(IDS[number], [at(number)], 0.0)
    now = 5.0
    for _ in range(200):
        for dial in peers.tick(now):
            peers.on_connected(dial.peer_id, "", now, chosen=True)
            peers.on_round_trip(dial.peer_id, IDS.index(dial.peer_id) / 1000, now)
        for gone in peers.review(now):
            peers.on_disconnected(gone, now)
        now += 5.0
        connected = [entry for entry in peers.entries() if entry.connected]
        assert now < 20.0 or NEIGHBOURS - 1 <= len(connected) <= NEIGHBOURS + TRIALS + 1
    assert sum(entry.peer_id in IDS[1:40] for entry in connected) >= 20  # the near ones were found


def test_the_most_neighbours_are_kept_whoever_comes() -> None:
    peers = table()
    for number in range(1, 150):
        peers.on_connected(IDS[number], "", 0.0)
    for gone in peers.review(1.0):
        peers.on_disconnected(gone, 1.0)
    assert sum(entry.connected for entry in peers.entries()) == MAX_NEIGHBOURS


def lose_all(count: int) -> PeerTable:
    peers = table()
    for number in range(1, count + 1):
        peers.on_sighting(IDS[number], [at(number)], 0.0)
        peers.on_connected(IDS[number], "", 0.0)
        peers.on_round_trip(IDS[number], 0.01, 1.0)
    for number in range(1, count + 1):
        peers.on_disconnected(IDS[number], 8.0)
    return peers


def test_some_of_the_lost_are_dialled_every_few_seconds_for_hours_and_the_others_seldom() -> None:
    peers, now, dials = lose_all(30), 8.0, 0
    while now < 3600.0:
        now = max(now + 0.01, peers.deadline() or now)
        if now > 3000.0:
            dials += len(peers.tick(now))
        else:
            peers.tick(now)
        for entry in list(peers.entries()):
            peers.on_dial_failed(entry.peer_id, now + 5.0)
    assert 8 * 600 / (CANARY_BACKOFF_S + 5) / 2 < dials < 8 * 600 / 2.0 + 22 * 600 / (MAX_BACKOFF_S / 2)


def test_when_one_that_was_lost_is_met_again_all_are_dialled_within_moments() -> None:
    peers, now = lose_all(16), 8.0
    for _ in range(400):
        now = max(now, peers.deadline() or now)
        for dial in peers.tick(now):
            peers.on_dial_failed(dial.peer_id, now)
    peers.on_connected(IDS[3], "", now)
    met = {IDS[3]}
    while (due := peers.deadline()) is not None:
        assert due <= now + SPREAD_S
        for dial in peers.tick(due):
            met.add(dial.peer_id)
            peers.on_connected(dial.peer_id, "", due)
    assert len(met) == 16


def test_who_refused_us_is_dialled_again_after_minutes_or_at_a_new_address() -> None:
    peers = table()
    peers.on_sighting(IDS[1], [at(1)], 0.0)
    peers.tick(5.0)
    peers.on_refused(IDS[1], at(1), "another mesh", 5.0)
    assert [(refusal.reason, refusal.at) for refusal in peers.refused()] == [("another mesh", 5.0)]
    peers.on_sighting(IDS[1], [at(1)], 100.0)
    due = peers.deadline()
    assert due is not None
    assert due >= 5.0 + REFUSED_S
    peers.on_sighting(IDS[1], [at(2)], 101.0)
    assert peers.tick(103.0)
    assert peers.refused() == ()
    peers.clear()
    assert peers.deadline() is None


def test_a_flood_of_made_up_peers_holds_up_no_dial_of_another_kind() -> None:
    peers = table()
    peers.on_sighting(IDS[199], [at(199)], 0.0)
    peers.on_connected(IDS[199], at(199), 0.0)
    peers.on_round_trip(IDS[199], 0.01, 0.0)
    peers.on_disconnected(IDS[199], 1.0)
    for number in range(1, 100):
        peers.on_sighting(IDS[number], [at(number)], 1.0, named=True)
    assert (
        len(peers.tick(1.0 + MAX_BACKOFF_S)) == DIALS_AT_ONCE - 2 * RESERVED - 1
    )  # one more is kept for such as were lost
    assert peers.entry(IDS[199]).dialing  # type: ignore[union-attr]
    peers.on_sighting(IDS[150], [at(150)], 70.0)
    assert IDS[150] in [dial.peer_id for dial in peers.tick(75.0)]
    peers.on_status(*said(IDS[151], 1), bearer=IDS[1], now=75.0)
    assert IDS[151] in [dial.peer_id for dial in peers.tick(80.0)]


def test_peers_that_a_list_names_push_none_out_that_was_seen() -> None:
    peers = table(4)
    peers.on_sighting(IDS[1], [at(1)], 0.0)
    peers.on_sighting(IDS[2], [at(2)], 0.0)
    for number in range(10, 60):
        peers.on_sighting(IDS[number], [at(number)], 5.0, named=True)
    assert peers.entry(IDS[1])
    assert peers.entry(IDS[2])
    assert peers.entry(IDS[59])
    peers.on_status(*said(IDS[150], 1), bearer=IDS[1], now=6.0)
    assert not peers.entry(IDS[150])  # hearsay takes no place of one that is named
    peers.on_sighting(IDS[3], [at(3)], 6.0)
    peers.on_sighting(IDS[4], [at(4)], 6.0)
    assert all(peers.entry(IDS[number]) for number in range(1, 5))


def test_addresses_that_a_peer_signed_are_dialled_whatever_is_announced_in_its_name() -> None:
    peers = table()
    status, signed = said(IDS[5], 1)
    peers.on_status(status, signed, bearer=IDS[1], now=0.0)
    peers.on_sighting(IDS[5], [at(number) for number in range(50, 80)], 1.0)
    (dial,) = peers.tick(5.0)
    assert set(status.addresses) < set(dial.addresses)
    assert dial.addresses[0] == at(50)  # one that moved is found: what was said last comes first
    assert len(dial.addresses) == MAX_ADDRESSES


def test_one_that_said_farewell_and_is_named_by_a_list_again_is_dialled() -> None:
    peers = table()
    peers.on_connected(IDS[5], at(5), 0.0)
    peers.on_status(*said(IDS[5], 3, leaving=True), bearer=IDS[5], now=1.0)
    peers.on_disconnected(IDS[5], 1.0)
    peers.on_status(*said(IDS[5], 2), bearer=IDS[1], now=2.0)  # others' old words do not bring it back
    assert not peers.tick(10.0)
    peers.on_sighting(IDS[5], [at(77)], 10.0, named=True)
    assert [dial.peer_id for dial in peers.tick(12.0)] == [IDS[5]]
