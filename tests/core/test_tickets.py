"""Tickets given out: counted, dated, told apart by a hash, and refused with a reason."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidRequest, NotAMember, QuotaExceeded
from meshmax.core.tickets import MAX_LIFE_S, MAX_TICKETS, MAX_USES, MEMORY_S, Tickets
from tests.members import NOW_S, A, B, C

SECRET = b"s" * 16
WEEK_S = 7 * 86400


def tickets(uses: int = 1) -> Tickets:
    made = Tickets()
    made.give(SECRET, ("infer", "pull"), WEEK_S, uses, NOW_S)
    return made


def test_a_ticket_is_worth_its_scopes_once() -> None:
    made = tickets()
    assert made.redeem(SECRET, A.peer_id, NOW_S) == ("infer", "pull")
    with pytest.raises(NotAMember, match="used up"):
        made.redeem(SECRET, B.peer_id, NOW_S)


def test_whose_answer_was_lost_may_ask_again() -> None:
    made = tickets()
    for _ in range(3):
        assert made.redeem(SECRET, A.peer_id, NOW_S) == ("infer", "pull")
    assert made.given[0].used_by == (A.peer_id,)


def test_a_ticket_of_two_uses_is_worth_two() -> None:
    made = tickets(2)
    made.redeem(SECRET, A.peer_id, NOW_S)
    assert made.open_count(NOW_S) == 1
    made.redeem(SECRET, B.peer_id, NOW_S)
    assert made.open_count(NOW_S) == 0
    with pytest.raises(NotAMember, match="used up"):
        made.redeem(SECRET, C.peer_id, NOW_S)


def test_an_expired_ticket_is_worth_nothing_even_to_who_used_it() -> None:
    made = tickets()
    made.redeem(SECRET, A.peer_id, NOW_S + WEEK_S - 1)
    for peer in (A, B):
        with pytest.raises(NotAMember, match="expired 2 h ago: ask for a new one"):
            made.redeem(SECRET, peer.peer_id, NOW_S + WEEK_S + 7200)


@given(st.binary(min_size=0, max_size=32))
def test_another_secret_is_not_known(secret: bytes) -> None:
    if secret != SECRET:
        with pytest.raises(NotAMember, match="not known here"):
            tickets().redeem(secret, A.peer_id, NOW_S)


def test_a_peer_that_was_revoked_needs_a_ticket_made_since() -> None:
    made = tickets(5)
    made.redeem(SECRET, A.peer_id, NOW_S)
    with pytest.raises(NotAMember, match="revoked, and the ticket is older"):
        made.redeem(SECRET, A.peer_id, NOW_S + 10, revoked_at_s=NOW_S + 5)
    fresh = b"f" * 16
    made.give(fresh, ("infer",), WEEK_S, 1, NOW_S + 6)
    assert made.redeem(fresh, A.peer_id, NOW_S + 10, revoked_at_s=NOW_S + 5) == ("infer",)


def test_the_secret_is_not_kept() -> None:
    assert SECRET not in msgspec.json.encode(tickets().given)
    assert SECRET not in msgspec.msgpack.encode(tickets().given)


def test_uses_are_counted_over_a_restart() -> None:
    made = tickets()
    made.redeem(SECRET, A.peer_id, NOW_S)
    with pytest.raises(NotAMember, match="used up"):
        Tickets(made.given).redeem(SECRET, B.peer_id, NOW_S)


def test_tickets_can_be_taken_back() -> None:
    made = tickets(5)
    assert made.withdraw_all(NOW_S) == 1
    with pytest.raises(NotAMember, match="withdrawn"):
        made.redeem(SECRET, A.peer_id, NOW_S)


@pytest.mark.parametrize(("life_s", "uses"), [(0, 1), (MAX_LIFE_S + 1, 1), (WEEK_S, 0), (WEEK_S, MAX_USES + 1)])
def test_a_ticket_out_of_bounds_is_not_made(life_s: float, uses: int) -> None:
    with pytest.raises(InvalidRequest):
        Tickets().give(SECRET, ("infer",), life_s, uses, NOW_S)


def test_only_so_many_are_open_and_closed_ones_make_room() -> None:
    made = Tickets()
    for number in range(MAX_TICKETS):
        made.give(number.to_bytes(16, "big"), ("infer",), WEEK_S, 1, NOW_S)
    with pytest.raises(QuotaExceeded, match="wait until"):
        made.give(SECRET, ("infer",), WEEK_S, 1, NOW_S)
    made.redeem((7).to_bytes(16, "big"), A.peer_id, NOW_S)
    made.give(SECRET, ("infer",), WEEK_S, 1, NOW_S)
    assert len(made.given) == MAX_TICKETS


def test_why_a_ticket_is_refused_is_remembered_for_a_while() -> None:
    made = tickets()
    made.give(b"b" * 16, ("infer",), WEEK_S, 1, NOW_S + WEEK_S + MEMORY_S - 1)
    assert len(made.given) == 2
    made.give(b"c" * 16, ("infer",), WEEK_S, 1, NOW_S + WEEK_S + MEMORY_S)
    assert len(made.given) == 2
