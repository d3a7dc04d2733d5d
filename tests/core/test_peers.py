"""The table of peers: newest wins, who dials whom when, what is forgotten."""

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, Sha256, peer_id_of
from meshmax.base.model import Signed
from meshmax.base.status import Load, ModelPresence, PeerStatus, Wait, vitals_of
from meshmax.core.peers import GONE_AFTER_S, GOSSIP_DIALS, LOST_S, MAX_BACKOFF_S, YIELD_S, Dial, PeerTable

IDS = sorted(peer_id_of(bytes([n]) * 32) for n in range(1, 40))
LOW, HIGH = IDS[0], IDS[-1]
ADDRESS = "/ip4/10.0.0.1/tcp/1"


def table(own: PeerId, limit: int = 16) -> PeerTable:
    return PeerTable(own, limit, random.Random(1))


def status(peer: PeerId, sequence: int, *addresses: str) -> tuple[PeerStatus, Signed]:
    return PeerStatus(peer, sequence, 0, "x", "0", addresses=addresses), Signed(peer, b"x" * 10, bytes(64))


def test_the_smaller_id_dials_at_once_and_the_larger_waits_a_moment() -> None:
    low, high = table(LOW), table(HIGH)
    low.on_sighting(HIGH, [ADDRESS], now=0.0)
    high.on_sighting(LOW, [ADDRESS], now=0.0)
    assert low.tick(0.0) == [Dial(HIGH, (ADDRESS,))]
    assert high.tick(0.0) == []
    assert high.deadline() == YIELD_S
    assert high.tick(YIELD_S) == [Dial(LOW, (ADDRESS,))]


def test_a_peer_is_not_dialled_twice_at_once_nor_while_connected() -> None:
    peers = table(LOW)
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    assert peers.tick(0.0)
    peers.on_sighting(HIGH, [ADDRESS, "/ip4/10.0.0.2/tcp/1"], now=0.1)
    assert not peers.tick(0.2)
    peers.on_connected(HIGH, ADDRESS, now=0.3)
    assert not peers.tick(100.0)
    assert peers.deadline() is None


def test_failed_dials_back_off_and_a_new_address_starts_afresh() -> None:
    peers = table(LOW)
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    now = 0.0
    waits = []
    for _ in range(12):
        assert peers.tick(now)
        peers.on_dial_failed(HIGH, now)
        due = peers.deadline()
        assert due is not None
        waits.append(due - now)
        peers.on_sighting(HIGH, [ADDRESS], now)  # the same address again is no news
        assert peers.deadline() == due
        now = due
    assert waits[0] <= 2.0
    assert MAX_BACKOFF_S / 2 <= waits[-1] <= MAX_BACKOFF_S
    peers.tick(now)
    peers.on_dial_failed(HIGH, now)
    peers.on_sighting(HIGH, ["/ip4/10.0.0.9/tcp/9"], now)
    assert peers.deadline() == now


def test_a_lost_peer_is_shown_as_left_for_some_seconds_and_dialled_again() -> None:
    peers = table(LOW)
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    peers.tick(0.0)
    peers.on_connected(HIGH, ADDRESS, now=0.0)
    peers.on_round_trip(HIGH, 0.01, now=4.0)
    peers.on_disconnected(HIGH, now=5.0)
    assert [entry.connected for entry in peers.shown(6.0)] == [False]
    assert peers.tick(7.0)
    peers.on_dial_failed(HIGH, now=8.0)
    assert peers.shown(4.1 + GONE_AFTER_S) == []
    assert [entry.peer_id for entry in peers.lost(600.0)] == [HIGH]  # what it had is still told
    peers.tick(600.0)
    assert [entry.peer_id for entry in peers.lost(600.0)] == [HIGH]
    assert peers.lost(4.1 + LOST_S) == []
    peers.on_connected(HIGH, ADDRESS, now=601.0)
    assert peers.lost(601.0) == []


def test_a_peer_that_connects_but_never_answers_a_heartbeat_is_dialled_ever_more_seldom() -> None:
    peers = table(LOW)
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    now, waits = 0.0, []
    for _ in range(10):
        assert peers.tick(now)
        peers.on_connected(HIGH, ADDRESS, now)
        peers.on_disconnected(HIGH, now)
        due = peers.deadline()
        assert due is not None
        waits.append(due - now)
        now = due
    assert waits[0] <= 1.0
    assert waits[-1] >= MAX_BACKOFF_S / 2
    peers.tick(now)
    peers.on_connected(HIGH, ADDRESS, now)
    peers.on_round_trip(HIGH, 0.01, now)
    peers.on_disconnected(HIGH, now)
    due = peers.deadline()
    assert due is not None
    assert due - now <= 1.0  # it is one of us after all


@given(st.permutations(range(6)))
def test_the_newest_status_wins_in_whatever_order_they_come(order: list[int]) -> None:
    peers = table(LOW)
    for sequence in order:
        peers.on_status(*status(HIGH, sequence), bearer=HIGH, now=0.0)
    entry = peers.entry(HIGH)
    assert entry and entry.status and entry.status.sequence == 5


def test_the_table_is_bounded_and_never_drops_a_connected_peer() -> None:
    peers = table(LOW, limit=4)
    peers.on_connected(IDS[1], ADDRESS, now=0.0)
    for n, peer in enumerate(IDS[2:]):
        peers.on_sighting(peer, [ADDRESS], now=float(n))
    assert sum(peers.entry(peer) is not None for peer in IDS) == 4
    assert peers.entry(IDS[1])
    assert peers.entry(IDS[-1])


def test_ourselves_are_never_dialled_nor_stored() -> None:
    peers = table(LOW)
    peers.on_sighting(LOW, [ADDRESS], now=0.0)
    assert not peers.on_status(*status(LOW, 99), bearer=HIGH, now=0.0)
    assert peers.tick(10.0) == []


def test_round_trips_are_smoothed() -> None:
    peers = table(LOW)
    peers.on_connected(HIGH, ADDRESS, now=0.0)
    peers.on_round_trip(HIGH, 0.010, now=0.0)
    peers.on_round_trip(HIGH, 0.110, now=0.0)
    entry = peers.entry(HIGH)
    assert entry and entry.rtt_s is not None
    assert 0.010 < entry.rtt_s < 0.110


def test_dials_are_plain_values() -> None:
    assert msgspec.structs.asdict(Dial(LOW, (ADDRESS,))) == {"peer_id": LOW, "addresses": (ADDRESS,)}


def hear(peers: PeerTable, count: int, now: float = 0.0, first: int = 50) -> list[PeerId]:
    """Let a neighbour tell of ``count`` peers."""
    made_up = [peer_id_of(bytes([n]) * 32) for n in range(first, first + count)]
    for peer in made_up:
        peers.on_status(*status(peer, 1, ADDRESS), HIGH, now)
    return made_up


def test_who_was_seen_is_dialled_at_once_whatever_others_make_up() -> None:
    peers = table(LOW, limit=200)
    made_up = hear(peers, 100)
    assert len(peers.tick(YIELD_S)) == GOSSIP_DIALS
    assert not peers.tick(YIELD_S)
    assert peers.deadline() is None  # nobody spins until one of those dials ends
    peers.on_sighting(HIGH, [ADDRESS], 2.0)
    assert [dial.peer_id for dial in peers.tick(2.0)] == [HIGH]
    peers.on_sighting(made_up[-1], [ADDRESS], 3.0)  # seen by ourselves now: no hearsay any more
    assert [dial.peer_id for dial in peers.tick(3.0)] == [made_up[-1]]


def test_of_those_that_others_speak_of_the_least_failed_are_dialled_first() -> None:
    peers = table(LOW, limit=200)
    hear(peers, GOSSIP_DIALS)
    for dial in peers.tick(YIELD_S):
        peers.on_dial_failed(dial.peer_id, YIELD_S)
    (fresh,) = hear(peers, 1, now=100.0, first=40)
    assert peers.tick(200.0)[0].peer_id == fresh


def test_made_up_peers_push_none_out_of_the_table_that_was_seen() -> None:
    peers = table(LOW, limit=4)
    peers.on_sighting(IDS[1], [ADDRESS], 0.0)
    made_up = hear(peers, 20, now=5.0)
    assert peers.entry(IDS[1])
    assert peers.entry(made_up[-1])
    for peer in IDS[2:5]:
        peers.on_sighting(peer, [ADDRESS], 6.0)
    assert all(peers.entry(peer) for peer in IDS[1:5])
    hear(peers, 1, now=7.0)
    assert all(peers.entry(peer) for peer in IDS[1:5])


def test_other_addresses_that_are_told_during_a_dial_are_dialled_as_soon_as_it_ends() -> None:
    peers, other = table(LOW), "/ip4/10.0.0.2/tcp/1"
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    assert peers.tick(0.0)
    peers.on_sighting(HIGH, [ADDRESS], now=1.0)
    entry = peers.entry(HIGH)
    assert entry is not None
    news = entry.news
    assert not news
    peers.on_sighting(HIGH, [other], now=1.0)
    assert entry.news
    peers.on_dial_failed(HIGH, now=2.0)
    assert peers.tick(2.0) == [Dial(HIGH, (other, ADDRESS))]
    peers.on_dial_failed(HIGH, now=3.0)
    assert not peers.tick(3.0)


# --- a peer that was lost and is back: what a restart ends ------------------------------------------------------------

MODEL = Sha256("ab" * 32)
BUSY = Load(2, 3, 2, 8, (Wait(MODEL, 4.0),))


def told(sequence: int, instance: str, state: str = "loaded", load: Load = BUSY) -> tuple[PeerStatus, Signed]:
    models = (ModelPresence(MODEL, ("m",), state, 1000),)  # type: ignore[arg-type]
    made = PeerStatus(HIGH, sequence, 0, "x", "0", models=models, load=load, instance=instance, changed=sequence)
    return made, Signed(HIGH, bytes([sequence]) * 10, bytes(64))


def known_before(instance: str = "one") -> PeerTable:
    peers = table(LOW)
    peers.on_connected(HIGH, ADDRESS, 0.0)
    peers.on_status(*told(5, instance), HIGH, 0.0)
    peers.on_round_trip(HIGH, 0.01, 0.0)
    return peers


def seen(peers: PeerTable) -> tuple[str, int, int]:
    entry = peers.entry(HIGH)
    assert entry is not None
    assert entry.status is not None
    return entry.status.models[0].state, entry.status.load.running, len(entry.status.load.waits)


def test_what_a_restart_ends_does_not_count_of_a_peer_that_is_back_until_it_has_spoken() -> None:
    peers = known_before()
    assert seen(peers) == ("loaded", 2, 1)
    peers.on_disconnected(HIGH, 1.0)
    peers.on_connected(HIGH, ADDRESS, 2.0)
    assert seen(peers) == ("disk", 0, 0)
    entry = peers.entry(HIGH)
    assert entry is not None
    assert entry.status is not None
    assert (entry.status.load.capacity, entry.status.load.limit) == (2, 8)  # of its configuration
    assert peers.on_status(*told(9, "two", "disk", Load(0, 0, 2, 8)), HIGH, 2.1)
    assert seen(peers) == ("disk", 0, 0)
    assert peers.on_vitals(HIGH, vitals_of(told(10, "two")[0]))
    assert seen(peers) == ("disk", 2, 1)


def test_one_that_is_back_as_the_instance_that_it_was_has_all_that_it_had() -> None:
    for sequence, news in ((5, 2), (6, 1)):  # nothing new, and something
        peers = known_before()
        peers.on_disconnected(HIGH, 1.0)
        peers.on_connected(HIGH, ADDRESS, 2.0)
        load = msgspec.structs.replace(BUSY, running=news)
        assert peers.on_vitals(HIGH, vitals_of(told(sequence, "one", load=load)[0]))
        assert seen(peers) == ("loaded", news, 1)
        assert not peers.on_vitals(HIGH, vitals_of(told(sequence, "one")[0]))


def test_one_whose_loss_nobody_noticed_is_found_out_by_its_first_word() -> None:
    peers = known_before()
    assert peers.on_vitals(HIGH, vitals_of(told(8, "two")[0]))
    assert seen(peers) == ("disk", 0, 0)
    assert not peers.on_vitals(HIGH, vitals_of(told(9, "two")[0]))
    assert peers.on_status(*told(9, "two"), HIGH, 1.0)
    assert seen(peers) == ("loaded", 2, 1)


def test_a_late_word_of_the_former_instance_does_not_make_it_what_it_was() -> None:
    peers = known_before()
    peers.on_disconnected(HIGH, 1.0)
    peers.on_connected(HIGH, ADDRESS, 2.0)
    assert peers.on_status(*told(6, "one"), IDS[3], 2.1)  # another peer brings what it said before
    assert seen(peers) == ("disk", 0, 0)
    assert peers.on_vitals(HIGH, vitals_of(told(6, "one")[0]))
    assert seen(peers) == ("loaded", 2, 1)


def test_a_first_connection_to_one_that_others_told_of_takes_their_word() -> None:
    peers = table(LOW)
    peers.on_status(*told(5, "one"), IDS[3], 0.0)
    peers.on_connected(HIGH, ADDRESS, 1.0)
    assert seen(peers) == ("loaded", 2, 1)


def test_more_addresses_that_are_told_while_the_larger_id_waits_put_its_dial_off_no_further() -> None:
    peers, now = table(HIGH), 0.0
    for number in range(8):
        now = number * YIELD_S / 4
        peers.on_sighting(LOW, [f"/ip4/10.0.0.{number}/tcp/1"], now)
        if dials := peers.tick(now):
            break
    assert (now, [dial.peer_id for dial in dials]) == (YIELD_S, [LOW])
