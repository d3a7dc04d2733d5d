"""Waiting places: who gets one, who is next, and what those hear who are turned away."""

import random
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Priority
from meshmax.core import fair_queue
from meshmax.core.fair_queue import (
    BATCH_EVERY,
    BATCH_PATIENCE_S,
    MAX_RETRY_S,
    MIN_RETRY_S,
    Ask,
    FairQueue,
    Requester,
)

MODEL, OTHER = Sha256("ab" * 32), Sha256("cd" * 32)
ANN, BEN, CAT = PeerId("ann"), PeerId("ben"), PeerId("cat")


class Desk:
    """A queue for one model with so many slots, and the clock."""

    def __init__(self, slots: int = 1, max_waiting: int = 512, per_member: int = 64, max_wait_s: float = 1e9) -> None:
        self.queue = FairQueue(max_waiting, per_member, max_wait_s)
        self.queue.on_loaded(MODEL, slots)
        self.slots = slots
        self.running: dict[int, Ask] = {}
        self.now = 0.0
        self.asked = 0

    def ask(self, requester: Requester, priority: Priority = "interactive", slots: int = 1) -> int:
        self.asked += 1
        self.queue.join(Ask(self.asked, MODEL, 300.0, requester, priority, slots), self.now)
        return self.asked

    def next(self) -> Ask | None:
        ask = self.queue.start_next(MODEL, self.slots - len(self.running), self.now)
        if ask:
            self.running[ask.id] = ask
        return ask

    def end(self, ask_id: int) -> None:
        self.running.pop(ask_id, None)
        self.queue.leave(ask_id, self.now)

    def serve(self, took_s: float = 1.0) -> Ask:
        """One ask from its start to its end."""
        ask = self.next()
        assert ask is not None
        self.now += took_s
        self.end(ask.id)
        return ask

    def told(self, requester: Requester, priority: Priority = "interactive") -> Busy:
        with pytest.raises(Busy) as refused:
            self.ask(requester, priority)
        return refused.value


# --- order ---


def test_asks_of_one_requester_go_in_the_order_in_which_they_came() -> None:
    desk = Desk()
    asks = [desk.ask(ANN) for _ in range(5)]
    assert [desk.serve().id for _ in range(5)] == asks
    assert desk.next() is None


def test_requesters_take_turns_however_many_asks_one_has() -> None:
    desk = Desk()
    for _ in range(50):
        desk.ask(ANN)
    desk.ask(BEN)
    desk.ask(None)
    assert {desk.serve().requester for _ in range(3)} == {ANN, BEN, None}


def test_turns_count_by_the_time_that_asks_take_not_by_their_number() -> None:
    desk = Desk()
    had_s: dict[Requester, float] = {ANN: 0.0, BEN: 0.0}
    for _ in range(40):
        desk.ask(ANN)
        for _ in range(10):
            desk.ask(BEN) if desk.queue.waiting(MODEL) < 60 else None
        took_s = {ANN: 5.0, BEN: 0.5}
        ask = desk.next()
        assert ask is not None and ask.requester is not None
        desk.now += took_s[ask.requester]
        had_s[ask.requester] += took_s[ask.requester]
        desk.end(ask.id)
    assert had_s[ANN] == pytest.approx(had_s[BEN], rel=0.25)


def test_who_was_away_does_not_bring_along_what_it_left_unused() -> None:
    desk = Desk()
    for _ in range(40):
        desk.ask(ANN)
    for _ in range(20):
        desk.serve()
    for _ in range(20):
        desk.ask(BEN)
    served = Counter(desk.serve().requester for _ in range(20))
    assert served[ANN] == pytest.approx(10, abs=1)


def test_interactive_asks_go_first() -> None:
    desk = Desk()
    for _ in range(3):
        desk.ask(ANN, "batch")
    desk.ask(BEN)
    assert desk.serve().requester == BEN
    assert desk.serve().requester == ANN


def test_batch_asks_that_have_waited_have_every_eighth_start_and_no_more() -> None:
    desk = Desk()
    for _ in range(10):
        desk.ask(ANN, "batch")
    for _ in range(60):
        desk.ask(BEN)
    desk.now += BATCH_PATIENCE_S
    kinds = [desk.serve(0.1).priority for _ in range(5 * BATCH_EVERY)]
    assert kinds.count("batch") == 5
    assert all(kinds[at - BATCH_EVERY : at].count("batch") == 1 for at in range(BATCH_EVERY, len(kinds)))


def test_batch_asks_that_came_just_now_wait_for_all_interactive_ones() -> None:
    desk = Desk()
    desk.ask(ANN, "batch")
    for _ in range(60):
        desk.ask(BEN)
    assert [desk.serve(0.01).priority for _ in range(60)] == ["interactive"] * 60


def test_who_uses_much_for_batch_asks_is_not_put_back_with_interactive_ones() -> None:
    desk = Desk()
    for _ in range(10):
        desk.ask(ANN, "batch")
    for _ in range(10):
        desk.serve(100.0)
    for _ in range(20):
        desk.ask(BEN)
        desk.ask(ANN)
    assert Counter(desk.serve().requester for _ in range(10)) == {ANN: 5, BEN: 5}


def test_who_waits_for_the_load_only_needs_no_slot() -> None:
    desk = Desk()
    first = desk.ask(ANN)
    assert desk.next() is not None
    visitor = desk.ask(BEN, slots=0)
    ask = desk.next()
    assert ask is not None and ask.id == visitor
    desk.end(visitor)
    desk.end(first)
    assert len(desk.queue) == 0


def test_who_goes_away_frees_its_place_at_once_and_is_never_started() -> None:
    desk = Desk(max_waiting=1)
    gone = desk.ask(ANN)
    desk.end(gone)
    desk.end(gone)
    assert desk.ask(BEN) == desk.serve().id


def test_models_are_wanted_in_the_order_in_which_somebody_began_to_wait() -> None:
    queue = FairQueue(10, 10, 600.0)
    queue.join(Ask(1, OTHER, 5.0), 0.0)
    queue.join(Ask(2, MODEL, 7.0), 0.0)
    assert list(queue.wanted()) == [(OTHER, 5.0), (MODEL, 7.0)]
    assert queue.drop(OTHER) == [1]
    assert queue.drop(OTHER) == []
    assert list(queue.wanted()) == [(MODEL, 7.0)]


# --- places ---


def test_the_places_are_bounded() -> None:
    desk = Desk(max_waiting=4, per_member=4)
    for member in (ANN, BEN, CAT, None):
        desk.ask(member)
    assert "4 wait here" in desk.told(ANN).message
    desk.serve()
    desk.ask(ANN)


def test_one_member_has_so_many_places_and_no_more() -> None:
    desk = Desk(per_member=8)
    for _ in range(8):
        desk.ask(ANN)
    assert "8 of one member" in desk.told(ANN).message
    desk.ask(BEN)
    for _ in range(100):
        desk.ask(None)  # we ourselves are bounded by what is free alone


def test_nobody_takes_all_places_so_that_who_comes_later_finds_one() -> None:
    desk = Desk(max_waiting=100, per_member=4096)
    for _ in range(44):
        desk.ask(ANN)
    assert "places are left for others" in desk.told(ANN).message
    desk.ask(BEN)


@pytest.mark.parametrize("greedy", [2, 9, 20])
def test_among_many_greedy_ones_each_has_places(greedy: int) -> None:
    desk = Desk(max_waiting=512, per_member=4096)
    held: Counter[str] = Counter()
    for _ in range(200):
        for name in range(greedy):
            try:
                desk.ask(PeerId(str(name)))
                held[str(name)] += 1
            except Busy:
                pass
    assert min(held.values()) >= max(held.values()) - 1
    desk.ask(PeerId("one more"))


def test_batch_asks_leave_a_quarter_of_each_bound() -> None:
    desk = Desk(max_waiting=16, per_member=4)
    for _ in range(3):
        desk.ask(ANN, "batch")
    assert "3 of one member" in desk.told(ANN, "batch").message
    desk.ask(ANN)
    members = [PeerId(str(n)) for n in range(9)]
    for member in members:
        desk.ask(member, "batch")
    assert "13 wait here" in desk.told(BEN, "batch").message
    for member in members[:3]:
        desk.ask(member)
    assert "16 wait here" in desk.told(BEN).message


def test_an_ask_that_can_start_at_once_needs_no_place() -> None:
    desk = Desk(max_waiting=1)
    desk.queue.join(Ask(98, OTHER, 1.0, ANN), 0.0)
    desk.told(BEN)
    desk.queue.join(Ask(99, MODEL, 1.0, BEN), 0.0, at_once=True)
    ask = desk.next()
    assert ask is not None and ask.id == 99


# --- when to come again ---


def test_until_something_was_measured_come_again_in_a_second() -> None:
    desk = Desk(max_waiting=1)
    desk.ask(ANN)
    assert desk.told(BEN).retry_after_s == MIN_RETRY_S


def test_come_again_when_half_of_what_is_before_you_is_served() -> None:
    desk = Desk(slots=2, max_waiting=12)
    desk.ask(ANN)
    desk.serve(4.0)
    for _ in range(6):
        desk.ask(ANN)
    for _ in range(3):
        desk.ask(BEN)
    # For one that has none here yet: one of each other before it, 4 s each, in two slots. For another: all of them.
    assert desk.queue.retry_after_s(MODEL, CAT, "interactive") == pytest.approx((2 + 1) * 4.0 / 2 / 2)
    assert desk.told(ANN).retry_after_s == pytest.approx((9 + 1) * 4.0 / 2 / 2)


def test_that_time_is_bounded() -> None:
    desk = Desk(max_waiting=2)
    desk.ask(ANN)
    desk.serve(1e6)
    desk.ask(ANN)
    assert desk.told(ANN).retry_after_s == MAX_RETRY_S
    quick = Desk(max_waiting=1)
    quick.ask(ANN)
    quick.serve(0.0)
    quick.ask(ANN)
    assert quick.told(ANN).retry_after_s == MIN_RETRY_S


def test_an_interactive_ask_that_nobody_would_wait_for_is_refused_and_a_batch_ask_waits() -> None:
    desk = Desk(max_wait_s=100.0)
    desk.ask(ANN)
    desk.serve(30.0)
    for _ in range(3):
        desk.ask(ANN)
    assert "it would wait 120 s" in desk.told(ANN).message
    desk.ask(BEN)  # whose turn comes sooner
    desk.ask(ANN, "batch")


def test_the_times_of_models_that_nobody_uses_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_LINES", 3)
    queue = FairQueue(100, 100, 600.0)
    for number in range(50):
        digest = Sha256(f"{number:064x}")
        queue.join(Ask(number, digest, 1.0), 0.0)
        assert queue.start_next(digest, 1, 0.0)
        queue.leave(number, 1.0)
    assert len(queue._lines) == 3


# --- whatever happens ---

REQUESTERS: tuple[Requester, ...] = (None, ANN, BEN, CAT)


class QueueMachine(RuleBasedStateMachine):
    """Any order of asks, starts, ends and cancellations, against a plain list of what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(slots=2, max_waiting=12, per_member=6)
        self.waiting: dict[int, tuple[Requester, Priority]] = {}

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds: float) -> None:
        self.desk.now += seconds

    @rule(requester=st.sampled_from(REQUESTERS), priority=st.sampled_from(("interactive", "batch")), slot=st.booleans())
    def ask(self, requester: Requester, priority: Priority, slot: bool) -> None:
        held = sum(who == requester for who, _ in self.waiting.values())
        try:
            number = self.desk.ask(requester, priority, int(slot))
        except Busy:
            assert len(self.waiting) >= 9 or held >= 2  # nobody is turned away while there is room
        else:
            self.waiting[number] = (requester, priority)

    @rule()
    def start(self) -> None:
        usable = len(self.desk.running) < 2
        ask = self.desk.next()
        if ask is None:
            assert not usable or not self.waiting
            return
        key = self.waiting.pop(ask.id)
        assert key == (ask.requester, ask.priority)
        if ask.slots:  # none of the same kind that came earlier is left behind
            earlier = [n for n, k in self.waiting.items() if k == key and n < ask.id and self._takes_slot(n)]
            assert not earlier

    @rule(pick=st.integers(0, 20))
    def leave(self, pick: int) -> None:
        numbers = [*self.desk.running, *self.waiting]
        if numbers:
            number = numbers[pick % len(numbers)]
            self.waiting.pop(number, None)
            self.desk.end(number)

    @rule()
    def give_up(self) -> None:
        assert self.desk.queue.drop(MODEL) == sorted(self.waiting)
        self.waiting.clear()

    def _takes_slot(self, number: int) -> bool:
        return self.desk.queue._waiting[number].slots > 0

    @invariant()
    def bounds_hold_and_counts_agree(self) -> None:
        queue = self.desk.queue
        assert len(queue) == queue.waiting(MODEL) == len(self.waiting) <= 12
        for priority in ("interactive", "batch"):
            assert queue.waiting_of(priority) == sum(kind == priority for _, kind in self.waiting.values())
        held = Counter(requester for requester, _ in self.waiting.values())
        assert all(held[member] <= 6 for member in (ANN, BEN, CAT))
        assert [digest for digest, _ in queue.wanted()] == ([MODEL] if self.waiting else [])

    def teardown(self) -> None:
        """Everybody who waits is served in the end, in as many starts as there are asks."""
        for number in tuple(self.desk.running):
            self.desk.end(number)
        for _ in range(len(self.waiting)):
            self.waiting.pop(self.desk.serve().id)
        assert not self.waiting
        assert self.desk.next() is None


TestQueueMachine = QueueMachine.TestCase


@pytest.mark.parametrize("seed", range(2))
def test_under_load_every_member_has_its_share_of_the_time(seed: int) -> None:
    """Ten members, each asking as fast as it may, some for ten times as long as others, four slots."""
    chance = random.Random(seed)
    desk = Desk(slots=4, per_member=16)
    members = [PeerId(f"member {n}") for n in range(10)]
    typical_s = {member: 0.5 * (1 + n) for n, member in enumerate(members)}
    had_s = dict.fromkeys(members, 0.0)
    ends: dict[int, tuple[float, PeerId]] = {}
    while desk.now < 2000:
        for member in chance.sample(members, len(members)):
            try:
                desk.ask(member)
            except Busy:
                continue
        while ask := desk.next():
            assert ask.requester is not None
            ends[ask.id] = (desk.now + chance.expovariate(1 / typical_s[ask.requester]), ask.requester)
        first = min(ends, key=lambda number: ends[number])
        desk.now, member = ends.pop(first)
        had_s[member] += desk.now - desk.running[first].started_s
        desk.end(first)
    share = sum(had_s.values()) / len(members)
    assert all(had == pytest.approx(share, rel=0.1) for had in had_s.values())


def test_a_newcomer_has_the_interactive_ones_before_it_and_not_the_batch_ones() -> None:
    desk = Desk()
    assert desk.queue.ahead(OTHER) == desk.queue.ahead(MODEL) == 0
    desk.ask(ANN)
    desk.next()
    desk.ask(ANN)
    desk.ask(BEN)
    desk.ask(CAT, "batch")
    assert desk.queue.ahead(MODEL) == 2
