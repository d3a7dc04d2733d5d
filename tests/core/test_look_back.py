"""How often a peer may have us look back."""

import pytest

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId
from meshmax.core.look_back import LOOKS, MAX_PEERS, PLACES, REFILL_S, LookGate

A = PeerId("a")


def test_some_questions_are_answered_at_once_and_then_one_now_and_then() -> None:
    gate = LookGate()
    for _ in range(LOOKS):
        gate.enter(A, 0.0)
        gate.leave()
    with pytest.raises(Busy) as caught:
        gate.enter(A, 0.0)
    assert caught.value.retry_after_s == pytest.approx(REFILL_S)
    gate.enter(A, REFILL_S)
    gate.leave()
    with pytest.raises(Busy):
        gate.enter(A, REFILL_S)


def test_asking_too_often_does_not_put_off_the_next_turn() -> None:
    gate = LookGate()
    for _ in range(LOOKS):
        gate.enter(A, 0.0)
        gate.leave()
    for tenth in range(1, 50):
        with pytest.raises(Busy):
            gate.enter(A, tenth * REFILL_S / 50)
    gate.enter(A, REFILL_S + 0.001)


def test_questions_at_once_are_bounded_in_all() -> None:
    gate = LookGate()
    for number in range(PLACES):
        gate.enter(PeerId(str(number)), 0.0)
    with pytest.raises(Busy):
        gate.enter(A, 0.0)
    gate.leave()
    gate.enter(A, 0.0)


def test_peers_that_are_remembered_are_bounded() -> None:
    gate = LookGate()
    for number in range(3 * MAX_PEERS):
        gate.enter(PeerId(str(number)), float(number))
        gate.leave()
    assert len(gate._room) <= MAX_PEERS
