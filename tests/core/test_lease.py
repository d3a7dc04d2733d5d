"""Leases: of two sweepers one keeps the model, and whatever messages do, one copy stays."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import Busy, ModelNotFound, Refused
from meshmax.base.ids import PeerId, Sha256
from meshmax.core.lease import LEASE_S, MAX_LEASES, MAX_LEASES_PER_PEER, REST_S, LeaseTable

M = Sha256("ab" * 32)
ANN, BOB, CYD = PeerId("ann"), PeerId("bob"), PeerId("cyd")


def test_who_has_granted_a_lease_forms_no_intent_until_it_is_over() -> None:
    table = LeaseTable(ANN)
    assert table.on_ask(M, BOB, 0.0) == LEASE_S
    with pytest.raises(Refused, match="bob relies on this copy"):
        table.begin(M, LEASE_S - 0.1)
    table.begin(M, LEASE_S)


def test_who_grants_a_lease_gives_its_own_intent_up() -> None:
    table = LeaseTable(BOB)
    token = table.begin(M, 0.0)
    table.on_ask(M, ANN, 1.0)
    assert not table.intends(M, token)
    assert not table.commit(M, token, 100.0, 1.0)


def test_the_lower_peer_id_refuses_while_it_intends_the_same() -> None:
    table = LeaseTable(ANN)
    token = table.begin(M, 0.0)
    with pytest.raises(Refused, match="drop its own"):
        table.on_ask(M, BOB, 0.0)
    assert table.commit(M, token, 10.0, 0.0)


def test_what_is_being_dropped_is_leased_to_nobody_and_can_be_again_if_it_stays() -> None:
    table = LeaseTable(BOB)
    token = table.begin(M, 0.0)
    assert table.commit(M, token, 10.0, 0.0)
    with pytest.raises(ModelNotFound):
        table.on_ask(M, ANN, 0.0)
    table.end(M, token)
    assert table.on_ask(M, ANN, 0.0) == LEASE_S


def test_a_lease_that_has_run_out_lets_nobody_drop() -> None:
    table = LeaseTable(ANN)
    token = table.begin(M, 0.0)
    assert not table.commit(M, token, 10.0, 10.0)


def test_a_lease_of_an_earlier_intent_counts_for_nothing() -> None:
    table = LeaseTable(ANN)
    old = table.begin(M, 0.0)
    table.end(M, old)
    table.begin(M, 1.0)
    assert not table.commit(M, old, 100.0, 1.0)


def test_the_end_of_an_earlier_intent_leaves_a_later_one() -> None:
    table = LeaseTable(ANN)
    old = table.begin(M, 0.0)
    new = table.begin(M, 1.0)
    table.end(M, old)
    assert table.intends(M, new)


def test_nobody_keeps_a_copy_from_being_swept_for_ever() -> None:
    table = LeaseTable(ANN)
    table.on_ask(M, BOB, 0.0)
    for now in (1.0, LEASE_S + 1, LEASE_S + REST_S - 1):
        with pytest.raises(Refused, match="a moment ago"):
            table.on_ask(M, BOB, now)
    assert table.on_ask(M, BOB, LEASE_S + REST_S) == LEASE_S


def test_leases_are_bounded_for_a_peer_and_in_all_and_a_full_table_costs_no_intent() -> None:
    table = LeaseTable(CYD)
    for number in range(MAX_LEASES_PER_PEER):
        table.on_ask(Sha256(f"{number:064x}"), ANN, 0.0)
    token = table.begin(M, 0.0)
    with pytest.raises(Busy):
        table.on_ask(M, ANN, 0.0)
    for number in range(MAX_LEASES - MAX_LEASES_PER_PEER):
        table.on_ask(Sha256(f"{number:064x}"), PeerId(f"{number % 50:03}"), 0.0)
    with pytest.raises(Busy):
        table.on_ask(M, BOB, 0.0)
    assert table.intends(M, token)


class Peer:
    """A holder that may sweep; forgets its table when it restarts."""

    def __init__(self, name: PeerId) -> None:
        self.name, self.table, self.holds = name, LeaseTable(name), True
        self.token: int | None = None

    def drops(self, until_s: float, token: int, now: float) -> None:
        if self.holds and self.token == token and self.table.commit(M, token, until_s, now):
            self.holds = False


@given(st.integers(2, 5), st.integers(0, 2**32), st.integers(20, 200))
def test_whatever_messages_clocks_and_restarts_do_one_copy_stays(count: int, seed: int, steps: int) -> None:
    chance = random.Random(seed)
    peers = [Peer(PeerId(f"p{number}")) for number in range(count)]
    asks: list[tuple[Peer, Peer, int, float]] = []
    grants: list[tuple[Peer, int, float]] = []
    clocks = {peer.name: 0.0 for peer in peers}  # each goes as it likes
    for _ in range(steps):
        peer = chance.choice(peers)
        clocks[peer.name] += chance.choice([0.0, 0.5, LEASE_S / 2, LEASE_S + REST_S])
        now = clocks[peer.name]
        what = chance.random()
        if what < 0.3 and peer.holds:
            try:
                peer.token = peer.table.begin(M, now)
            except Refused:
                continue
            asks += [(peer, other, peer.token, now) for other in peers if other is not peer]
        elif what < 0.4:
            peer.table, peer.token = LeaseTable(peer.name), None
        elif what < 0.7 and asks:
            asker, holder, token, asked_s = asks.pop(chance.randrange(len(asks)))
            if holder.holds:
                try:
                    lasts_s = holder.table.on_ask(M, asker.name, clocks[holder.name])
                except (Refused, ModelNotFound):
                    continue
                grants.append((asker, token, asked_s + lasts_s))
        elif grants:
            asker, token, until_s = grants.pop(chance.randrange(len(grants)))
            asker.drops(until_s, token, clocks[asker.name])
        assert any(peer.holds for peer in peers)


@given(st.permutations([ANN, BOB]), st.permutations(range(4)))
def test_of_two_that_sweep_at_once_exactly_one_drops_in_whatever_order_messages_come(
    names: list[PeerId], order: list[int]
) -> None:
    peers = {name: Peer(name) for name in names}
    for peer in peers.values():
        peer.token = peer.table.begin(M, 0.0)
    answers: dict[PeerId, float | None] = {}
    todo = [("ask", ANN, BOB), ("ask", BOB, ANN), ("answer", ANN, BOB), ("answer", BOB, ANN)]
    for kind, asker, holder in sorted(todo, key=lambda item: (item[0], order[todo.index(item)])):
        if kind == "answer" or not peers[holder].holds:
            continue
        try:
            answers[asker] = peers[holder].table.on_ask(M, asker, 0.0)
        except Refused:
            answers[asker] = None
    for asker, until_s in answers.items():
        token = peers[asker].token
        if until_s is not None and token is not None:
            peers[asker].drops(until_s, token, 0.0)
    assert [name for name, peer in peers.items() if not peer.holds] == [ANN]
