"""Which peer answers soonest: a table of cases, and what holds for all of them."""

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import ChatRequest, EmbedRequest, GenerateRequest, InferRequest, Message, Options
from meshmax.base.status import NO_ENGINE, Load, ModelPresence, PeerStatus, PeerView
from meshmax.core.breaker import CLOSED, Standing
from meshmax.core.estimate import IMAGE_TOKENS, OUTPUT_TOKENS, estimate, total_s
from meshmax.core.measurements import Figures
from meshmax.core.routing import (
    Contender,
    Decision,
    Outstanding,
    Work,
    decide,
    expected_work,
    explain,
    holders,
    plain_name,
)

MODEL = Sha256("ab" * 32)
GB = 1_000_000_000
CHAT = Work(200, 256)


def peer(name: str, **how: Any) -> Contender:
    """A neighbour with the model on disk beside a CPU, 1 ms away and idle; ``how`` says what is different."""
    model = ModelPresence(
        MODEL,
        (),
        how.get("state", "disk"),
        how.get("size", 4 * GB),
        how.get("device", "cpu"),
        prefill_per_s=how.get("says_prefill", 0.0),
        decode_per_s=how.get("says_decode", 0.0),
        load_s=how.get("says_load_s", 0.0),
    )
    peer_id = PeerId(name)
    status = PeerStatus(peer_id, 1, 0, name, "0", models=(model,), draining=how.get("draining", False))
    view = PeerView(peer_id, how.get("peer_state", "online"), "direct", None if how.get("silent") else status)
    figures = Figures(
        first_token_s=how.get("first_token_s"),
        prefill_per_s=how.get("prefill"),
        decode_per_s=how.get("decode"),
        load_s=how.get("load_s"),
        age_s=how.get("age_s", 0.0),
        turn_s=how.get("turn_s"),
    )
    load = Load(how.get("running", 0), how.get("queued", 0), how.get("capacity", 4))
    return Contender(view, model, load, figures, how.get("rtt_s", 0.001), how.get("standing", CLOSED))


def seconds(contender: Contender, work: Work) -> float:
    return total_s(estimate(contender, work, contender.model.device))


GPU: dict[str, Any] = {"device": "gpu", "state": "loaded", "decode": 60.0, "prefill": 2000.0}
GPU_DISK: dict[str, Any] = {**GPU, "state": "disk", "load_s": 2.0}
CPU: dict[str, Any] = {"device": "cpu", "state": "loaded", "decode": 10.0, "prefill": 80.0}
FAST: dict[str, Any] = {**CPU, "decode": 200.0, "prefill": 2000.0}
OURS: dict[str, Any] = {"peer_state": "self", "rtt_s": None}
FAILED = Standing("open", 10.0, "engine_crashed", 1)
BUSY = Standing("open", 5.0, "busy")
HALF_OPEN = Standing("half-open", 10.0, "engine_crashed", 1)

CASES: list[tuple[str, list[Contender], list[str], PeerId | None]] = [
    ("nobody has it: nobody is asked", [], [], None),
    ("the only one that has it is asked", [peer("a")], ["a"], None),
    ("a loaded GPU goes before a loaded CPU", [peer("a", **CPU), peer("b", **GPU)], ["b", "a"], None),
    ("a loaded GPU goes before a GPU that must load", [peer("a", **GPU_DISK), peer("b", **GPU)], ["b", "a"], None),
    ("a GPU that must load goes before a slow CPU", [peer("a", **CPU), peer("b", **GPU_DISK)], ["b", "a"], None),
    (
        "a GPU is preferred to a CPU that is a little faster",
        [peer("a", **{**CPU, "decode": 70.0, "prefill": 2000.0}), peer("b", **GPU)],
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
        [peer("a", **GPU, rtt_s=0.001), peer("b", **{**GPU, "decode": 55.0})],
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
        pair = [peer(name, **{**GPU, "decode": 60 * noise.uniform(0.93, 1.07)}) for name in "ab"]
        chosen = decide(pair, CHAT, previous).order[0]
        switches += previous is not None and chosen != previous
        previous = chosen
    assert switches == 0


def test_estimates_add_up() -> None:
    contender = peer("a", decode=10.0, prefill=100.0, load_s=3.0, rtt_s=0.5)
    assert seconds(contender, Work(200, 50)) == pytest.approx(0.5 + 3 + 2 + 5)
    waiting = peer("a", state="loaded", decode=10.0, prefill=100.0, rtt_s=0.5, running=1, queued=1, capacity=1)
    assert seconds(waiting, Work(200, 50)) == pytest.approx(0.5 + 2 * 7 + 7)


@pytest.mark.parametrize(
    ("contenders", "line"),
    [
        (
            [peer("kitchen", **GPU, rtt_s=0.0012), peer("attic", **{**GPU, "decode": 20.0}), peer("hall", **CPU)],
            "kitchen: loaded on GPU, 1.2 ms away (direct), 0 queued, est 4.37 s; beat 2 others (next: attic, est 12.90 s)",
        ),
        (
            [peer("kitchen", **GPU_DISK, **OURS)],
            "kitchen: on disk beside a GPU, here, 0 queued, est 6.37 s; nobody else has it ready",
        ),
    ],
)
def test_the_choice_is_explained_in_a_line(contenders: list[Contender], line: str) -> None:
    decision = decide(contenders, CHAT)
    assert explain(decision.candidates, decision.order[0]) == line


@pytest.mark.parametrize(
    ("contenders", "previous", "rule"),
    [
        (
            [
                peer("a", state="loaded", decode=10.0, prefill=100.0),
                peer("b", state="loaded", decode=11.0, prefill=100.0),
            ],
            "a",
            "not 15% sooner than the last choice)",
        ),
        (
            [
                peer("a", state="loaded", device="gpu", decode=10.0, prefill=100.0),
                peer("b", state="loaded", decode=11.0, prefill=100.0),
            ],
            None,
            "near enough for a GPU to go first)",
        ),
        (
            [
                peer("a", state="loaded", device="gpu", decode=10.0, prefill=100.0),
                peer("b", device="gpu", decode=12.0, prefill=100.0, load_s=0.1),
            ],
            None,
            "near enough for a loaded model to go first)",
        ),
    ],
)
def test_a_choice_that_is_not_the_smallest_estimate_names_the_rule(
    contenders: list[Contender], previous: str | None, rule: str
) -> None:
    decision = decide(contenders, CHAT, PeerId(previous) if previous else None)
    assert decision.order[0] == "a"
    assert explain(decision.candidates, decision.order[0]).endswith(rule)


def test_the_line_says_for_how_long_an_answer_its_estimate_is() -> None:
    decision = decide([peer("a", state="loaded", decode=128.0, prefill=200.0, rtt_s=0.0)], CHAT)
    assert "est 3.00 s for 256 tokens; " in explain(decision.candidates, PeerId("a"), tokens=256)


def test_the_line_tells_what_was_tried_before() -> None:
    decision = decide([peer("a", **GPU), peer("b", **CPU)], CHAT)
    candidates = [
        msgspec.structs.replace(c, verdict="failed" if c.peer_id == "a" else "chosen") for c in decision.candidates
    ]
    assert explain(candidates, PeerId("b"), [("a", "busy")]).endswith("; a failed before (busy)")
    assert explain(candidates, PeerId(""), [("a", "busy")]) == "nobody answered; a failed before (busy)"


@given(st.text(max_size=200))
def test_a_name_can_stand_in_a_header(name: str) -> None:
    shown = plain_name(name)
    assert 0 < len(shown) <= 64
    assert shown.isascii()
    assert shown.isprintable()
    assert "," not in shown


@pytest.mark.parametrize(
    ("request_", "work"),
    [
        (GenerateRequest("x" * 400), Work(100, OUTPUT_TOKENS)),
        (GenerateRequest("x" * 400, images=(b"1", b"2")), Work(100 + 2 * IMAGE_TOKENS, OUTPUT_TOKENS)),
        (GenerateRequest("xxxx", options=Options(num_predict=7)), Work(1, 7)),
        (GenerateRequest("xxxx", options=Options(num_predict=-1)), Work(1, OUTPUT_TOKENS)),
        (GenerateRequest(), Work(0, 0)),
        (ChatRequest(), Work(0, 0)),
        (ChatRequest((Message("user", "x" * 80, images=(b"1",)),)), Work(20 + IMAGE_TOKENS, OUTPUT_TOKENS)),
        (EmbedRequest(("x" * 40, "x" * 40)), Work(20, 0)),
    ],
)
def test_how_much_work_a_request_is(request_: InferRequest, work: Work) -> None:
    assert expected_work(request_) == work


def test_answers_are_expected_to_be_as_long_as_those_that_were_seen() -> None:
    assert expected_work(GenerateRequest("xxxx"), 8.2) == Work(1, 9)
    assert expected_work(GenerateRequest("xxxx", options=Options(num_predict=7)), 300.0) == Work(1, 7)
    assert expected_work(GenerateRequest("xxxx", options=Options(num_predict=500)), 300.0) == Work(1, 300)
    assert expected_work(GenerateRequest(), 8.0) == Work(0, 0)


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


# --- what is under way -------------------------------------------------------------------------------------------------

HOME = PeerId("home")


def test_requests_sent_since_the_status_are_added_to_its_load() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    outstanding.on_sent(HOME, 7)
    assert outstanding.count(HOME) == 2
    assert outstanding.load(HOME, 7, Load(1, 0, 2)) == Load(2, 1, 2)
    assert outstanding.load(HOME, 8, Load(2, 0, 2)) == Load(2, 0, 2)


def test_requests_that_ended_since_the_status_are_taken_off() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    outstanding.on_ended(HOME, 7, 8)
    assert outstanding.load(HOME, 8, Load(1, 0, 1)) == Load(0, 0, 1)
    assert outstanding.load(HOME, 9, Load(1, 0, 1)) == Load(1, 0, 1)
    assert outstanding.count(HOME) == 0


def test_a_request_that_the_status_never_saw_leaves_no_trace() -> None:
    outstanding = Outstanding()
    outstanding.on_sent(HOME, 7)
    outstanding.on_ended(HOME, 7, 7)
    assert outstanding.load(HOME, 7, Load(1, 0, 1)) == Load(1, 0, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60))
def test_the_count_is_of_what_is_under_way(steps: list[tuple[bool, int]]) -> None:
    outstanding, sequence = Outstanding(), 0
    open_: list[int] = []
    for send, ahead in steps:
        sequence += ahead
        if send or not open_:
            outstanding.on_sent(HOME, sequence)
            open_.append(sequence)
        else:
            outstanding.on_ended(HOME, open_.pop(0), sequence)
        assert outstanding.count(HOME) == len(open_)
        load = outstanding.load(HOME, sequence, Load(2, 1, 4))
        assert 0 <= load.running <= 4
        assert load.running + load.queued <= 3 + len(open_)


def test_holders_are_those_that_say_something_of_the_model() -> None:
    views = [peer("a").view, peer("b", silent=True).view, peer("c", state="partial").view]
    assert [view.peer_id for view, _ in holders(views, MODEL)] == ["a", "c"]
    assert holders(views, Sha256("cd" * 32)) == []


def test_a_peer_without_an_engine_holds_a_model_for_nobodys_prompt() -> None:
    view = peer("a").view
    assert view.status
    stores_only = msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, engine=NO_ENGINE))
    assert holders([stores_only], MODEL) == []
