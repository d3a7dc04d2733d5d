"""Leases: of two sweepers one keeps the model, and whatever messages do, one copy stays."""

import random

import pytest
from hypothesis import given, settings
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
        self.name, self.table, self.holds, self.dropping = name, LeaseTable(name), True, False
        self.token: int | None = None

    def commits(self, until_s: float, token: int, now: float) -> None:
        if self.holds and not self.dropping and self.table.commit(M, token, until_s, now):
            self.dropping, self.token = True, token

    def drops(self) -> None:
        if self.dropping and self.token is not None:
            self.holds = self.dropping = False
            self.table.end(M, self.token)


class Mesh:
    """Peers, and messages that arrive in any order, or never. ``timed`` False: clocks say nothing, leases never end there."""

    def __init__(self, count: int, chance: random.Random, timed: bool) -> None:
        self.peers = [Peer(PeerId(f"p{number}")) for number in range(count)]
        self.clocks = {peer.name: 0.0 for peer in self.peers}
        self.chance, self.timed = chance, timed
        self.asks: list[tuple[Peer, Peer, int, float]] = []
        self.grants: list[tuple[Peer, int, float]] = []

    def step(self) -> None:
        """Something happens."""
        peer = self.chance.choice(self.peers)
        if self.chance.random() < 0.1:
            self.clocks[peer.name] += self.chance.choice([LEASE_S / 2, LEASE_S + REST_S])
        events = [self._intend, self._restart, self._ask, self._ask, self._grant, self._grant, Peer.drops]
        self.chance.choice(events)(peer)

    def _intend(self, peer: Peer) -> None:
        if peer.holds and not peer.dropping:
            try:
                token = peer.table.begin(M, self.clocks[peer.name])
            except Refused:
                return
            self.asks += [(peer, other, token, self.clocks[peer.name]) for other in self.peers if other is not peer]

    def _restart(self, peer: Peer) -> None:
        peer.table, peer.dropping = LeaseTable(peer.name), False
        self.grants = [grant for grant in self.grants if grant[0] is not peer]
        self.asks = [ask for ask in self.asks if ask[0] is not peer]

    def _ask(self, _peer: Peer) -> None:
        if not self.asks:
            return
        asker, holder, token, asked_s = self.asks.pop(self.chance.randrange(len(self.asks)))
        if holder.holds:
            try:
                lasts_s = holder.table.on_ask(M, asker.name, self.clocks[holder.name])
            except (Refused, ModelNotFound):
                return
            self.grants.append((asker, token, asked_s + lasts_s if self.timed else float("inf")))

    def _grant(self, _peer: Peer) -> None:
        if self.grants:
            asker, token, until_s = self.grants.pop(self.chance.randrange(len(self.grants)))
            asker.commits(until_s, token, self.clocks[asker.name])


@settings(max_examples=200)
@given(st.integers(2, 4), st.booleans(), st.integers(0, 2**32))
def test_whatever_messages_clocks_and_restarts_do_one_copy_stays(count: int, timed: bool, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(40):
        mesh = Mesh(count, chance, timed)
        for _ in range(40):
            mesh.step()
            assert any(peer.holds and not peer.dropping for peer in mesh.peers)


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
            peers[asker].commits(until_s, token, 0.0)
            peers[asker].drops()
    assert [name for name, peer in peers.items() if not peer.holds] == [ANN]
