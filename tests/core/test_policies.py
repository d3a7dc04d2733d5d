"""The order in which peers are asked, by policy."""

from collections import Counter
from typing import Any

import pytest

from meshmax.base.ids import PeerId
from meshmax.base.route import POLICIES, Policy
from meshmax.core.routing import decide
from tests.core.contenders import CHAT, CPU, GPU, GPU_DISK, OURS, peer

ALIKE = [peer(name, **GPU) for name in "abcd"]

CASES: list[tuple[str, Policy, list[Any], dict[str, Any], list[str]]] = [
    ("latency takes the soonest", "latency", [peer("a", **CPU), peer("b", **GPU)], {}, ["b", "a"]),
    (
        "least-loaded takes the emptiest, however slow",
        "least-loaded",
        [peer("a", **GPU, running=1), peer("b", **CPU)],
        {},
        ["b", "a"],
    ),
    (
        "least-loaded counts prompts for each slot",
        "least-loaded",
        [peer("a", **GPU, running=2, capacity=8), peer("b", **GPU, running=1, capacity=2)],
        {},
        ["a", "b"],
    ),
    ("of the emptiest the soonest", "least-loaded", [peer("a", **CPU), peer("b", **GPU)], {}, ["b", "a"]),
    ("at a tie ourselves", "least-loaded", [peer("a", **GPU, rtt_s=0.0), peer("z", **GPU, **OURS)], {}, ["z", "a"]),
    ("round-robin goes on with the next", "round-robin", ALIKE, {"turn": 6}, ["c", "d", "a", "b"]),
    ("round-robin asks the slow ones, too", "round-robin", [peer("a", **CPU), peer("b", **GPU)], {"turn": 0}, ["a", "b"]),
    ("a weight of 0 gets nothing", "weighted", ALIKE, {"weights": {"a": 0.0, "b": 0.0, "d": 0.0}}, ["c"]),
    ("all weights of 0 leave nobody", "weighted", ALIKE[:1], {"weights": {"a": 0.0}}, []),
    ("affinity stays with the conversation", "affinity", [*ALIKE, peer("e", **CPU, held=100)], {}, ["e"]),
    (
        "affinity takes who holds most of it",
        "affinity",
        [peer("a", **GPU, held=10), peer("b", **GPU, held=20)],
        {},
        ["b", "a"],
    ),
    (
        "what was held by a model that left memory is gone",
        "affinity",
        [peer("a", **GPU_DISK, held=10), peer("b", **GPU, held=5)],
        {},
        ["b", "a"],
    ),
    ("local-only asks nobody else", "local-only", [*ALIKE, peer("z", **CPU, **OURS)], {}, ["z"]),
    ("local-only without a copy here is nobody", "local-only", ALIKE, {}, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "contenders", "how", "order"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_in_which_order(policy: Policy, contenders: list[Any], how: dict[str, Any], order: list[str]) -> None:
    decision = decide(contenders, CHAT, policy=policy, **how)
    assert list(decision.order[: len(order) or None]) == order
    assert decision.policy == policy


def test_who_a_policy_has_no_use_for_is_told_with_the_reason() -> None:
    candidates = decide([*ALIKE, peer("z", **CPU, **OURS)], CHAT, policy="local-only").candidates
    assert {c.why.split(";")[0] for c in candidates if c.verdict == "excluded"} == {"only this machine was asked for"}
    candidates = decide(ALIKE, CHAT, policy="weighted", weights={"a": 0.0}).candidates
    assert [c.why.split(";")[0] for c in candidates if c.verdict == "excluded"] == ["has a weight of 0"]


def test_shares_come_out_as_they_were_given_over_any_hundred_requests() -> None:
    weights = {"a": 5.0, "b": 3.0, "d": 0.0}
    for begin in (0, 17, 1000):
        chosen = Counter(
            decide(ALIKE, CHAT, policy="weighted", weights=weights, turn=turn).order[0]
            for turn in range(begin, begin + 100)
        )
        for name, share in (("a", 5 / 9), ("b", 3 / 9), ("c", 1 / 9)):
            assert abs(chosen[PeerId(name)] - 100 * share) <= 3
        assert not chosen[PeerId("d")]


def test_round_robin_asks_all_alike() -> None:
    chosen = Counter(decide(ALIKE, CHAT, policy="round-robin", turn=turn).order[0] for turn in range(400))
    assert set(chosen.values()) == {100}


def test_new_conversations_spread_by_affinity_and_move_only_from_a_peer_that_is_gone() -> None:
    keys = [b"conversation %d" % n for n in range(400)]
    before = {key: decide(ALIKE, CHAT, policy="affinity", key=key).order[0] for key in keys}
    assert all(60 <= count <= 140 for count in Counter(before.values()).values())
    after = {key: decide(ALIKE[1:], CHAT, policy="affinity", key=key).order[0] for key in keys}
    assert {before[key] for key in keys if before[key] != after[key]} == {PeerId("a")}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_asks_who_cannot_answer(policy: Policy) -> None:
    unfit = [
        peer("a", **GPU, draining=True),
        peer("b", **{**GPU, "state": "partial"}),
        peer("c", **GPU, peer_state="offline"),
        peer("d", **GPU, running=4, queued=2, limit=2),
    ]
    for turn in range(8):
        decision = decide([*unfit, peer("z", **CPU, **OURS)], CHAT, policy=policy, turn=turn)
        assert decision.order == ("z",)
        assert decide(unfit, CHAT, policy=policy, turn=turn).order == ()
