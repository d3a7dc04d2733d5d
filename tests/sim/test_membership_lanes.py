"""Blob lanes of real nodes, and who is no member any more: the lanes themselves are looked at."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.ids import PeerId
from meshmax.node import Node, open_node
from meshmax.testing import memory_lanes
from meshmax.testing.memory_lanes import LaneNetwork, MemoryLanes
from tests.sim.site import Site, online, open_site, pull, until

Clock = trio.testing.MockClock
DAY_S = 86400.0


async def node_with_lanes(site: Site, lanes: LaneNetwork, name: str) -> Node:
    config, world = site.parts(name)
    world = dataclasses.replace(
        world, open_lanes=lambda _config, peer_id, _allow: nullcontext(MemoryLanes(lanes, peer_id))
    )
    node = await site._stack.enter_async_context(open_node(config, world))
    site.nodes.append(node)
    return node


def fetchers(lanes: LaneNetwork, server: Node) -> set[PeerId]:
    return {wire.fetcher for wire in lanes.open if wire.server == server.peer_id}


async def test_lanes_end_with_the_membership_and_those_of_others_go_on(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_lanes, "CHUNK_S", 1.0)
    async with open_site(tmp_path) as site:
        lanes = LaneNetwork()
        a, b, c = [await node_with_lanes(site, lanes, name) for name in "abc"]
        await a.membership.create("home")
        for node in (b, c):
            await node.membership.join(await a.membership.ticket(("pull",), DAY_S, 1))
        site.network.partition(b.peer_id, c.peer_id)
        await site.add(a, "m", 64 << 20)
        await until(lambda: online(a) == {"b", "c"} and len(b.catalog.entries()) == len(c.catalog.entries()) == 1)
        async with trio.open_nursery() as nursery:
            for node in (b, c):
                nursery.start_soon(pull, node, "m")
            await until(lambda: fetchers(lanes, a) == {b.peer_id, c.peer_id})
            await trio.sleep(3)
            await a.membership.revoke(b.peer_id)
            took_s = await until(lambda: b.peer_id not in fetchers(lanes, a), 5)
            assert took_s < 2
            carried = len([1 for chunk in lanes.carried if chunk[1] == b.peer_id])
            others = len([1 for chunk in lanes.carried if chunk[1] == c.peer_id])
            for _ in range(100):
                await trio.sleep(0.1)
                assert b.peer_id not in fetchers(lanes, a)
            assert len([1 for chunk in lanes.carried if chunk[1] == b.peer_id]) <= carried
            assert len([1 for chunk in lanes.carried if chunk[1] == c.peer_id]) > others
            assert fetchers(lanes, a) == {c.peer_id}
            nursery.cancel_scope.cancel()
