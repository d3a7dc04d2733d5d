"""The words of a choice: one line of a header, whatever a peer calls itself."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.base.route import Policy
from meshmax.base.status import Gpu
from meshmax.core.contender import Contender, ToldWait
from meshmax.core.explain import MAX_HEADER, explain, header_line, plain_name
from meshmax.core.routing import decide
from tests.core.contenders import (
    CHAT,
    CPU,
    GB,
    GPU,
    GPU_DISK,
    OURS,
    peer,
)


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
                peer("b", state="loaded", decode=10.4, prefill=100.0),
            ],
            "a",
            "not 6% sooner than the last choice)",
        ),
        (
            [
                peer("a", state="loaded", device="gpu", decode=10.0, prefill=100.0),
                peer("b", state="loaded", decode=10.3, prefill=100.0),
            ],
            None,
            "near enough for a GPU to go first)",
        ),
        (
            [
                peer("a", state="loaded", device="gpu", decode=10.0, prefill=100.0),
                peer("b", device="gpu", decode=10.3, prefill=100.0, load_s=0.1),
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
    assert explain(candidates, PeerId("b"), [("a", "peer_gone")]).endswith("; a failed before (peer_gone)")
    assert explain(candidates, PeerId("b"), [("a", "busy")]).endswith("; a was busy")
    assert explain(candidates, PeerId(""), [("a", "draining")]) == "nobody answered; a is being drained"
    assert explain(candidates, PeerId(""), over=False) == "nobody has answered yet"


def test_who_failed_or_was_late_is_not_counted_among_those_that_were_beaten() -> None:
    contenders = [peer("a", **GPU), peer("b", **CPU), peer("c", **{**CPU, "decode": 9.0})]
    decision = decide(contenders, CHAT)
    a, b, c = decision.candidates
    beaten, best = msgspec.structs.replace(a, verdict="slower"), msgspec.structs.replace(b, verdict="chosen")
    line = explain((beaten, best, c), PeerId("b"), among=3, late=[PeerId("a")])
    assert "; beat 1 other (next: c, est " in line
    assert line.endswith("); a was asked before, and had said nothing yet")
    failed = msgspec.structs.replace(a, verdict="failed")
    line = explain((failed, best, c), PeerId("b"), [("a", "peer_gone")], among=2)
    assert "; beat 1 other (next: c, est " in line


@pytest.mark.parametrize("line", ["", "a: loaded, here; beat 2 others (next: b, est 1.00 s)", "x" * MAX_HEADER])
def test_a_line_that_a_header_can_carry_stays_as_it_is(line: str) -> None:
    assert header_line(line, "r1") == line


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("a line; with, words " * 100, "with"),
        ("words " * 200, "words"),
        ("x" * 700, "x"),
        (("x" * 500) + "; " + "y" * 300, "x"),
    ],
)
def test_a_line_too_long_for_a_header_is_cut_at_a_boundary_and_says_where_the_whole_stands(line: str, end: str) -> None:
    shown = header_line(line, "r1")
    kept, sign = shown.split(" ... ")
    assert sign == "(`meshmax why r1` tells the rest)"
    assert line.startswith(kept)
    assert kept.endswith(end)
    assert MAX_HEADER // 2 <= len(shown) <= MAX_HEADER


@given(st.text(max_size=900), st.text("abc", max_size=128))
def test_whatever_a_line_holds_its_header_is_bounded_and_printable(line: str, request_id: str) -> None:
    shown = header_line(line, request_id)
    assert len(shown) <= MAX_HEADER
    assert all(" " <= c <= "~" for c in shown)


@given(st.text(max_size=200))
def test_a_name_can_stand_in_a_header(name: str) -> None:
    shown = plain_name(name)
    assert 0 < len(shown) <= 64
    assert shown.isascii()
    assert shown.isprintable()
    assert "," not in shown


def test_a_model_that_would_be_loaded_anew_for_its_context_is_told_as_such() -> None:
    decision = decide([peer("a", state="loaded", context=512, wants=1024, held=9)], CHAT)
    (candidate,) = decision.candidates
    assert not candidate.loaded
    words = "loaded on CPU with 512 of the 1024 tokens of context that this wants: a new load, 1.0 ms away"
    assert candidate.why.startswith(words)
    assert words in explain(decision.candidates, decision.order[0])


def test_what_a_peer_holds_of_the_prompt_and_what_does_not_fit_is_told() -> None:
    held = decide([peer("a", **GPU, held=1800)], CHAT).candidates[0]
    assert held.why == "loaded on GPU with about 1800 tokens of the prompt read, 1.0 ms away (direct), 0 queued"
    small = decide([peer("a", state="disk", device="gpu", size=9 * GB, gpus=(Gpu("g", 0, 8 * GB),))], CHAT)
    assert small.candidates[0].device == "cpu"
    assert small.candidates[0].why.startswith("on disk, too large for its GPU, ")


@pytest.mark.parametrize("policy", ["round-robin", "weighted"])
def test_who_had_its_turn_is_not_said_to_have_beaten_others(policy: Policy) -> None:
    decision = decide([peer("a", **CPU), peer("b", **GPU)], CHAT, policy=policy, turn=0)
    a, b = decision.candidates
    line = explain(decision.candidates, decision.order[0], policy=decision.policy)
    assert line.endswith(f"; its turn ({policy}) before 1 other (soonest: b, est 4.37 s)")
    late = explain((a, b), PeerId("a"), [("c", "busy")], policy=policy)
    assert "; beat 1 other (next: b, est 4.37 s)" in late


def test_another_policy_is_named_where_it_passed_over_a_sooner_one() -> None:
    decision = decide([peer("a", **CPU), peer("b", **GPU)], CHAT, policy="affinity", key=b"x")
    line = explain(decision.candidates, PeerId("a"), policy="affinity")
    assert line.endswith("beat 1 other (next: b, est 4.37 s: the policy is affinity)")
    alone = decide([peer("a", **CPU, **OURS), peer("b", **GPU)], CHAT, policy="local-only")
    line = explain(alone.candidates, alone.order[0], policy=alone.policy)
    assert line.endswith("; only this machine was asked for")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (None, "2 queued"),
        (ToldWait(1.2, 1.2), "2 queued, told: you would wait 1.2 s"),
        (ToldWait(6.0, 1.2), "2 queued, told: you would wait 1.2 s, taken for 6.0 s by its former words"),
        (ToldWait(1.3, 1.2), "2 queued, told: you would wait 1.2 s"),
        (ToldWait(2.0, 0.0, free=1), "2 queued, told: you would wait 0.0 s, taken for 2.0 s by its former words"),
        (ToldWait(0.0, 0.0, free=2), "2 queued"),
    ],
)
def test_what_a_peer_told_of_its_wait_is_told_and_what_it_is_taken_for(told: ToldWait | None, words: str) -> None:
    contender = msgspec.structs.replace(peer("kitchen", **GPU, running=4, queued=1), told=told)
    (candidate,) = decide([contender], CHAT).candidates
    assert candidate.why == f"loaded on GPU, 1.0 ms away (direct), {words}"
    assert candidate.told_wait_s == (told.told_s if told else None)
