"""What came of a simulated run of routing, in figures that policies are compared by. Not here: the run (sim_routing)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from meshmax.testing.sim_routing import Outcome


class RoutingFigures(msgspec.Struct, frozen=True):
    """Times in seconds, until the whole answer. ``regret``: mean time over the mean of the oracle's in the same states, less 1;
    ``regret_each``: the mean of the same of each request. ``first_choice``: share of requests that got what the oracle would
    have taken, within 1 %. ``moved``: share of turns after the first that another peer answered than the turn before;
    ``back``: share of turns after the second that went back to the peer of the turn before the last. Both without turns that
    met a failure. ``failures``: peers that died under a request, or were dead when asked. ``bad``: requests sent to a peer that
    lacked the model, or was known to drain or to be gone. ``unanswered``: requests that nobody could answer."""

    requests: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    regret: float
    regret_each: float
    first_choice: float
    moved: float
    back: float
    failures: int
    bad: int
    unanswered: int


def figures_of(outcomes: Sequence[Outcome]) -> RoutingFigures:
    """Of one run; those that nobody could have answered count for nothing but ``unanswered``."""
    answered = [o for o in outcomes if math.isfinite(o.total_s) and o.best_s > 0]
    times = sorted(o.total_s for o in answered) or [math.nan]
    mean_s = sum(times) / len(times)
    best_s = sum(o.best_s for o in answered) / max(len(answered), 1)
    each = [o.total_s / o.best_s for o in answered]
    moved, back = _moves(outcomes)
    return RoutingFigures(
        requests=len(outcomes),
        mean_s=mean_s,
        p50_s=times[len(times) // 2],
        p95_s=times[len(times) * 95 // 100],
        p99_s=times[len(times) * 99 // 100],
        regret=mean_s / best_s - 1 if best_s else math.nan,
        regret_each=sum(each) / len(each) - 1 if each else math.nan,
        first_choice=sum(ratio <= 1.01 for ratio in each) / max(len(each), 1),
        moved=moved,
        back=back,
        failures=sum(o.failures for o in outcomes),
        bad=sum(o.bad for o in outcomes),
        unanswered=len(outcomes) - len(answered),
    )


def _moves(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """``moved`` and ``back``."""
    turns: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        turns.setdefault(outcome.conversation, []).append(outcome)
    moved, back = [], []
    for said in turns.values():
        said.sort(key=lambda outcome: outcome.turn)
        for index in range(1, len(said)):
            if said[index].failures or said[index - 1].failures:
                continue
            moved.append(said[index].peer != said[index - 1].peer)
            if index > 1:
                back.append(moved[-1] and said[index].peer == said[index - 2].peer)
    return sum(moved) / max(len(moved), 1), sum(back) / max(len(back), 1)
