"""The choice as a whole, in a simulated mesh of twenty unlike peers that drift, fail and come back."""

import math
from functools import cache

import pytest

from meshmax.base.route import POLICIES, Policy
from meshmax.testing.routing_figures import RoutingFigures, figures_of
from meshmax.testing.sim_mesh import Size
from meshmax.testing.sim_routing import Chooser, Outcome, Simulation

SMALL = Size(peers=20, entries=3, models=6, requests=2000, load=1.2, seed=3, mean_up_s=1200.0, mean_down_s=120.0)
OTHERS = tuple(policy for policy in POLICIES if policy not in ("latency", "local-only"))


@cache
def run(chooser: Chooser) -> tuple[tuple[Outcome, ...], RoutingFigures]:
    outcomes = Simulation(SMALL, chooser).run()
    return tuple(outcomes), figures_of(outcomes)


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_asked_who_lacks_the_model_or_is_known_to_be_gone(policy: Policy) -> None:
    outcomes, figures = run(policy)
    mesh = Simulation(SMALL, policy).mesh
    models = {conversation.number: conversation.model for conversation in mesh.conversations}
    assert figures.bad == 0
    assert all(o.peer < 0 or o.peer in mesh.holders[models[o.conversation]] for o in outcomes)
    assert len(outcomes) >= SMALL.requests * (0.4 if policy == "local-only" else 1)


def test_latency_is_quicker_than_every_other_policy() -> None:
    _, latency = run("latency")
    for policy in OTHERS:
        assert latency.mean_s < run(policy)[1].mean_s
    assert latency.unanswered == 0


def test_latency_comes_near_an_oracle_that_knows_the_future() -> None:
    assert run("latency")[1].regret < 0.15
    assert run("oracle")[1].regret == pytest.approx(0, abs=0.02)


def test_conversations_stay_where_they_are_held_and_do_not_go_back_and_forth() -> None:
    _, latency = run("latency")
    assert latency.moved < 0.35
    assert latency.back < 0.15
    assert latency.moved < run("round-robin")[1].moved / 2


def test_failures_are_met_and_answers_come_all_the_same() -> None:
    outcomes, figures = run("latency")
    assert figures.failures > 0
    assert all(math.isfinite(outcome.total_s) for outcome in outcomes)


def test_the_same_seed_is_the_same_run() -> None:
    assert tuple(Simulation(SMALL, "latency").run()) == run("latency")[0]
