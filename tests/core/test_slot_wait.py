"""How long a newcomer would wait, by what a peer knows of its own answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import Sha256
from meshmax.base.status import MAX_WAIT_S
from meshmax.core import slot_wait as module
from meshmax.core.slot_wait import LEFT, USUAL_S, USUAL_TOKENS, SlotWaits

CHAT, CODE = Sha256("a" * 64), Sha256("b" * 64)


def taught(tokens: int = 100, per_s: float = 10.0, digest: Sha256 = CHAT) -> SlotWaits:
    """One that has seen an answer: a second until the first token, then ``tokens`` at that rate."""
    waits = SlotWaits()
    waits.on_start(1, digest, 0.0)
    waits.on_said(1, 1, 1.0)
    waits.on_said(1, tokens, 1.0 + tokens / per_s)
    waits.on_end(1, 1.0 + tokens / per_s)
    return waits


def test_nobody_waits_where_a_slot_is_free() -> None:
    waits = taught()
    assert waits.wait_s(2, 0, 20.0) == 0.0
    waits.on_start(2, CHAT, 20.0)
    assert waits.wait_s(2, 0, 20.0) == 0.0
    assert waits.wait_s(1, 0, 20.0) > 0.0


def test_an_answer_that_began_has_the_usual_length_left() -> None:
    waits = taught()
    waits.on_start(2, CHAT, 20.0)
    assert waits.wait_s(1, 0, 20.0) == pytest.approx(11.0)
    waits.on_said(2, 1, 21.0)
    waits.on_said(2, 10, 22.0)
    assert waits.wait_s(1, 0, 22.0) == pytest.approx(90 / 10)


def test_one_that_is_longer_than_usual_may_go_on_for_nearly_as_long_again() -> None:
    waits = taught()
    waits.on_start(2, CHAT, 20.0)
    waits.on_said(2, 1, 21.0)
    waits.on_said(2, 300, 51.0)
    assert waits.wait_s(1, 0, 51.0) == pytest.approx(LEFT * 100 / 10)


def test_no_answer_goes_beyond_its_limit() -> None:
    waits = taught()
    waits.on_start(2, CHAT, 20.0, limit=25)
    waits.on_said(2, 1, 21.0)
    waits.on_said(2, 20, 23.0)
    assert waits.wait_s(1, 0, 23.0) == pytest.approx(5 / 10)


def test_its_own_speed_counts_not_the_usual_one() -> None:
    waits = taught()
    waits.on_start(2, CHAT, 20.0)
    waits.on_said(2, 1, 21.0)
    waits.on_said(2, 20, 31.0)
    assert waits.wait_s(1, 0, 31.0) == pytest.approx(80 / 2)


def test_of_several_the_first_to_end_counts_and_who_waits_goes_before() -> None:
    waits = taught()
    for ask in (2, 3):
        waits.on_start(ask, CHAT, 20.0)
    one = waits.wait_s(2, 0, 20.0)
    assert one == pytest.approx(11 / 2)
    assert waits.wait_s(2, 1, 20.0) == pytest.approx(2 * one)
    assert waits.wait_s(2, 3, 20.0) == pytest.approx(4 * one)


def test_slots_of_one_model_are_not_those_of_another() -> None:
    waits = taught()
    waits.on_start(2, CODE, 20.0)
    assert waits.wait_s(1, 0, 20.0, CHAT) == 0.0
    assert waits.wait_s(1, 0, 20.0, CODE) == pytest.approx(USUAL_S)
    assert waits.running(CODE) == waits.running() == 1


def test_until_an_answer_was_seen_it_is_a_usual_one() -> None:
    waits = SlotWaits()
    waits.on_start(1, CHAT, 0.0)
    assert waits.wait_s(1, 0, 0.0) == pytest.approx(USUAL_S)
    waits.on_said(1, 1, 1.0)
    waits.on_said(1, 56, 2.1)
    assert waits.wait_s(1, 0, 2.1) == pytest.approx(LEFT * USUAL_TOKENS * 1.1 / 56)


def test_an_answer_that_was_left_says_nothing_of_lengths() -> None:
    waits = taught()
    waits.on_start(2, CHAT, 20.0)
    waits.on_said(2, 1, 21.0)
    waits.on_said(2, 9, 21.9)
    waits.on_end(2, 22.0, whole=False)
    waits.on_end(2, 22.0)
    waits.on_said(2, 50, 23.0)
    assert waits.running() == 0
    waits.on_start(3, CHAT, 30.0)
    waits.on_said(3, 1, 31.0)
    waits.on_said(3, 10, 32.0)
    assert waits.wait_s(1, 0, 32.0) == pytest.approx(9.0)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.floats(0, 1e7), st.integers(0, 10**9)), max_size=40),
    st.integers(0, 64),
    st.integers(0, 10**9),
)
def test_a_wait_is_finite_and_bounded_whatever_happened(
    steps: list[tuple[int, int, float, int]], slots: int, waiting: int
) -> None:
    waits, now = SlotWaits(), 0.0
    for ask, what, later_s, tokens in steps:
        now += later_s
        if what == 0:
            waits.on_start(ask, (CHAT, CODE)[ask % 2], now, tokens if tokens % 2 else None)
        elif what == 1:
            waits.on_said(ask, tokens, now)
        else:
            waits.on_end(ask, now, whole=what == 2)
        assert 0.0 <= waits.wait_s(slots, waiting, now) <= MAX_WAIT_S
        assert 0.0 <= waits.wait_s(slots, waiting, now, CHAT) <= MAX_WAIT_S


def test_models_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MODELS", 2)
    waits = SlotWaits()
    for ask in range(5):
        waits.on_start(ask, Sha256(f"{ask:064x}"), 0.0)
        waits.on_end(ask, 1.0)
    assert len(waits._means) == 2
