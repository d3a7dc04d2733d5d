"""Who is asked: a table of cases, and what holds for all of them."""

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.base.status import Gpu
from meshmax.core.breaker import CLOSED
from meshmax.core.routing import CANDIDATES_TOLD, Contender, Decision, Work, decide, explain
from tests.core.contenders import (
    BUSY,
    CHAT,
    CPU,
    FAILED,
    FAST,
    GB,
    GPU,
    GPU_DISK,
    HALF_OPEN,
    OURS,
    peer,
    seconds,
)

CASES: list[tuple[str, list[Contender], list[str], PeerId | None]] = [
    ("nobody has it: nobody is asked", [], [], None),
    ("the only one that has it is asked", [peer("a")], ["a"], None),
    ("a loaded GPU goes before a loaded CPU", [peer("a", **CPU), peer("b", **GPU)], ["b", "a"], None),
    ("a loaded GPU goes before a GPU that must load", [peer("a", **GPU_DISK), peer("b", **GPU)], ["b", "a"], None),
    ("a GPU that must load goes before a slow CPU", [peer("a", **CPU), peer("b", **GPU_DISK)], ["b", "a"], None),
    (
        "a GPU is preferred to a CPU that is a little faster",
        [peer("a", **{**CPU, "decode": 62.0, "prefill": 2000.0}), peer("b", **GPU)],
        ["b", "a"],
        None,
    ),
    (
        "a GPU beyond the margin is not preferred: the estimate decides",
        [peer("a", **{**CPU, "decode": 120.0, "prefill": 4000.0}), peer("b", **GPU)],
        ["a", "b"],
        None,
    ),
    (
        "a loaded CPU goes before a GPU whose load takes minutes",
        [peer("a", **{**CPU, "decode": 30.0}), peer("b", **{**GPU_DISK, "load_s": 120.0})],
        ["a", "b"],
        None,
    ),
    (
        "a loaded CPU is preferred to a CPU that must load and is a little faster",
        [peer("a", **{**CPU, "state": "disk", "decode": 11.0, "load_s": 1.8}), peer("b", **CPU, rtt_s=0.3)],
        ["b", "a"],
        None,
    ),
    (
        "a loaded CPU that was measured goes before one of which nothing is known and that must load",
        [peer("a", size=98_000_000), peer("b", **{**CPU, "decode": 40.0}, size=98_000_000)],
        ["b", "a"],
        None,
    ),
    (
        "a loaded CPU that tells its rate goes before one of which nothing is known and that must load",
        [peer("a", size=98_000_000), peer("b", state="loaded", says_decode=40.0, size=98_000_000, **OURS)],
        ["b", "a"],
        None,
    ),
    (
        "of two loaded CPUs that of which nothing is known is tried",
        [peer("a", state="loaded"), peer("b", **{**CPU, "decode": 3.0, "prefill": 12.0})],
        ["a", "b"],
        PeerId("b"),
    ),
    (
        "a free GPU goes before one with a queue",
        [peer("a", **GPU, running=4, queued=3), peer("b", **GPU)],
        ["b", "a"],
        None,
    ),
    (
        "a loaded GPU with a long queue yields to a free one that must load",
        [peer("a", **GPU, running=4, queued=20), peer("b", **GPU_DISK)],
        ["b", "a"],
        None,
    ),
    ("of two alike the nearer goes first", [peer("a", **GPU, rtt_s=0.08), peer("b", **GPU, rtt_s=0.002)], ["b", "a"], None),
    (
        "a far fast one goes before a near slow one",
        [peer("a", **{**GPU, "decode": 15.0}), peer("b", **GPU, rtt_s=0.2)],
        ["b", "a"],
        None,
    ),
    ("at a tie we answer ourselves", [peer("a", **GPU, rtt_s=0.0), peer("z", **GPU, **OURS)], ["z", "a"], None),
    ("our own CPU yields to a neighbour's GPU", [peer("a", **CPU, **OURS), peer("b", **GPU)], ["b", "a"], None),
    (
        "the previous choice is kept while it is about as good",
        [peer("a", **GPU, rtt_s=0.001), peer("b", **{**GPU, "decode": 58.0})],
        ["b", "a"],
        PeerId("b"),
    ),
    (
        "the previous choice is left when another is clearly better",
        [peer("a", **GPU), peer("b", **{**GPU, "decode": 20.0})],
        ["a", "b"],
        PeerId("b"),
    ),
    ("a previous choice that is gone counts for nothing", [peer("a", **GPU)], ["a"], PeerId("x")),
    ("a draining peer is never asked", [peer("a", **GPU, peer_state="draining"), peer("b", **CPU)], ["b"], None),
    ("a peer that says it drains is never asked", [peer("a", **GPU, draining=True)], [], None),
    ("an offline peer is never asked", [peer("a", **GPU, peer_state="offline")], [], None),
    ("a peer without a status is never asked", [peer("a", **GPU, silent=True)], [], None),
    ("a peer with a part of the model is never asked", [peer("a", **{**GPU, "state": "partial"})], [], None),
    ("a peer that failed lately is asked last", [peer("a", **GPU, standing=FAILED), peer("b", **CPU)], ["b", "a"], None),
    (
        "of those that failed the one whose time is up first goes first",
        [peer("a", **GPU, standing=FAILED), peer("b", **CPU, standing=BUSY)],
        ["b", "a"],
        None,
    ),
    ("a draining peer that failed is never asked", [peer("a", standing=FAILED, draining=True)], [], None),
    (
        "what a peer says of itself seeds the estimate",
        [peer("a", state="loaded", says_decode=2.0, says_prefill=10.0), peer("b", state="loaded", says_decode=9.0)],
        ["b", "a"],
        None,
    ),
    (
        "what we measured counts, whatever the peer says",
        [peer("a", **{**CPU, "decode": 1.0}, says_decode=1e9), peer("b", **CPU)],
        ["b", "a"],
        None,
    ),
    (
        "a boast is believed within bounds only",
        [peer("a", state="loaded", says_decode=1e12, says_prefill=1e12), peer("b", **FAST)],
        ["b", "a"],
        None,
    ),
    (
        "a figure that is no number is not believed",
        [peer("a", state="loaded", says_decode=math.nan, says_load_s=-1.0), peer("b", **{**CPU, "decode": 11.0})],
        ["b", "a"],
        None,
    ),
    (
        "a peer that was slow to begin is asked after one that was quick",
        [peer("a", **GPU, first_token_s=9.0), peer("b", **GPU, first_token_s=0.1)],
        ["b", "a"],
        None,
    ),
    (
        "one slot and one answer running means waiting for it",
        [peer("a", **GPU, running=1, capacity=1), peer("b", **GPU, running=1, capacity=4)],
        ["b", "a"],
        None,
    ),
    ("of two alike the one with less to do goes first", [peer("a", **CPU, running=2), peer("b", **CPU)], ["b", "a"], None),
    ("a round trip never measured counts as a far one", [peer("a", **GPU, rtt_s=None), peer("b", **GPU)], ["b", "a"], None),
    ("a capacity of nothing is one", [peer("a", **GPU, capacity=0)], ["a"], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("contenders", "order", "previous"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_who_is_asked(contenders: list[Contender], order: list[str], previous: PeerId | None) -> None:
    decision = decide(contenders, CHAT, previous)
    assert [*decision.order, *decision.resting] == order
    chosen = [c.peer_id for c in decision.candidates if c.verdict == "chosen"]
    assert chosen == list(decision.order[:1])
    assert {c.peer_id for c in decision.candidates} == {c.view.peer_id for c in contenders}


def test_a_request_without_an_answer_goes_where_the_model_is_loaded() -> None:
    decision = decide([peer("a", **GPU_DISK), peer("b", **CPU)], Work())
    assert decision.order == ("b", "a")


def test_two_like_peers_do_not_take_turns() -> None:
    noise = random.Random(1)
    previous, switches = None, 0
    for _ in range(200):
        pair = [peer(name, **{**GPU, "decode": 60 * noise.uniform(0.97, 1.03)}) for name in "ab"]
        chosen = decide(pair, CHAT, previous).order[0]
        switches += previous is not None and chosen != previous
        previous = chosen
    assert switches == 0


@pytest.mark.parametrize(("age_s", "chosen"), [(0.0, "b"), (600.0, "b"), (7200.0, "a")])
def test_a_peer_that_was_slow_gets_another_chance_later(age_s: float, chosen: str) -> None:
    slow = peer("a", **{**GPU, "decode": 2.0}, says_decode=60.0, says_prefill=2000.0, age_s=age_s)
    assert decide([slow, peer("b", **{**GPU, "decode": 30.0})], CHAT).order[0] == chosen


def test_a_conversation_stays_with_who_holds_it_while_that_pays() -> None:
    long = Work(8000, 256)
    assert decide([peer("a", **GPU), peer("b", **GPU, held=7500)], long).order[0] == "b"
    assert decide([peer("a", **GPU), peer("b", **GPU, held=7500, running=4, queued=9)], long).order[0] == "a"
    assert decide([peer("a", **GPU), peer("b", **CPU, held=7500)], long).order[0] == "a"


def test_a_peer_whose_model_need_not_be_loaded_anew_for_its_context_goes_first() -> None:
    how = {"state": "loaded", "decode": 30.0, "load_s": 20.0, "wants": 8192}
    short, long = peer("short", **how, context=4096), peer("long", **how, context=8192, rtt_s=0.5)
    assert list(decide([short, long], CHAT).order) == ["long", "short"]
    how["wants"] = 4096
    short, long = peer("short", **how, context=4096), peer("long", **how, context=8192, rtt_s=0.5)
    assert list(decide([short, long], CHAT).order) == ["short", "long"]


def test_a_model_too_large_for_a_gpu_does_not_count_as_on_one() -> None:
    small = peer("a", state="disk", device="gpu", size=20 * GB, gpus=(Gpu("g", 0, 8 * GB),))
    large = peer("b", state="disk", device="gpu", size=20 * GB, gpus=(Gpu("g", 0, 24 * GB),), rtt_s=0.3)
    assert decide([small, large], CHAT).order == ("b", "a")


# --- what holds for all ------------------------------------------------------------------------------------------------

positive = st.floats(0.01, 1e4)
maybe = st.none() | positive
one = st.builds(
    lambda name, how: peer(name, **how),
    st.sampled_from([f"p{n}" for n in range(12)]),
    st.fixed_dictionaries(
        {
            "state": st.sampled_from(["disk", "loaded", "partial"]),
            "device": st.sampled_from(["cpu", "gpu"]),
            "peer_state": st.sampled_from(["online", "online", "online", "draining", "offline", "self"]),
            "size": st.integers(0, 100 * GB),
            "decode": maybe,
            "prefill": maybe,
            "load_s": maybe,
            "first_token_s": maybe,
            "rtt_s": st.none() | st.floats(0.0001, 2),
            "says_decode": st.floats(),
            "says_prefill": st.floats(),
            "says_load_s": st.floats(),
            "running": st.integers(0, 10),
            "queued": st.integers(0, 100),
            "capacity": st.integers(0, 16),
            "standing": st.sampled_from([CLOSED, CLOSED, HALF_OPEN, FAILED, BUSY]),
        }
    ),
)
many = st.lists(one, max_size=8, unique_by=lambda c: c.view.peer_id)
works = st.builds(Work, st.integers(0, 100_000), st.integers(0, 256))


def decided(contenders: list[Contender], work: Work, previous: str | None) -> Decision:
    return decide(contenders, work, PeerId(previous) if previous else None)


@given(many, works, st.none() | st.sampled_from(["p0", "p1"]), st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(
    contenders: list[Contender], work: Work, previous: str | None, mix: random.Random
) -> None:
    first = decided(contenders, work, previous)
    mix.shuffle(contenders)
    assert decided(contenders, work, previous) == first


@given(many, works, st.none() | st.sampled_from(["p0", "p1"]))
def test_nobody_is_asked_who_cannot_answer(contenders: list[Contender], work: Work, previous: str | None) -> None:
    decision = decided(contenders, work, previous)
    able = {c.view.peer_id for c in contenders if c.model.state != "partial" and c.view.state in ("online", "self")}
    assert {*decision.order, *decision.resting} == able
    assert all(math.isfinite(c.estimate_s) and c.estimate_s >= 0 for c in decision.candidates)
    for candidate in decision.candidates:
        line = explain(decision.candidates, candidate.peer_id)
        assert line.isascii()
        assert line.isprintable()


@given(many.filter(bool), works, st.data())
def test_a_peer_never_gains_by_being_farther_or_busier(
    contenders: list[Contender], work: Work, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(contenders) - 1))
    victim = contenders[index]
    load = msgspec.structs.replace(victim.load, queued=victim.load.queued + data.draw(st.integers(0, 20)))
    rtt_s = None if victim.rtt_s is None else victim.rtt_s + data.draw(st.floats(0, 5))
    worse = msgspec.structs.replace(victim, load=load, rtt_s=rtt_s)
    peer_id = victim.view.peer_id
    before = decide(contenders, work).order
    after = decide([*contenders[:index], worse, *contenders[index + 1 :]], work).order
    if peer_id in before:
        assert after.index(peer_id) >= before.index(peer_id)
        assert seconds(worse, work) >= seconds(victim, work)


def test_only_the_first_candidates_are_told_of() -> None:
    decision = decide([peer(f"p{n:03}", **GPU) for n in range(200)], CHAT)
    assert len(decision.order) == 200
    assert len(decision.candidates) == CANDIDATES_TOLD
    assert decision.candidates[0].verdict == "chosen"
    line = explain(decision.candidates, decision.order[0], among=len(decision.order))
    assert "beat 199 others" in line


def test_who_rests_is_told_with_when_that_ends() -> None:
    decision = decide([peer("a", standing=FAILED), peer("b", standing=BUSY), peer("c", draining=True)], CHAT)
    assert decision.order == ()
    assert decision.resting == ("b", "a")
    assert decision.rested_s == 5.0
    assert {c.peer_id: c.verdict for c in decision.candidates} == {"a": "broken", "b": "busy", "c": "draining"}
