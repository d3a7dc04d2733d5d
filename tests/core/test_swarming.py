"""Whole swarms in simulated time: how soon everybody has a blob, how much the seed sends, what is wasted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.core import fetch
from meshmax.core.fetch_source import BAN_STRIKES
from tests.core.swarm_sim import SwarmSim, Temper, seed_and_fetchers

COUNT = 100
FULL = (1 << COUNT) - 1
SEED_S = 0.1  # the seed's uplink: seconds a chunk, 10 MB/s
IDEAL_S = COUNT * SEED_S


def swarm(**changes: object) -> list[Temper]:
    """A seed and eight fetchers on a LAN; the last fetcher as ``changes`` say."""
    tempers = seed_and_fetchers(COUNT, 8, SEED_S, 0.01)
    for name, value in changes.items():
        setattr(tempers[-1], name, value)
    return tempers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("peer_s", [0.01, 0.05, 0.1])
def test_eight_fetchers_need_little_longer_than_one_copy_and_the_seed_sends_little_more(
    seed: int, shared: bool, peer_s: float
) -> None:
    sim = SwarmSim(COUNT, seed_and_fetchers(COUNT, 8, SEED_S, peer_s), seed, shared).run()
    assert sim.took_s < (1.15 if peer_s < SEED_S else 1.25) * IDEAL_S
    assert sim.copies() < 1.1
    assert sim.wasted_share < 0.02
    ends = [node.done_s for node in sim.nodes[1:]]
    assert min(end for end in ends if end) > 0.85 * sim.took_s  # nobody is served before the others


def test_without_promises_a_seed_sends_much_more() -> None:
    assert SwarmSim(COUNT, swarm(), 1, steer=False).run().copies() > 1.3


def test_a_lone_fetcher_is_never_refused() -> None:
    sim = SwarmSim(COUNT, seed_and_fetchers(COUNT, 1, SEED_S, SEED_S), 1).run()
    assert sim.nodes[0].refusals == 0
    assert sim.took_s < 1.05 * IDEAL_S


def test_fetchers_that_cannot_reach_each_other_all_get_it_from_the_seed() -> None:
    tempers = seed_and_fetchers(COUNT, 2, SEED_S, 0.01)
    tempers[1].hidden_from, tempers[2].hidden_from = frozenset([2]), frozenset([1])
    assert SwarmSim(COUNT, tempers, 1).run().took_s < 1.1 * 2 * IDEAL_S


@pytest.mark.parametrize("seed", range(3))
def test_when_half_of_the_fetchers_die_the_others_lose_little(seed: int) -> None:
    tempers = swarm()
    for temper in tempers[5:]:
        temper.dies_s = IDEAL_S / 2
    sim = SwarmSim(COUNT, tempers, seed).run()
    assert sim.took_s < 1.25 * IDEAL_S
    assert sim.copies() < 1.2


@pytest.mark.parametrize("seed", range(3))
def test_fetchers_that_come_one_after_the_other_are_served_by_those_before(seed: int) -> None:
    tempers = swarm()
    for number, temper in enumerate(tempers[1:]):
        temper.joins_s = number * IDEAL_S / 4
    sim = SwarmSim(COUNT, tempers, seed).run()
    assert sim.took_s < 7 * IDEAL_S / 4 + 0.2 * IDEAL_S  # the last one needs a fifth of what the first one needed
    assert sim.copies() < 1.1


@pytest.mark.parametrize(
    "changes", [{"stalls_s": 2.0}, {"uplink_s": 5.0}, {"gives": False}, {"lies": 0.5}, {"lies": 1.0}]
)
def test_one_bad_fetcher_among_eight_costs_its_share_and_a_few_seconds(changes: dict[str, object]) -> None:
    sim = SwarmSim(COUNT, swarm(**changes), 1).run()
    assert sim.copies() < 1.3
    assert sim.took_s < 1.3 * IDEAL_S + 5.0
    bad = sum(node.bad_to.get(number, 0) for node in sim.nodes for number in range(9))
    assert bad <= BAN_STRIKES * 8  # at most one chunk a strike
    assert sim.wasted_share * COUNT * 8 <= bad + 8 * fetch.MIN_DOUBLES


def test_peers_that_have_an_eighth_each_complete_each_other_at_the_speed_of_all_their_uplinks() -> None:
    tempers = [Temper(0.1, has=sum(1 << i for i in range(COUNT) if i % 8 == number)) for number in range(8)]
    sim = SwarmSim(COUNT, tempers, 1).run()
    assert sim.took_s < 1.25 * COUNT * 7 / 8 * 0.1
    assert sim.wasted_share < 0.02


@pytest.mark.parametrize("slow_s", [0.2, 1.0, 5.0, 30.0])
def test_slow_sources_do_not_hold_the_last_chunks(slow_s: float) -> None:
    tempers = [*(Temper(0.02, has=FULL) for _ in range(2)), *(Temper(slow_s, has=FULL) for _ in range(3)), Temper(1.0)]
    sim = SwarmSim(COUNT, tempers, 1).run()
    assert sim.took_s < 1.3 * COUNT * 0.01 + 0.25
    assert sim.wasted_share <= 0.03  # three chunks of a hundred


@st.composite
def motley(draw: st.DrawFn) -> SwarmSim:
    count = draw(st.integers(4, 60))
    chosen = random.Random(draw(st.integers(0, 1 << 30)))
    tempers = [Temper(chosen.choice([0.01, 0.1, 0.5]), has=(1 << count) - 1)]
    for _ in range(draw(st.integers(1, 7))):
        temper = Temper(chosen.choice([0.01, 0.1, 1.0]), joins_s=chosen.random() * 5)
        temper.has = chosen.getrandbits(count) & chosen.getrandbits(count)
        match chosen.randrange(8) if len(tempers) > 1 else None:
            case 0:
                temper.dies_s = temper.joins_s + chosen.random() * 20
            case 1:
                temper.stalls_s = chosen.random() * 20
            case 2:
                temper.lies = chosen.choice([0.1, 1.0])
            case 3:
                temper.gives = False
        tempers.append(temper)
    return SwarmSim(count, tempers, chosen.randrange(1 << 30), shared=chosen.random() < 0.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(motley())
def test_everybody_who_stays_gets_it_whatever_the_others_do_and_waste_is_bounded(sim: SwarmSim) -> None:
    sim.run()
    assert sim.took_s < 60 + 20 * sim.count * sim.nodes[0].temper.uplink_s
    for node in sim.nodes:
        if node.fetch and node.temper.dies_s is None:
            view = node.fetch.snapshot()
            strikes = sum(source.strikes for source in view.sources.values())
            # Besides the end game, a silent source's chunk may come after all when another has brought it.
            timeouts = sum(other.temper.stalls_s is not None or other.temper.uplink_s >= 1 for other in sim.nodes)
            allowed = max(fetch.MIN_DOUBLES, sim.count // fetch.DOUBLE_SHARE) + strikes + 2 * timeouts
            assert view.bytes_wasted <= allowed * 1024 * 1024
