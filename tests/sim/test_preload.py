"""Real nodes that load what the mesh asks for before anybody asks them."""

import itertools
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.config import EngineConfig
from meshmax.base.inference import Ask, GenerateRequest
from meshmax.node import Node
from tests.sim.site import Site, ask, online, open_site, pull, until

Clock = trio.testing.MockClock
SLOW = EngineConfig(kind="echo", echo_tokens_per_s=1.0, parallel=1)


def have_it_loaded(site: Site) -> list[str]:
    return [node.name for node in site.nodes if node.residency.loaded()]


async def three_with_the_model(site: Site, *engines: EngineConfig) -> list[Node]:
    names = ("one", "two", "three")
    nodes = [await site.node(name, engine) for name, engine in zip(names, itertools.cycle(engines), strict=False)]
    await site.add(nodes[0], "tiny")
    await until(lambda: all(len(online(node)) == 2 for node in nodes))
    for node in nodes[1:]:
        await until(lambda node=node: any(e.name == "tiny:latest" for e in node.catalog.entries()))  # type: ignore[misc]
        await pull(node, "tiny")
    return nodes


async def ask_often(node: Node, times: int, pause_s: float = 2.0) -> None:
    for _ in range(times):
        assert (await ask(node, "tiny", "a b"))[0] == "a b"
        await trio.sleep(pause_s)


async def test_where_the_only_loaded_copy_is_lost_one_other_peer_loads_it(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site:
        nodes = await three_with_the_model(site, EngineConfig(kind="echo", keep_alive_s=60.0))
        desk = await site.node("desk", EngineConfig(kind="none"))
        await until(lambda: len(online(desk)) == 3 and any(e.holders for e in desk.catalog.entries()))
        await ask_often(desk, 12)
        (serving,) = have_it_loaded(site)
        holder = next(node for node in nodes if node.name == serving)
        holder.draining.here.drain(0.0)
        took_s = await until(lambda: len(have_it_loaded(site)) == 2)
        assert took_s < 30
        await trio.sleep(20)
        assert len(have_it_loaded(site)) == 2  # the drained peer's own among them
        (other,) = set(have_it_loaded(site)) - {serving}
        assert (await ask(desk, "tiny", "a b"))[1] == other
        await trio.sleep(62)
        assert have_it_loaded(site) == []  # by its keep-alive, with nobody asking any more


async def test_a_queue_that_stays_brings_one_copy_more_at_a_time(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        nodes = await three_with_the_model(site, SLOW)
        digest = nodes[0].catalog.resolve("tiny").digest
        await ask(nodes[0], "tiny", "a")

        async def keep(node: Node) -> None:
            request = Ask("here", digest, "tiny", GenerateRequest(prompt="w " * 300))
            node.preloads.on_ask(request)
            async with node.residency.open_answer(request) as events:
                async for _event in events:
                    pass

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(keep, nodes[0])
            await until(lambda: len(have_it_loaded(site)) == 2)
            await trio.sleep(100)
            assert len(have_it_loaded(site)) == 2
            nursery.cancel_scope.cancel()


async def test_whoever_has_room_loads_it_and_nothing_goes_for_it(tmp_path: Path, autojump_clock: Clock) -> None:
    small = EngineConfig(kind="echo", memory="6MB", keep_alive_s=-1.0)
    async with open_site(tmp_path) as site:
        nodes = await three_with_the_model(site, small, small, EngineConfig(kind="echo"))
        desk = await site.node("desk", EngineConfig(kind="none"))
        for node in nodes[:2]:
            await site.add(node, f"other-{node.name}", 5 << 20)
            await ask(node, f"other-{node.name}", "a")  # which leaves too little for another one
        await until(lambda: len(online(desk)) == 3 and any(e.name == "tiny:latest" for e in desk.catalog.entries()))
        digest = desk.catalog.resolve("tiny").digest
        for _ in range(20):
            desk.preloads.on_ask(Ask("r", digest, "tiny", GenerateRequest(prompt="a")))
        await until(lambda: "three" in have_it_loaded(site))
        await trio.sleep(30)
        assert [view.digest == digest for node in nodes for view in node.residency.loaded()] == [False, False, True]


@pytest.mark.parametrize(
    "told", [EngineConfig(kind="echo", preload=False), EngineConfig(kind="echo", keep_alive_s=0.0)]
)
async def test_who_is_told_not_to_preload_does_not(told: EngineConfig, tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        node = await site.node("one", told)
        await site.add(node, "tiny")
        await ask_often(node, 12)
        await node.residency.unload(node.catalog.resolve("tiny").digest)
        await trio.sleep(60)
        assert have_it_loaded(site) == []


async def test_what_a_person_unloaded_is_not_preloaded_there(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        node = await site.node("one")
        await site.add(node, "tiny")
        await ask_often(node, 12)
        await node.residency.unload(node.catalog.resolve("tiny").digest)
        await trio.sleep(120)
        assert have_it_loaded(site) == []
