"""The simulation that scripts/bench_discovery runs, small: nodes come and go, and what they announce is found."""

from __future__ import annotations

import math
from typing import Any

from meshmax.testing.dht_network import Plan, simulate


async def test_what_somebody_alive_provides_is_found_in_few_hops_while_nodes_come_and_go(autojump_clock: Any) -> None:
    plan = Plan(nodes=40, hours=0.1, churn=2.0, look_ups=60, grow_s=60.0, settle_s=120.0)
    outcome = await simulate(plan)
    assert outcome.joined
    assert outcome.left
    found = [probe for probe in outcome.probes if probe.found_alive]
    assert len(found) >= 0.99 * len(outcome.probes) > 20
    hops = sorted(probe.figures.first_hop for probe in found)
    assert hops[int(0.95 * len(hops))] <= math.log2(plan.nodes) / 2
