"""Circuit breakers: what opens them, the one probe, what closes them, and that busy is no failure."""

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Priority
from meshmax.core import breaker
from meshmax.core.breaker import (
    BUSY_SPREAD,
    CLOSED,
    ENGINE_FAILURES,
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_BUSY_S,
    MAX_REASON,
    ON_TRIAL_S,
    OWN_BACKOFF_S,
    PROBE_S,
    RETURNS,
    WINDOW_S,
    Breakers,
    Standing,
)

A, B = PeerId("a"), PeerId("b")
MODEL, OTHER = Sha256("ab" * 32), Sha256("cd" * 32)
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")


def test_a_peer_of_which_nothing_is_known_may_be_asked() -> None:
    assert Breakers().standing(A, MODEL, 0.0) == CLOSED


def test_a_lost_connection_opens_at_once_for_every_model_of_that_peer() -> None:
    breakers = Breakers()
    breakers.on_failure(A, None, "peer_gone", 10.0)
    assert breakers.standing(A, MODEL, 10.4) == Standing("open", 10.0 + FIRST_BACKOFF_S, "peer_gone", 1)
    assert breakers.standing(A, OTHER, 10.4).state == "open"
    assert breakers.standing(B, MODEL, 10.4) == CLOSED


def test_an_engine_that_cannot_load_the_model_opens_at_once_for_that_model_only() -> None:
    breakers = Breakers()
    breakers.on_failure(A, MODEL, "engine_unavailable", 0.0)
    assert breakers.standing(A, MODEL, 0.4).state == "open"
    assert breakers.standing(A, OTHER, 0.4) == CLOSED


def test_failures_in_the_middle_of_answers_open_by_their_number_in_a_window() -> None:
    breakers = Breakers()
    for at in range(ENGINE_FAILURES - 1):
        breakers.on_failure(A, MODEL, "engine_crashed", float(at))
        assert breakers.standing(A, MODEL, float(at)) == CLOSED
    breakers.on_failure(A, MODEL, "engine_crashed", WINDOW_S + 0.5)  # the first is forgotten by now
    assert breakers.standing(A, MODEL, WINDOW_S + 0.5) == CLOSED
    breakers.on_failure(A, MODEL, "engine", WINDOW_S + 0.6)
    assert breakers.standing(A, MODEL, WINDOW_S + 0.6).failures == 1


def test_a_whole_answer_makes_one_counted_failure_good_and_its_beginning_none() -> None:
    breakers = Breakers()
    for _ in range(10):
        for _ in range(2):
            breakers.on_failure(A, MODEL, "engine", 0.0)
            breakers.on_answered(A, MODEL, 0.0)
    assert breakers.standing(A, MODEL, 0.0) == CLOSED
    for _ in range(ENGINE_FAILURES):
        breakers.on_success(A, MODEL)
        breakers.on_failure(A, MODEL, "engine", 0.0)
    assert breakers.standing(A, MODEL, 0.0).state == "open"


def test_an_engine_that_breaks_every_answer_is_left_alone_for_longer_each_time() -> None:
    breakers = Breakers()
    for _ in range(ENGINE_FAILURES):
        breakers.on_failure(A, MODEL, "engine_crashed", 0.0)
    assert breakers.on_probe_sent(A, MODEL, 1.0)
    breakers.on_success(A, MODEL)
    assert breakers.standing(A, MODEL, 1.0) == CLOSED
    breakers.on_failure(A, MODEL, "engine_crashed", 2.0)
    assert breakers.standing(A, MODEL, 2.0) == Standing("open", 2.0 + 2 * FIRST_BACKOFF_S, "engine_crashed", 2)


def test_who_was_not_proven_by_a_whole_answer_is_forgiven_after_a_while() -> None:
    breakers = Breakers()
    breakers.on_failure(A, MODEL, "engine_unavailable", 0.0)
    breakers.on_success(A, MODEL)
    breakers.on_failure(A, MODEL, "engine", 1.0 + ON_TRIAL_S + 0.1)
    assert breakers.standing(A, MODEL, 1.0 + ON_TRIAL_S + 0.1) == CLOSED


def test_streams_that_break_together_are_one_failure() -> None:
    breakers = Breakers()
    for _ in range(50):
        breakers.on_failure(A, None, "peer_gone", 0.0)
    assert breakers.standing(A, MODEL, 0.0) == Standing("open", FIRST_BACKOFF_S, "peer_gone", 1)


def test_the_time_out_doubles_with_each_failed_probe_up_to_a_minute() -> None:
    breakers = Breakers()
    now, pauses = 0.0, []
    for _ in range(10):
        breakers.on_failure(A, None, "connect", now)
        standing = breakers.standing(A, MODEL, now)
        pauses.append(standing.until_s - now)
        now = standing.until_s
        assert breakers.standing(A, MODEL, now).state == "half-open"
        assert breakers.on_probe_sent(A, MODEL, now)
    assert pauses == [min(FIRST_BACKOFF_S * 2**n, MAX_BACKOFF_S) for n in range(10)]


def test_the_time_out_has_jitter_of_up_to_a_half() -> None:
    pauses = set()
    for seed in range(50):
        breakers = Breakers(random.Random(seed))
        breakers.on_failure(A, None, "connect", 0.0)
        pauses.add(breakers.standing(A, MODEL, 0.0).until_s)
    assert len(pauses) == 50
    assert FIRST_BACKOFF_S / 2 <= min(pauses) < max(pauses) <= FIRST_BACKOFF_S


def test_half_open_exactly_one_probe_may_go() -> None:
    breakers = Breakers()
    breakers.on_failure(A, None, "connect", 0.0)
    assert breakers.on_probe_sent(A, MODEL, 1.0)
    assert not breakers.on_probe_sent(A, OTHER, 1.0)
    assert breakers.standing(A, MODEL, 1.0) == Standing("open", 1.0 + PROBE_S, "connect", 1, probing=True)
    breakers.on_success(A, MODEL)
    assert breakers.standing(A, MODEL, 1.5) == CLOSED
    assert not breakers.on_probe_sent(A, MODEL, 1.5)


def test_a_probe_that_was_given_up_frees_its_place() -> None:
    breakers = Breakers()
    breakers.on_failure(A, MODEL, "engine_unavailable", 0.0)
    assert breakers.on_probe_sent(A, MODEL, 1.0)
    breakers.on_probe_ended(A, MODEL, 1.0)
    assert breakers.standing(A, MODEL, 1.0) == Standing("half-open", FIRST_BACKOFF_S, "engine_unavailable", 1)
    assert breakers.on_probe_sent(A, MODEL, 1.5)
    breakers.on_probe_ended(A, MODEL, 1.0)  # that one was over before
    assert breakers.standing(A, MODEL, 1.5).probing


def test_a_probe_that_is_still_at_it_after_a_while_has_not_failed() -> None:
    breakers = Breakers()
    breakers.on_failure(A, MODEL, "engine_unavailable", 0.0)
    assert breakers.on_probe_sent(A, MODEL, 1.0)
    assert not breakers.on_probe_sent(A, MODEL, 1.0 + PROBE_S - 0.1)
    assert breakers.standing(A, MODEL, 1.0 + PROBE_S) == CLOSED
    assert not breakers.on_probe_sent(A, MODEL, 1.0 + PROBE_S)
    breakers.on_failure(A, MODEL, "engine", 2.0 + PROBE_S, sent_s=1.0)
    assert breakers.standing(A, MODEL, 2.0 + PROBE_S).failures == 2


def test_a_peer_that_takes_a_probe_can_be_reached_whatever_its_engine_does_with_it() -> None:
    breakers = Breakers()
    breakers.on_failure(A, None, "peer_gone", 0.0)
    breakers.on_failure(A, MODEL, "engine_unavailable", 0.0)
    assert breakers.on_probe_sent(A, MODEL, 1.0)
    assert breakers.standing(A, OTHER, 1.0).probing
    breakers.on_reached(A)
    assert breakers.standing(A, OTHER, 1.0) == CLOSED
    assert breakers.standing(A, MODEL, 1.0).probing


def test_what_was_sent_before_the_circuit_opened_neither_ends_the_probe_nor_opens_it_again() -> None:
    breakers = Breakers()
    breakers.on_failure(A, None, "peer_gone", 10.0, sent_s=5.0)
    assert breakers.on_probe_sent(A, MODEL, 11.0)
    breakers.on_failure(A, None, "peer_gone", 12.0, sent_s=6.0)
    assert breakers.standing(A, MODEL, 12.0).probing
    breakers.on_failure(A, None, "peer_gone", 13.0, sent_s=11.0)
    assert breakers.standing(A, MODEL, 13.0) == Standing("open", 13.0 + 2 * FIRST_BACKOFF_S, "peer_gone", 2)


def test_a_peer_that_has_come_back_may_be_asked_once_at_once_and_after_a_restart_is_not_busy() -> None:
    breakers = Breakers()
    breakers.on_busy(A, OTHER, 50.0, 100.0)
    breakers.on_failure(A, MODEL, "engine_unavailable", 100.0)
    breakers.on_failure(A, OTHER, "engine_unavailable", 100.0)
    breakers.on_failure(B, None, "connect", 100.0)
    breakers.on_returned(A, 100.0)
    assert breakers.standing(A, MODEL, 100.0).state == "half-open"
    assert breakers.standing(A, OTHER, 100.0).code == "busy"
    assert breakers.standing(B, MODEL, 100.0).state == "open"
    breakers.on_returned(A, 100.0, restarted=True)
    assert breakers.standing(A, OTHER, 100.0).state == "half-open"


@pytest.mark.parametrize("restarted", [False, True])
def test_one_that_comes_back_again_and_again_waits_for_its_time_like_any_other(restarted: bool) -> None:
    breakers, now, probes = Breakers(), 0.0, 0
    for _ in range(6000):  # it takes a prompt, drops it, and says with each beat that it has just started
        if breakers.standing(A, MODEL, now).state != "open":
            breakers.on_probe_sent(A, MODEL, now)
            breakers.on_returned(A, now + 0.02, restarted=restarted)
            breakers.on_failure(A, None, "peer_gone", now + 0.05, sent_s=now)
            breakers.on_probe_ended(A, MODEL, now)
            probes += 1
        now += 0.1
        breakers.on_returned(A, now, restarted=restarted)
    assert probes <= 12 + RETURNS * (now / WINDOW_S)


def test_after_a_whole_answer_its_returns_count_anew() -> None:
    breakers = Breakers()
    for at in range(3 * RETURNS):
        breakers.on_failure(A, None, "peer_gone", float(at))
        breakers.on_returned(A, at + 0.1)
        assert breakers.standing(A, MODEL, at + 0.1).state == "half-open"
        if at % RETURNS == RETURNS - 1:
            breakers.on_answered(A, MODEL, at + 0.2)


def test_our_own_engine_is_never_left_alone_for_long_and_what_it_said_is_kept() -> None:
    breakers, now = Breakers(), 0.0
    for _ in range(10):
        breakers.on_failure(A, MODEL, "engine_unavailable", now, most_s=OWN_BACKOFF_S, reason="x" * 1000)
        standing = breakers.standing(A, MODEL, now)
        assert standing.until_s <= now + OWN_BACKOFF_S
        assert standing.reason == "x" * MAX_REASON
        now = standing.until_s


def test_a_busy_peer_is_asked_again_when_its_status_told_that_it_was_full_and_is_not_any_more() -> None:
    breakers = Breakers()
    breakers.on_busy(A, MODEL, 20.0, 0.0)
    breakers.on_load(A, MODEL, True, 0.1)  # of a status from before, or it is busy for another reason
    assert breakers.standing(A, MODEL, 0.1).code == "busy"
    breakers.on_load(A, MODEL, False, 0.2)
    breakers.on_load(A, MODEL, True, 1.0)
    assert breakers.standing(A, MODEL, 1.0) == CLOSED
    breakers.on_busy(A, MODEL, 20.0, 2.0, code="draining")
    breakers.on_load(A, MODEL, False, 2.1)
    breakers.on_load(A, MODEL, True, 2.2)
    assert breakers.standing(A, MODEL, 2.2).code == "draining"


def test_a_busy_peer_is_left_alone_for_as_long_as_it_asks_and_has_not_failed() -> None:
    breakers = Breakers()
    breakers.on_busy(A, MODEL, 5.0, 0.0)
    assert breakers.standing(A, MODEL, 4.9) == Standing("open", 5.0, "busy", 0)
    assert breakers.standing(A, OTHER, 4.9) == CLOSED
    assert breakers.standing(A, MODEL, 5.0) == CLOSED
    breakers.on_busy(A, MODEL, 1e9, 10.0)
    assert breakers.standing(A, MODEL, 10.0).until_s == 10.0 + MAX_BUSY_S
    breakers.on_answered(A, MODEL, 11.0)  # an answer that was under way: it is busy all the same
    assert breakers.standing(A, MODEL, 11.0).code == "busy"


def test_a_batch_request_that_is_turned_away_keeps_no_interactive_one_out() -> None:
    breakers = Breakers()
    breakers.on_busy(A, MODEL, 5.0, 0.0, "batch")
    assert breakers.standing(A, MODEL, 1.0, "interactive") == CLOSED
    assert breakers.standing(A, MODEL, 1.0, "batch").state == "open"
    breakers.on_busy(A, MODEL, 5.0, 1.0, "interactive", "draining")
    assert breakers.standing(A, MODEL, 1.0, "batch") == Standing("open", 6.0, "draining", 0)


def test_a_probe_that_meets_a_busy_peer_shows_that_it_can_be_reached() -> None:
    breakers = Breakers()
    breakers.on_failure(A, None, "connect", 0.0)
    assert breakers.on_probe_sent(A, MODEL, 1.0)
    breakers.on_busy(A, MODEL, 3.0, 1.0)
    assert breakers.standing(A, OTHER, 1.0) == CLOSED
    assert breakers.standing(A, MODEL, 1.0).code == "busy"
    assert breakers.standing(A, MODEL, 4.0) == CLOSED


def test_the_table_is_bounded_and_keeps_nothing_of_who_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "MAX_CIRCUITS", 3)
    breakers = Breakers()
    for number in range(10):
        breakers.on_failure(PeerId(f"p{number}"), None, "connect", 0.0)
    assert breakers.standing(PeerId("p6"), MODEL, 0.0) == CLOSED
    assert breakers.standing(PeerId("p7"), MODEL, 0.0).state == "open"
    for number in range(10):
        breakers.on_answered(PeerId(f"p{number}"), MODEL, 0.0)
    assert len(breakers) == 0


class BreakerMachine(RuleBasedStateMachine):
    """One peer and one model, any order of asks and of what becomes of them, told as services.trial tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers(random.Random(0))
        self.now = 0.0
        self.asks: dict[int, float] = {}  # under way, when each was sent
        self.probe: int | None = None
        self.count = 0

    @rule(seconds=st.floats(0.0, 70.0))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.probe is not None and self.now >= self.asks[self.probe] + PROBE_S:
            self.probe = None  # it has not failed, so that it is none any more

    def moment(self) -> None:
        """What is sent and what ends are never of the very same moment: asks are told apart by when they were sent."""
        self.pass_time(0.001)

    @rule()
    def ask(self) -> None:
        """Nobody asks a peer whose circuit is open; of those who ask one that is half-open the first alone finds out."""
        state = self.breakers.standing(A, MODEL, self.now).state
        if state == "open":
            return
        self.moment()
        self.count += 1
        self.asks[self.count] = self.now
        probe = self.breakers.on_probe_sent(A, MODEL, self.now)
        assert probe == (state == "half-open")
        if probe:
            assert self.probe is None
            self.probe = self.count

    def end(self, data: st.DataObject) -> tuple[float, bool]:
        """When it was sent, and whether it was the probe."""
        self.moment()
        number = data.draw(st.sampled_from(sorted(self.asks)))
        probe = number == self.probe
        if probe:
            self.probe = None
        return self.asks.pop(number), probe

    @precondition(lambda self: self.asks)
    @rule(
        data=st.data(),
        code=st.sampled_from(["connect", "engine", "engine_crashed", "engine_unavailable"]),
        whole=st.booleans(),
    )
    def fail(self, data: st.DataObject, code: str, whole: bool) -> None:
        sent_s, probe = self.end(data)
        self.breakers.on_failure(A, None if whole else MODEL, code, self.now, sent_s=sent_s)
        if probe:
            self.breakers.on_probe_ended(A, MODEL, sent_s)

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def is_left(self, data: st.DataObject) -> None:
        sent_s, probe = self.end(data)
        if probe:
            self.breakers.on_probe_ended(A, MODEL, sent_s)
            assert not self.breakers.standing(A, MODEL, self.now).probing

    @precondition(lambda self: self.asks)
    @rule(data=st.data(), retry_after_s=st.floats(0.0, 100.0), priority=st.sampled_from(["interactive", "batch"]))
    def is_turned_away(self, data: st.DataObject, retry_after_s: float, priority: Priority) -> None:
        sent_s, probe = self.end(data)
        self.breakers.on_busy(A, MODEL, retry_after_s, self.now, priority)
        if probe:
            self.breakers.on_probe_ended(A, MODEL, sent_s)

    @precondition(lambda self: self.asks)
    @rule(data=st.data(), whole=st.booleans())
    def succeed(self, data: st.DataObject, whole: bool) -> None:
        if whole:
            self.end(data)
            self.breakers.on_answered(A, MODEL, self.now)
        else:
            self.breakers.on_success(A, MODEL)
        self.probe = None
        assert self.breakers.standing(A, MODEL, self.now).failures == 0

    @rule(restarted=st.booleans())
    def come_back(self, restarted: bool) -> None:
        self.breakers.on_returned(A, self.now, restarted=restarted)

    @rule(has_room=st.booleans())
    def tell_load(self, has_room: bool) -> None:
        self.breakers.on_load(A, MODEL, has_room, self.now)

    @invariant()
    def nobody_is_out_for_ever(self) -> None:
        for priority in PRIORITIES:
            standing = self.breakers.standing(A, MODEL, self.now, priority)
            assert (standing.state == "open") == (standing.until_s > self.now)
            assert standing.until_s <= self.now + max(MAX_BACKOFF_S, MAX_BUSY_S * (1 + BUSY_SPREAD))
            assert standing.probing <= (self.probe is not None)

    @invariant()
    def the_table_is_small(self) -> None:
        assert len(self.breakers) <= 2


TestBreakerMachine = BreakerMachine.TestCase


def test_an_error_that_says_not_now_is_no_failure_whoever_tells_of_it() -> None:
    breakers = Breakers()
    breakers.on_failure(A, MODEL, "busy", 0.0, 5.0, "batch")
    assert breakers.standing(A, MODEL, 1.0).state == "closed"
    turned_away = breakers.standing(A, MODEL, 1.0, "batch")
    assert (turned_away.code, turned_away.failures) == ("busy", 0)
