"""One request, whatever becomes of the peers: who is asked when, and that the client gets the whole answer, once."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import (
    Busy,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineCrashed,
    InvalidRequest,
    MeshmaxError,
    PeerGone,
)
from meshmax.base.ids import PeerId
from meshmax.base.inference import Delta, EmbedRequest, Finish, GenerateRequest, Moved, Options, ToolCall, Vector
from meshmax.core.delivery import MAX_ATTEMPTS, OVERDUE_S
from meshmax.core.delivery_wait import FIRST_PAUSE_S, MOST_PAUSE_S, PATIENCE_S, STUCK_S
from meshmax.core.pace import FRAME_SILENCE_S
from tests.core.delivery_sim import RTT_S, Peer, Run

WORDS = " ".join(f"word{n}" for n in range(50))
PROMPT = GenerateRequest(WORDS)
TEXTS = EmbedRequest(tuple(f"text {n}" for n in range(20)))


def whole(run: Run) -> bool:
    last = run.given[-1] if run.given else None
    return run.done and run.text == WORDS and isinstance(last, Finish) and last.output_tokens == 50


def test_the_best_peer_answers_alone_where_nothing_goes_wrong() -> None:
    run = Run([Peer("a"), Peer("b")], PROMPT).run()
    assert whole(run)
    assert run.kinds == [("a", "first")]
    assert not run.moved
    assert not run.suspected


@pytest.mark.parametrize(("says_s", "told_s"), [(0.03, 0.03), (1e6, 0.05), (0.0, 0.0)])
def test_a_load_that_a_peer_tells_counts_for_no_more_than_we_waited(says_s: float, told_s: float) -> None:
    run = Run([Peer("a")], PROMPT)
    run.core.begin(0.0)
    run.core.on_events(0, (Delta("word0"),), 0.05)
    assert run.core.attempts()[0].load_s == 0.0
    run.core.on_events(0, (Delta("word1"), Finish(output_tokens=2, load_s=says_s)), 0.1)
    assert run.core.attempts()[0].load_s == told_s


@pytest.mark.parametrize("fault", ["dies", "crashes", "busy", "ends"])
def test_before_the_first_token_the_next_best_is_asked_at_once(fault: str) -> None:
    run = Run([Peer("a", fault=fault, for_s=1.0), Peer("b")], PROMPT).run()  # type: ignore[arg-type]
    assert whole(run)
    assert run.kinds == [("a", "first"), ("b", "retry")]
    assert not run.moved
    assert run.gave_at[0] < 0.15


@pytest.mark.parametrize("fault", ["dies", "crashes", "ends"])
@pytest.mark.parametrize("after", [1, 7, 49, 50])
def test_after_it_another_goes_on_where_the_first_stopped(fault: str, after: int) -> None:
    run = Run([Peer("a", fault=fault, after=after), Peer("b")], PROMPT).run()  # type: ignore[arg-type]
    assert whole(run)
    assert run.kinds == [("a", "first"), ("b", "continuation")]
    assert run.moved == ["b"]
    assert run.longest_gap_s < 0.2
    assert [attempt.tokens for attempt in run.core.attempts()] == [after, 50 - after]


def test_a_peer_that_freezes_is_replaced_within_two_seconds() -> None:
    run = Run([Peer("a", fault="freezes", after=10), Peer("b")], PROMPT).run()
    assert whole(run)
    assert run.moved == ["b"]
    assert 1.0 <= run.longest_gap_s < FRAME_SILENCE_S + 0.2
    assert [attempt.error for attempt in run.core.attempts()] == ["peer_gone", ""]


def test_an_engine_that_hangs_is_replaced_by_what_was_learnt_of_its_speed() -> None:
    quick = Run([Peer("a", fault="hangs", after=10), Peer("b")], PROMPT).run()
    assert whole(quick)
    assert quick.longest_gap_s < 1.3
    slow = Run([Peer("a", gap_s=1.0, fault="hangs", after=10), Peer("b")], PROMPT).run()
    assert whole(slow)
    assert 2.0 <= slow.longest_gap_s < 3.5
    assert [attempt.error for attempt in slow.core.attempts()] == ["engine", ""]


def test_a_steady_slow_engine_is_not_suspected() -> None:
    run = Run([Peer("a", gap_s=3.0), Peer("b")], PROMPT).run()
    assert whole(run)
    assert run.kinds == [("a", "first")]


def test_who_speaks_first_goes_on_when_a_suspected_peer_comes_back() -> None:
    run = Run([Peer("a", fault="freezes", after=10, for_s=1.5, lasting=False), Peer("b", first_s=5.0)], PROMPT).run()
    assert whole(run)
    assert not run.moved
    assert run.kinds == [("a", "first"), ("b", "continuation")]
    assert run.cancelled[1] <= run.gave_at[10]
    assert run.produced.get(1, 0) == 0


def test_two_frozen_peers_are_both_replaced() -> None:
    peers = [Peer("a", fault="freezes", after=10), Peer("b", fault="freezes"), Peer("c")]
    run = Run(peers, PROMPT).run()
    assert whole(run)
    assert run.moved == ["c"]
    assert run.longest_gap_s < 2 * FRAME_SILENCE_S + 0.3


def test_the_only_peer_is_waited_for_though_it_is_suspected() -> None:
    run = Run([Peer("a", fault="freezes", after=10, for_s=5.0, lasting=False)], PROMPT).run()
    assert whole(run)
    assert len(run.suspected) == 1
    assert run.kinds == [("a", "first")]


@pytest.mark.parametrize("stopping", [False, True])
def test_in_the_middle_the_only_peer_is_asked_again_when_it_was_undrained_or_is_back(stopping: bool) -> None:
    run = Run([Peer("a")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_events(0, (Delta("word0"),), 0.1))
    run.absent.add("a")  # its status says that it takes none
    run.do(run.core.on_failed(0, Draining(stopping=stopping), 0.2))
    run.do(run.core.on_news(5.0))
    assert run.core.waits
    run.absent.clear()
    run.do(run.core.on_news(20.0))
    assert run.kinds == [("a", "first"), ("a", "continuation")]


def test_a_drained_peer_whose_status_does_not_say_so_yet_is_not_asked_in_a_row() -> None:
    run = Run([Peer("a")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_events(0, (Delta("word0"),), 0.1))
    now, asked = 0.2, 0
    while not run.core.over:
        while asked < len(run.started):
            run.do(run.core.on_failed(asked, Draining(), now))
            asked += 1
        now = max(run.core.deadline(), now)
        run.do(run.core.tick(now))
    assert asked < MAX_ATTEMPTS + 2
    assert isinstance(run.error, Draining)
    assert now > 10.0


def test_before_the_first_token_a_drained_peer_is_not_waited_for() -> None:
    run = Run([Peer("a")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_failed(0, Draining(), 0.1))
    assert isinstance(run.error, Draining)


def test_the_only_peers_engine_is_asked_again_after_a_crash() -> None:
    run = Run([Peer("a", fault="crashes", after=10, lasting=False)], PROMPT).run()
    assert whole(run)
    assert run.kinds == [("a", "first"), ("a", "continuation")]


def test_a_prompt_that_brings_engines_down_is_given_up_after_three() -> None:
    run = Run([Peer(name, fault="crashes") for name in "abcdefgh"], PROMPT).run()
    assert isinstance(run.error, EngineCrashed)
    assert len(run.started) == 3


def test_who_broke_off_is_not_asked_again_before_those_who_did_not() -> None:
    """However much better it looks: it would give a token and break off, again and again."""
    sound = Peer("b", first_s=1.0, gap_s=1.0)
    run = Run([Peer("a", first_s=0.5, gap_s=0.1, fault="crashes", after=1), sound], PROMPT).run()
    assert whole(run)
    assert run.kinds == [("a", "first"), ("b", "continuation")]
    worse = [Peer("a", first_s=2.0, gap_s=1.0, fault="crashes", after=1), sound]  # they speak at the same moment
    assert whole(Run(worse, PROMPT).run())


def test_a_fault_of_the_request_is_told_when_a_second_peer_says_so() -> None:
    run = Run([Peer("a"), Peer("b"), Peer("c")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_failed(0, ContextTooLong(), 0.1))
    assert len(run.started) == 2
    run.do(run.core.on_failed(1, ContextTooLong(), 0.2))
    assert isinstance(run.error, ContextTooLong)
    assert len(run.started) == 2


@pytest.mark.parametrize("after", [PeerGone(), Busy(), EngineCrashed()], ids=lambda error: error.code)
def test_a_fault_of_the_request_is_told_when_nobody_else_can_say(after: MeshmaxError) -> None:
    run = Run([Peer("a"), Peer("b")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_failed(0, InvalidRequest(), 0.1))
    run.do(run.core.on_failed(1, after, 0.2))
    assert isinstance(run.error, InvalidRequest)
    assert len(run.started) == 2
    alone = Run([Peer("a")], PROMPT)
    alone.do(alone.core.begin(0.0))
    alone.do(alone.core.on_failed(0, InvalidRequest(), 0.1))
    assert isinstance(alone.error, InvalidRequest)


@pytest.mark.parametrize(("error", "refuted"), [(InvalidRequest(), "a"), (ContextTooLong(), None)])
def test_who_finds_fault_with_a_request_that_another_answers_was_wrong_or_too_small(
    error: MeshmaxError, refuted: str | None
) -> None:
    run = Run([Peer("a", first_s=1.0), Peer("b")], PROMPT)
    run.at(0.1, lambda: run.do(run.core.on_failed(0, error, 0.1)))
    assert whole(run.run())
    assert run.kinds == [("a", "first"), ("b", "retry")]
    assert run.core.refuted == refuted


def test_a_smaller_context_elsewhere_does_not_end_what_the_first_still_does() -> None:
    run = Run([Peer("a", first_s=3.0, late_s=0.5), Peer("b")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.tick(0.5))
    assert run.kinds == [("a", "first"), ("b", "hedge")]
    run.do(run.core.on_failed(1, ContextTooLong(), 0.6))
    assert run.error is None
    run.do(run.core.on_accepted(0, 0.7))


# --- hedging -----------------------------------------------------------------------------------------------------------


def test_a_late_peer_gets_a_second_one_beside_it_and_the_loser_stops() -> None:
    run = Run([Peer("a", first_s=0.9, late_s=0.3), Peer("b", first_s=0.1)], PROMPT).run()
    assert whole(run)
    assert run.kinds == [("a", "first"), ("b", "hedge")]
    assert run.gave_at[0] == pytest.approx(0.4)
    assert run.cancelled[0] == pytest.approx(0.4)
    assert run.produced.get(0, 0) == 0
    assert not run.moved
    assert [attempt.error for attempt in run.core.attempts()] == ["cancelled", ""]


def test_no_second_one_is_asked_that_would_be_later_still() -> None:
    run = Run([Peer("a", first_s=0.9, late_s=0.3), Peer("b", first_s=30.0)], PROMPT).run()
    assert run.kinds == [("a", "first")]


def test_no_second_one_is_asked_that_failed_lately_or_is_full() -> None:
    run = Run([Peer("a", first_s=0.9, late_s=0.3), Peer("b", first_s=0.1, rests_until=60.0)], PROMPT).run()
    assert whole(run)
    assert run.kinds == [("a", "first")]


def test_no_second_one_is_asked_without_budget_or_where_it_is_not_wished() -> None:
    peers = [Peer("a", first_s=0.9, late_s=0.3), Peer("b", first_s=0.1)]
    assert Run(peers, PROMPT, hedges=0).run().kinds == [("a", "first")]
    assert Run(peers, PROMPT, hedge=False).run().kinds == [("a", "first")]


def test_a_peer_that_never_speaks_is_not_waited_for_much_longer_than_it_should_take_whatever_the_budget() -> None:
    run = Run([Peer("a", fault="hangs", late_s=0.3), Peer("b", first_s=0.1)], PROMPT, hedges=0).run()
    assert whole(run)
    assert run.kinds == [("a", "first"), ("b", "hedge")]
    assert run.gave_at[0] == pytest.approx(OVERDUE_S + 0.1, abs=0.1)
    slow = Run([Peer("a", first_s=200.0, late_s=50.0), Peer("b", first_s=0.1)], PROMPT, hedges=0).run()
    assert slow.kinds == [("a", "first")]  # a long load is not overdue


def test_the_budget_is_looked_at_again() -> None:
    run = Run([Peer("a", fault="hangs", late_s=0.3), Peer("b", first_s=0.1)], PROMPT, hedges=0)
    run.at(3.0, lambda: setattr(run, "hedges", 1))
    assert whole(run.run())
    assert run.gave_at[0] < 6.0


# --- nobody left -------------------------------------------------------------------------------------------------------


def test_all_busy_is_waited_for_shortly_and_then_told_with_the_shortest_wait() -> None:
    run = Run([Peer("a", fault="busy", for_s=9.0), Peer("b", fault="busy", for_s=5.0)], PROMPT).run()
    assert isinstance(run.error, Busy)
    assert run.error.retry_after_s == 5.0
    assert run.now <= PATIENCE_S


def test_a_peer_that_comes_back_while_nobody_is_left_goes_on() -> None:
    run = Run([Peer("a", fault="dies", after=10)], PROMPT)

    def back() -> None:
        run.peers["a"].dead = False  # type: ignore[index]
        run.peers["a"].fault = "none"  # type: ignore[index]

    run.at(4.0, back)
    assert whole(run.run())
    assert len(run.started) <= MAX_ATTEMPTS


def test_the_pauses_before_a_peer_is_asked_again_grow_and_have_jitter() -> None:
    def pauses(seed: int) -> list[float]:
        peer = Peer("a", fault="crashes", after=10, lasting=False)  # then gone for good
        run = Run([peer], PROMPT, seed=seed)
        run.at(0.2, lambda: setattr(peer, "dead", True))
        run.run()
        assert run.error
        sent = [attempt.at_s for attempt in run.core.attempts()]
        return [later - earlier for earlier, later in pairwise(sent[1:])]

    assert pauses(1) != pauses(2)
    for seed in range(8):
        first_s, *_, last_s = waited = pauses(seed)
        assert FIRST_PAUSE_S / 2 <= first_s < last_s
        assert max(waited) <= MOST_PAUSE_S + 2 * RTT_S


def test_nobody_left_in_the_middle_is_told_in_time() -> None:
    run = Run([Peer("a", fault="dies", after=10)], PROMPT)
    run.at(0.3, lambda: run.absent.add("a"))
    run.run()
    assert isinstance(run.error, PeerGone)
    assert run.now <= 1 + STUCK_S


def test_a_peer_that_comes_back_and_is_lost_once_more_is_waited_for_as_long_again() -> None:
    run = Run([Peer("a", fault="dies", after=10)], PROMPT)

    def comes(sound: bool) -> None:
        if sound:
            run.peers[PeerId("a")] = Peer("a")
        run.absent.clear()
        run.do(run.core.on_news(run.now))

    run.at(0.3, lambda: run.absent.add("a"))
    run.at(STUCK_S - 1, lambda: comes(sound=False))
    run.at(STUCK_S - 0.9, lambda: run.absent.add("a"))
    run.at(2 * STUCK_S - 5, lambda: comes(sound=True))
    assert run.run().done
    assert run.text == WORDS


def test_one_deadline_holds_for_all() -> None:
    run = Run([Peer("a", gap_s=0.5)], PROMPT, deadline_s=5.0).run()
    assert isinstance(run.error, DeadlineExceeded)
    assert run.now == pytest.approx(5.0)
    assert WORDS.startswith(run.text)


# --- how an answer is carried on ---------------------------------------------------------------------------------------


def test_an_engine_that_cannot_go_on_is_asked_from_the_beginning_where_that_comes_out_the_same() -> None:
    greedy = GenerateRequest(WORDS, options=Options(top_k=1))
    run = Run([Peer("a", fault="dies", after=10), Peer("b", goes_on=False)], greedy).run()
    assert run.text == WORDS
    assert run.kinds == [("a", "first"), ("b", "continuation"), ("b", "continuation")]


def test_where_that_may_differ_another_one_is_asked() -> None:
    run = Run([Peer("a", fault="dies", after=10), Peer("b", goes_on=False), Peer("c")], PROMPT).run()
    assert whole(run)
    assert run.moved == ["c"]


@pytest.mark.parametrize("after", [1, 5, 19, 20])
def test_of_vectors_only_those_that_are_missing_are_asked_elsewhere(after: int) -> None:
    run = Run([Peer("a", fault="dies", after=after), Peer("b")], TEXTS).run()
    vectors = [event for event in run.given if isinstance(event, Vector)]
    assert sorted((v.index, v.values) for v in vectors) == [(n, f"text {n}".encode() * 4) for n in range(20)]
    last = run.given[-1]
    assert isinstance(last, Finish)
    if after < 20:
        asked = run.started[1].request
        assert isinstance(asked, EmbedRequest)
        assert len(asked.inputs) == 20 - after


def test_an_answer_that_lacks_only_its_end_is_ended_though_nobody_is_left() -> None:
    run = Run([Peer("a", fault="dies", after=20)], TEXTS).run()
    assert run.done
    assert len(run.given) == 21
    assert len(run.started) == 1
    calls = Run([Peer("a")], PROMPT)
    calls.do(calls.core.begin(0.0))
    calls.do(calls.core.on_events(0, [Delta(tool_calls=(ToolCall("f", {}),))], 0.1))
    calls.do(calls.core.on_failed(0, PeerGone(), 0.2))
    assert calls.done
    assert isinstance(calls.given[-1], Finish)


def test_in_the_middle_of_an_answer_full_peers_are_waited_for() -> None:
    run = Run([Peer("a", fault="dies", after=10), Peer("b", fault="busy", for_s=5.0)], PROMPT)
    run.at(20.0, lambda: setattr(run.peers["b"], "fault", "none"))  # type: ignore[index]
    assert whole(run.run())
    assert 20 < run.now < 27
    assert run.moved == ["b"]


def test_our_own_delay_is_not_the_peers() -> None:
    run = Run([Peer("a"), Peer("b")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_accepted(0, 0.01))
    run.do(run.core.tick(9.0))  # we were stopped meanwhile
    assert run.kinds == [("a", "first")]
    run.do(run.core.on_heard(0, 9.1))
    assert not run.suspected
    run.do(run.core.on_heard(0, 9.2))
    assert run.core.deadline() > 9.2


def test_a_client_that_takes_nothing_makes_no_peer_suspect() -> None:
    run = Run([Peer("a"), Peer("b")], PROMPT)
    run.do(run.core.begin(0.0))
    run.do(run.core.on_events(0, [Delta("word0")], 0.1))
    run.core.on_held(0)
    assert run.core.deadline() == math.inf
    run.core.on_resumed(0, 100.0)
    assert 100.5 < run.core.deadline() < 106.0


# --- any schedule of faults --------------------------------------------------------------------------------------------

faults = st.sampled_from(["none", "dies", "crashes", "freezes", "hangs", "ends"])
peers = st.builds(
    Peer,
    name=st.just("x"),
    first_s=st.floats(0.01, 3.0),
    gap_s=st.floats(0.001, 2.5),
    fault=faults,
    after=st.integers(0, 52),
    for_s=st.sampled_from([0.3, 1.5, 4.0, 30.0, math.inf]),
    goes_on=st.booleans(),
    together=st.integers(1, 5),
    late_s=st.floats(0.05, 3.0),
    lasting=st.booleans(),
)


def named(drawn: list[Peer]) -> list[Peer]:
    for number, peer in enumerate(drawn):
        peer.name = f"peer{number}"
    return drawn


@settings(max_examples=300, deadline=None)
@given(drawn=st.lists(peers, max_size=6), at=st.integers(0, 6))
def test_with_one_sound_peer_every_answer_is_whole_and_byte_equal(drawn: list[Peer], at: int) -> None:
    drawn.insert(min(at, len(drawn)), Peer("sound"))
    # Three engines that crash over one prompt are the prompt's fault.
    while sum(peer.fault == "crashes" for peer in drawn) > 2:
        drawn.remove(next(peer for peer in drawn if peer.fault == "crashes"))
    run = Run(named(drawn), PROMPT).run()
    assert whole(run), (run.error, run.kinds)


@settings(max_examples=300, deadline=None)
@given(drawn=st.lists(peers, min_size=1, max_size=6))
def test_nothing_is_ever_repeated_or_contradicted_and_every_request_ends(drawn: list[Peer]) -> None:
    run = Run(named(drawn), PROMPT).run(until_s=4000.0)
    assert run.done or run.error
    assert WORDS.startswith(run.text)
    assert sum(isinstance(event, Finish) for event in run.given) == run.done
    assert all(isinstance(event, Moved) is False for event in run.given[-1:])
    if run.done:
        assert whole(run)
    assert len(run.started) <= 64


@settings(max_examples=200, deadline=None)
@given(drawn=st.lists(peers, max_size=4))
def test_every_vector_comes_once_whatever_happens(drawn: list[Peer]) -> None:
    drawn.append(Peer("sound"))
    while sum(peer.fault == "crashes" for peer in drawn) > 2:
        drawn.remove(next(peer for peer in drawn if peer.fault == "crashes"))
    run = Run(named(drawn), TEXTS).run()
    assert run.done
    indexes = [event.index for event in run.given if isinstance(event, Vector)]
    assert sorted(indexes) == list(range(20))
