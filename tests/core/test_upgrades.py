"""For whom an attempt at a better path is due, and when the next."""

import random

from hypothesis import given
from hypothesis import strategies as st

from meshmax.core.upgrades import AGAIN_S, AT_ONCE, JITTER, PAUSES_S, YIELD_S, Upgrades
from meshmax.testing.memory_swarm import SeededSigner

PEERS = tuple(SeededSigner(seed).peer_id for seed in range(AT_ONCE + 4))
PEER = PEERS[0]


def make() -> Upgrades:
    return Upgrades(random.Random(1))


def test_who_dialled_begins_at_once_and_the_other_side_when_it_has_seen_nothing() -> None:
    dialled, answered = make(), make()
    dialled.on_path(PEER, "relay", True, 10.0)
    answered.on_path(PEER, "relay", False, 10.0)
    assert dialled.tick(10.0) == [PEER]
    assert answered.tick(10.0 + YIELD_S - 0.01) == []
    assert answered.deadline() == 10.0 + YIELD_S
    assert answered.tick(10.0 + YIELD_S) == [PEER]


def test_nothing_is_due_for_who_is_reached_without_a_relay_or_not_at_all() -> None:
    core = make()
    core.on_path(PEER, "direct", True, 0.0)
    core.on_path(PEERS[1], "relay", True, 0.0)
    core.on_path(PEERS[1], "punched-udp", True, 0.1)
    core.on_path(PEERS[2], "relay", True, 0.0)
    core.on_gone(PEERS[2])
    assert (core.tick(100.0), core.deadline()) == ([], None)


def test_failures_are_followed_by_longer_and_longer_pauses() -> None:
    core, now = make(), 0.0
    core.on_path(PEER, "relay", True, now)
    for number in range(len(PAUSES_S) + 3):
        assert core.tick(now) == [PEER]
        assert core.deadline() is None
        now += 5.0
        core.on_tried(PEER, now)
        deadline = core.deadline()
        assert deadline is not None
        pause_s = PAUSES_S[min(number, len(PAUSES_S) - 1)]
        assert (1 - JITTER) * pause_s <= deadline - now <= (1 + JITTER) * pause_s
        assert core.tick(deadline - 0.01) == []
        now = deadline


def test_a_change_of_our_network_or_of_the_peers_addresses_ends_the_pause() -> None:
    for event in ("network", "addresses"):
        core = make()
        core.on_path(PEER, "relay", True, 0.0)
        for _ in range(4):
            core.tick(1e6)
            core.on_tried(PEER, 100.0)
        if event == "network":
            core.on_network_change(150.0)
        else:
            core.on_addresses(PEER, 150.0)
        assert core.tick(150.0) == [PEER]
        core.on_tried(PEER, 155.0)
        assert (core.deadline() or 0.0) <= 155.0 + PAUSES_S[0] * (1 + JITTER)  # pauses begin afresh


def test_a_change_in_the_middle_of_an_attempt_is_followed_by_another_one() -> None:
    core = make()
    core.on_path(PEER, "relay", True, 0.0)
    assert core.tick(0.0) == [PEER]
    core.on_network_change(1.0)
    assert core.tick(4.0) == []
    core.on_tried(PEER, 5.0)
    assert core.deadline() == 5.0 + AGAIN_S


def test_a_peer_that_tells_new_addresses_without_end_is_tried_at_most_so_often() -> None:
    core, tried, now = make(), 0, 0.0
    core.on_path(PEER, "relay", True, now)
    while now < 60.0:
        core.on_addresses(PEER, now)
        if core.tick(now):
            tried += 1
            core.on_tried(PEER, now)
        now += 0.05
    assert tried <= 60 / AGAIN_S + 1


def test_few_attempts_go_on_at_once_and_each_peer_has_its_turn() -> None:
    core = make()
    for number, peer_id in enumerate(PEERS):
        core.on_path(peer_id, "relay", True, float(number))
    first = core.tick(100.0)
    assert first == list(PEERS[:AT_ONCE])
    assert (core.tick(100.0), core.deadline()) == ([], None)
    for peer_id in first:
        core.on_tried(peer_id, 101.0)
    assert core.tick(101.0) == list(PEERS[AT_ONCE:])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["relay", "direct", "gone", "tried", "network", "addresses", "tick"]), st.integers(0, 9)
        )
    )
)
def test_whatever_happens_no_peer_is_tried_twice_at_once(events: list[tuple[str, int]]) -> None:
    core, now = make(), 0.0
    under_way: set[str] = set()
    for kind, number in events:
        now, peer_id = now + 0.7, PEERS[number]
        if kind in ("relay", "direct"):
            core.on_path(peer_id, kind, number % 2 == 0, now)  # type: ignore[arg-type]
        elif kind == "gone":
            core.on_gone(peer_id)
        elif kind == "tried":
            core.on_tried(peer_id, now)
        elif kind == "network":
            core.on_network_change(now)
        elif kind == "addresses":
            core.on_addresses(peer_id, now)
        if kind == "tried":  # an attempt goes on for a while at who is gone, or is reached better
            under_way.discard(peer_id)
        begun = core.tick(now)
        assert not under_way & set(begun)
        under_way |= set(begun)
        assert len(under_way) <= AT_ONCE


def test_who_is_back_over_a_relay_is_tried_anew_as_soon_as_the_attempt_of_before_is_over() -> None:
    for how in ("gone", "direct"):
        core = make()
        core.on_path(PEER, "relay", True, 0.0)
        assert core.tick(0.0) == [PEER]
        if how == "gone":
            core.on_gone(PEER)
        else:
            core.on_path(PEER, "direct", True, 0.5)
        core.on_path(PEER, "relay", True, 1.0)
        assert core.tick(1.0) == []
        core.on_tried(PEER, 3.0)
        assert core.tick(3.0 + AGAIN_S) == [PEER]
