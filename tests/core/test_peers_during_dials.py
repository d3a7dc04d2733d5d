"""The table of peers: what happens while a peer is dialled outlasts that dial."""

import random
from collections.abc import Callable

import pytest

from meshmax.base.ids import peer_id_of
from meshmax.core.peers import REFUSED_S, SPREAD_S, Dial, PeerTable

IDS = sorted(peer_id_of(bytes([n]) * 32) for n in range(1, 4))
LOW, OTHER, HIGH = IDS
ADDRESS, ELSEWHERE = "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"
DIAL_S = 5.0  # what each dial takes that leads nowhere

Event = Callable[[PeerTable, float], object]


def lost() -> PeerTable:
    """HIGH answered us once and OTHER did; both are gone, and so many others since that HIGH is dialled ever more seldom."""
    peers = PeerTable(LOW, 16, random.Random(1))
    later = [peer_id_of(bytes([nth]) * 32) for nth in range(50, 60)]
    for nth, peer in enumerate((HIGH, OTHER, *later)):
        peers.on_sighting(peer, [ADDRESS], now=float(nth))
        peers.on_connected(peer, ADDRESS, now=float(nth))
        peers.on_round_trip(peer, 0.01, now=float(nth))
    for peer in (HIGH, OTHER, *later):
        peers.on_disconnected(peer, now=20.0)
    return peers


def until_dialled(peers: PeerTable, now: float) -> float:
    """When HIGH is dialled next; all other dials fail at once."""
    for _ in range(10_000):
        dials = peers.tick(now)
        for dial in dials:
            if dial.peer_id != HIGH:
                peers.on_dial_failed(dial.peer_id, now)
        if any(dial.peer_id == HIGH for dial in dials):
            return now
        due = peers.deadline()
        assert due is not None
        now = max(now, due)
    raise AssertionError("nobody dials it any more")


def network_changed(peers: PeerTable, now: float) -> None:
    peers.on_network_change(now)


def network_back(peers: PeerTable, now: float) -> None:
    peers.on_connected(OTHER, ADDRESS, now)


def named_again(peers: PeerTable, now: float) -> None:
    peers.on_sighting(HIGH, [ADDRESS], now)


@pytest.mark.parametrize("at_s", [0.0, 0.001, 2.5, 5.0, 5.001, 7.0])
@pytest.mark.parametrize("event", [network_changed, network_back, named_again])
def test_at_whatever_moment_of_a_dial_that_fails_there_is_new_hope_the_next_one_follows_soon(
    event: Event, at_s: float
) -> None:
    peers, now = lost(), 20.0
    for _ in range(12):
        now = until_dialled(peers, now)
        peers.on_dial_failed(HIGH, now + DIAL_S)
        now += DIAL_S
    began = until_dialled(peers, now)
    if at_s <= DIAL_S:
        event(peers, began + at_s)
    peers.on_dial_failed(HIGH, began + DIAL_S)
    if at_s > DIAL_S:
        event(peers, began + at_s)
    last = began + max(at_s, DIAL_S)
    assert until_dialled(peers, last) - last <= SPREAD_S


def test_who_refuses_us_where_it_was_is_asked_at_once_where_it_is_said_to_be_meanwhile() -> None:
    peers = PeerTable(LOW, 16, random.Random(1))
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    assert peers.tick(0.0)
    peers.on_sighting(HIGH, [ELSEWHERE], now=0.5)
    peers.on_refused(HIGH, ADDRESS, "not of this mesh", now=1.0)
    assert peers.tick(1.0) == [Dial(HIGH, (ELSEWHERE, ADDRESS))]
    peers.on_refused(HIGH, ELSEWHERE, "not of this mesh", now=2.0)
    assert not peers.tick(2.0 + REFUSED_S - 1.0)
    assert peers.refused()


def test_who_refuses_us_while_our_network_changes_is_asked_again_in_the_new_one() -> None:
    peers = PeerTable(LOW, 16, random.Random(1))
    peers.on_sighting(HIGH, [ADDRESS], now=0.0)
    assert peers.tick(0.0)
    peers.on_network_change(0.5)
    peers.on_refused(HIGH, ADDRESS, "not of this mesh", now=1.0)
    assert peers.tick(1.0 + SPREAD_S)
