"""When circuits are renewed and replaced, and which relays are shunned."""

import random

from meshmax.base.ids import PeerId
from meshmax.core import circuits as module
from meshmax.core.circuits import MAX_BROUGHT, MAX_CIRCUITS, MAX_CIRCUITS_PER_PEER, Circuits, Connect, Life

RELAY, OTHER, PEER = PeerId("r"), PeerId("o"), PeerId("p")
LIFE = Life(1800.0, 64 << 20)


def made() -> Circuits:
    return Circuits(random.Random(1))


def test_who_dialled_dials_another_one_at_half_of_its_life() -> None:
    circuits = made()
    circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0)
    circuits.on_opened(OTHER, RELAY, "in", LIFE, 0.0)
    assert circuits.tick(899.0) == []
    assert circuits.deadline() == 900.0
    assert circuits.tick(900.0) == [Connect(PEER, RELAY, False)]
    assert circuits.tick(900.1) == []
    circuits.on_connect(PEER, True, 901.0)
    assert circuits.deadline() is None


def test_or_at_half_of_its_bytes_in_either_direction() -> None:
    circuits = made()
    circuit = circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0)
    assert not circuit.carry("in", 31 << 20)
    assert circuit.carry("in", 1 << 20)
    assert circuits.tick(10.0) == [Connect(PEER, RELAY, False)]
    assert not circuit.carry("in", 1 << 20)


def test_a_renewal_that_fails_is_tried_again() -> None:
    circuits, now = made(), 900.0
    circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0)
    for _ in range(8):
        assert circuits.tick(now) == [Connect(PEER, RELAY, False)]
        circuits.on_connect(PEER, False, now)
        due = circuits.deadline()
        assert due is not None
        assert due <= now + module.RETRY_MOST_S
        now = due


def test_what_breaks_is_replaced_at_once_and_given_up_soon() -> None:
    circuits = made()
    circuit = circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0)
    circuits.on_ended(circuit, True, 100.0)
    assert circuits.tick(100.0) == [Connect(PEER, RELAY, True)]
    now = 100.0
    while (due := circuits.deadline()) is not None or now == 100.0:
        circuits.on_connect(PEER, False, now)
        now = due or now + 0.1
        circuits.tick(now)
    assert now < 100.0 + module.REPLACE_S
    assert len(circuits) == 0


def test_what_ended_in_order_what_the_peer_dialled_and_one_of_several_is_not_replaced() -> None:
    circuits = made()
    circuits.on_ended(circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0), False, 100.0)
    circuits.on_ended(circuits.on_opened(PEER, RELAY, "in", LIFE, 0.0), True, 100.0)
    first, _ = (circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0) for _ in range(2))
    circuits.on_ended(first, True, 100.0)
    circuits.on_ended(first, True, 100.0)
    assert circuits.tick(100.0) == []


def test_a_relay_that_cuts_circuits_short_is_shunned_ever_longer_until_it_does_better() -> None:
    circuits, now, pauses = made(), 0.0, []
    for _ in range(6):
        for _ in range(module.SHORT_LIVES):
            assert not circuits.shunned(RELAY, now)
            circuits.on_ended(circuits.on_opened(PEER, RELAY, "in", LIFE, now), True, now + 1)
        pauses.append(circuits.shunned(RELAY, now + 1))
        now += 1 + pauses[-1]
    assert module.SHUN_FIRST_S / 2 <= pauses[0] <= module.SHUN_FIRST_S
    assert pauses[-1] > 4 * pauses[0]
    assert not circuits.shunned(OTHER, now)
    circuits.on_ended(circuits.on_opened(PEER, RELAY, "in", LIFE, now), True, now + 1000)
    circuits.on_cut_short(RELAY, now)
    assert circuits._conduct[RELAY] == (1, 0, 0.0)


def test_circuits_are_bounded_by_peer_and_in_all() -> None:
    circuits = made()
    for _ in range(MAX_CIRCUITS_PER_PEER):
        assert circuits.room_for(PEER)
        circuits.on_opened(PEER, RELAY, "in", LIFE, 0.0)
    assert not circuits.room_for(PEER)
    for number in range(MAX_CIRCUITS - MAX_CIRCUITS_PER_PEER):
        assert circuits.room_for(OTHER)
        circuits.on_opened(PeerId(str(number)), RELAY, "in", LIFE, 0.0)
    assert not circuits.room_for(OTHER)
    for number in range(2 * module.MAX_SHUNNED):
        circuits.on_cut_short(PeerId(str(number)), 0.0)
    assert len(circuits._conduct) == module.MAX_SHUNNED


def test_a_relay_that_brings_guests_without_end_leaves_room_for_other_relays_and_for_ours() -> None:
    circuits = made()
    for number in range(MAX_BROUGHT):
        assert circuits.room_for(PEER, RELAY)
        circuits.on_opened(PeerId(str(number)), RELAY, "in", LIFE, 0.0)
    assert not circuits.room_for(PEER, RELAY)
    assert circuits.room_for(PEER, OTHER)
    for number in range(MAX_BROUGHT):
        circuits.on_opened(PeerId(str(number)), OTHER, "in", LIFE, 0.0)
    for _ in range(MAX_CIRCUITS_PER_PEER):
        assert circuits.room_for(PEER)
        circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0)


def test_one_that_breaks_as_soon_as_its_renewal_stands_is_replaced() -> None:
    circuits = made()
    first = circuits.on_opened(PEER, RELAY, "out", LIFE, 0.0)
    assert circuits.tick(900.0) == [Connect(PEER, RELAY, False)]
    second = circuits.on_opened(PEER, RELAY, "out", LIFE, 901.0)
    circuits.on_ended(first, True, 901.0)
    circuits.on_ended(second, True, 901.0)
    circuits.on_connect(PEER, True, 901.0)  # which is not true any more
    assert circuits.tick(901.0) == [Connect(PEER, RELAY, True)]
    circuits.on_connect(PEER, True, 902.0)
    assert circuits.tick(1000.0) == []
