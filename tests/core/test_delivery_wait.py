"""Requests that wait: for whom, how long, what lets them go, and what they hear otherwise."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import Busy, EngineUnavailable, MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.inference import GenerateRequest
from meshmax.core.breaker import FIRST_BACKOFF_S, PROBE_S
from meshmax.core.delivery_wait import MAX_WAITS, MIDDLE_S, PATIENCE_S, Patience
from meshmax.core.delivery_words import Choice, Rest
from meshmax.core.pace import Gaps, frame_gaps
from meshmax.core.refusal import NobodyNow
from tests.core.delivery_sim import Peer, Run
from tests.core.waiting_sim import Holder, Mesh, Phase, State

WORDS = "one two three four five"
PROMPT = GenerateRequest(" ".join(f"word{n}" for n in range(50)))


def choice(name: str, from_s: float, rests: Rest, *, ours: bool = False) -> Choice:
    return Choice(PeerId(name), Gaps(), frame_gaps(), ours=ours, from_s=from_s, rests=rests, name=name)


def until(
    *choices: Choice, middle: bool = False, ends_s: float = math.inf, errors: tuple[MeshmaxError, ...] = ()
) -> float | None:
    return Patience(random.Random(1), 0.0, ends_s).until(choices, set(), errors, 0.0, middle=middle)


# --- how long ----------------------------------------------------------------------------------------------------------


def test_one_that_is_tried_again_soon_is_waited_for_and_one_that_is_not_is_not() -> None:
    assert until(choice("a", 5.0, "broken")) == 5.0
    assert until(choice("a", PATIENCE_S + 1, "broken")) is None
    assert until(choice("a", PATIENCE_S + 1, "broken"), choice("b", 2.0, "broken")) == 2.0


def test_of_a_probe_under_way_the_outcome_is_waited_for() -> None:
    assert until(choice("a", PROBE_S, "probed")) == PROBE_S


@pytest.mark.parametrize("rests", ["busy", "full"])
def test_full_queues_are_not_waited_for_before_the_first_token(rests: Rest) -> None:
    assert until(choice("a", 0.5, rests)) is None
    assert until(choice("a", 0.5, rests), errors=(Busy(),)) is None
    assert until(choice("a", 0.5, rests), choice("b", 5.0, "broken")) == (0.5 if rests == "busy" else 5.0)


def test_a_busy_peer_is_waited_for_where_another_one_broke() -> None:
    assert until(choice("a", 5.0, "busy"), errors=(PeerGone(),)) == 5.0


def test_in_the_middle_of_an_answer_all_are_waited_for() -> None:
    assert until(choice("a", 50.0, "busy"), middle=True) == 50.0
    assert until(choice("a", 50.0, "full"), middle=True) == MIDDLE_S  # or until its status says otherwise
    assert until(choice("a", 50.0, "broken"), middle=True) == 50.0


def test_nobody_is_waited_for_beyond_the_deadline() -> None:
    assert until(choice("a", 5.0, "broken"), ends_s=4.0) is None


def test_what_is_told_of_waits_is_bounded() -> None:
    patience = Patience(random.Random(1), 100.0, math.inf)
    for number in range(100):
        patience.on_wait("m", [choice("a", 5.0, "broken")], 101.0 + number)
        patience.on_wait("m", [choice("a", 5.0, "broken")], 101.2 + number)
        patience.on_waited(101.5 + number)
    assert len(patience.waits) == MAX_WAITS
    first = patience.waits[0]
    assert (first.at_s, first.took_s) == (1.0, 0.5)
    assert first.why == "a, the only one that has model 'm' ready, failed lately (error)"


# --- what lets them go -------------------------------------------------------------------------------------------------


def test_a_request_for_the_only_peer_waits_until_its_time_and_is_answered() -> None:
    run = Run([Peer("a", rests_until=3.0)], PROMPT).run()
    assert run.done
    assert run.core.attempts()[0].at_s == 3.0
    (wait,) = run.core.waited()
    assert (wait.at_s, wait.took_s) == (0.0, 3.0)


def test_news_let_a_request_go_before_its_time() -> None:
    run = Run([Peer("a", rests_until=3.0)], PROMPT)

    def restarts() -> None:
        run.peers[PeerId("a")].rests_until = 0.0
        run.do(run.core.on_news(run.now))

    run.at(1.0, restarts)
    assert run.run().done
    assert run.core.attempts()[0].at_s == 1.0


def test_somebody_who_comes_and_has_the_model_is_asked_at_once() -> None:
    run = Run([Peer("a", rests_until=3.0), Peer("b")], PROMPT)
    run.absent.add("b")

    def comes() -> None:
        run.absent.clear()
        run.do(run.core.on_news(run.now))

    run.at(1.0, comes)
    assert run.run().done
    assert run.kinds == [("b", "first")]


def test_news_that_change_nothing_for_it_leave_a_request_as_it_is() -> None:
    run = Run([Peer("a", rests_until=3.0)], PROMPT)
    for tenth in range(1, 20):
        run.at(tenth / 10, lambda: run.do(run.core.on_news(run.now)))
    assert run.run().done
    assert [attempt.at_s for attempt in run.core.attempts()] == [3.0]


def test_a_stream_waits_for_a_busy_peer_as_long_as_that_asked_for() -> None:
    run = Run([Peer("a", fault="dies", after=10), Peer("b", rests_until=0.0)], PROMPT)
    run.peers[PeerId("b")].busy_until = 40.0
    run.at(0.3, lambda: run.absent.add("a"))
    assert run.run().done
    assert run.kinds[-1] == ("b", "continuation")
    assert run.core.attempts()[-1].at_s == 40.0


def test_one_finds_out_and_its_success_lets_all_go() -> None:
    mesh = Mesh([Holder("a", [Phase("down", 0.01), Phase("sound", math.inf)])])
    mesh.breakers.on_failure(PeerId("a"), None, "peer_gone", 0.0)
    for number in range(20):
        mesh.come(0.02 + number / 1000, WORDS, 60.0)
    mesh.breakers.on_failure(PeerId("a"), None, "peer_gone", 0.0)
    mesh.run()
    assert all(client.done for client in mesh.clients)
    (first_s, _), *others = mesh.asked
    assert all(at_s > first_s for at_s, _ in others)
    assert max(at_s for at_s, _ in others) <= first_s + FIRST_BACKOFF_S


def test_its_failure_leaves_all_waiting_for_longer() -> None:
    mesh = Mesh([Holder("a", [Phase("broken", 2.0), Phase("sound", math.inf)])])
    for number in range(20):
        mesh.come(0.01 + number / 1000, WORDS, 60.0)
    mesh.run()
    broke = [client for client in mesh.clients if client.error]
    assert all(isinstance(client.error, EngineUnavailable) for client in broke)
    assert 1 <= len(broke) <= 3 + 20  # those that asked before it was known, and one for each probe
    assert all(client.done for client in mesh.clients if not client.error)


# --- what they hear otherwise ------------------------------------------------------------------------------------------


def test_who_is_not_waited_for_is_told_with_the_kind_and_the_time() -> None:
    run = Run([Peer(name) for name in "abc"], PROMPT)
    for number, peer in enumerate(run.peers.values()):
        peer.busy_until = 4.0 + number
    run.run()
    assert isinstance(run.error, NobodyNow)
    assert run.error.retry_after_s == 4.0
    assert run.error.message == "all 3 peers that have the model ready are busy; the first has room in about 4 s"


# --- any schedule ------------------------------------------------------------------------------------------------------

states: st.SearchStrategy[State] = st.sampled_from(["sound", "down", "offline", "broken", "busy", "full", "loading"])
phases = st.lists(st.builds(Phase, states, st.floats(0.01, 20.0)), max_size=5)
arrivals = st.lists(st.floats(0.0, 30.0), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    drawn=st.lists(st.tuples(phases, states), min_size=1, max_size=3),
    ours=st.booleans(),
    came=arrivals,
    deadline_s=st.sampled_from([1.0, 20.0, 400.0]),
    seed=st.integers(0, 3),
)
def test_nobody_is_asked_who_rests_one_alone_finds_out_and_every_request_ends_in_time(
    drawn: list[tuple[list[Phase], State]], ours: bool, came: list[float], deadline_s: float, seed: int
) -> None:
    holders = [
        Holder(f"p{number}", [*phases, Phase(last, math.inf)], ours=ours and number == 0)
        for number, (phases, last) in enumerate(drawn)
    ]
    mesh = Mesh(holders, seed)
    for at_s in came:
        mesh.come(at_s, WORDS, deadline_s)
    mesh.run()
    for client in mesh.clients:
        assert client.ended_s is not None
        assert client.ended_s <= client.began_s + deadline_s + 1e-9
        assert client.done != bool(client.error)
        if client.done:
            assert client.text == WORDS
    assert not mesh.asks


@settings(max_examples=150, deadline=None)
@given(
    before=st.lists(st.builds(Phase, st.sampled_from(["sound", "down"]), st.floats(0.01, 3.0)), max_size=3),
    away_s=st.floats(0.01, PATIENCE_S),
    came=arrivals,
    seed=st.integers(0, 3),
)
def test_whoever_waits_when_the_only_holder_comes_back_is_answered(
    before: list[Phase], away_s: float, came: list[float], seed: int
) -> None:
    phases = [*before, Phase("down", away_s), Phase("sound", math.inf)]
    back_s = sum(phase.for_s for phase in phases[:-1])
    mesh = Mesh([Holder("a", phases)], seed)
    for at_s in came:
        mesh.come(at_s, WORDS, 400.0)
    mesh.run()
    for client in mesh.clients:
        assert client.ended_s is not None
        if client.ended_s > back_s + 2 * FIRST_BACKOFF_S:
            assert client.done, client.error
