"""Peers that lost every rung but their memory, in virtual time: real nodes that are started again."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

from meshmax.node import Node, open_node
from meshmax.services.cached_peers import NEWS_PAUSE_S
from meshmax.store.peers_file import load_peers
from tests.sim.site import Site, online, open_site, until

AWAY_S = 700.0  # longer than a table of peers remembers


class Neighbourhood:
    """Nodes that are started and stopped by name, each time at another address; each lives in a task of its own."""

    def __init__(self, site: Site, nursery: trio.Nursery) -> None:
        self._site, self._nursery = site, nursery
        self._lives: dict[str, tuple[trio.Event, trio.Event]] = {}

    async def start(self, name: str, *, blind: bool = False) -> Node:
        """``blind``: its memory is its only rung."""
        node: Node = await self._nursery.start(self._live, name, blind)
        return node

    async def _live(  # noqa: ASYNC114
        self, name: str, blind: bool, task_status: Any
    ) -> None:
        config, world = self._site.parts(name)
        if blind:
            world = dataclasses.replace(world, rungs=lambda _config, _swarm: ())
        end, ended = self._lives[name] = trio.Event(), trio.Event()
        async with open_node(config, world) as node:
            task_status.started(node)
            await end.wait()
        ended.set()

    async def stop(self, *names: str) -> None:
        for name in names:
            end, ended = self._lives.pop(name)
            end.set()
            await ended.wait()

    async def stop_all(self) -> None:
        await self.stop(*self._lives)


@asynccontextmanager
async def open_neighbourhood(folder: Path) -> AsyncIterator[Neighbourhood]:
    async with open_site(folder) as site, trio.open_nursery() as nursery:
        neighbourhood = Neighbourhood(site, nursery)
        yield neighbourhood
        await neighbourhood.stop_all()


async def test_a_peer_that_is_started_again_without_mdns_finds_its_old_neighbours(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with open_neighbourhood(tmp_path) as all_:
        a, b = await all_.start("a"), await all_.start("b")
        await until(lambda: online(a) == {"b"})
        await all_.stop("a")
        await until(lambda: online(b) == set())
        a = await all_.start("a", blind=True)
        assert await until(lambda: online(a) == {"b"}) < 3
        assert [(r.name, r.found) for r in a.ladder.reports() if r.state != "off"] == [("cached", 1)]


async def test_neighbours_are_written_down_soon_so_that_a_power_cut_loses_none(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with open_neighbourhood(tmp_path) as all_:
        a, b = await all_.start("a"), await all_.start("b")
        await until(lambda: online(a) == {"b"})
        await trio.sleep(2 * NEWS_PAUSE_S)
        (known,) = load_peers(tmp_path / "a")
        assert known.peer_id == b.peer_id
        assert known.addresses[0] == b.addresses[0]


async def test_a_peer_that_was_away_finds_who_moved_meanwhile_through_who_did_not(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with open_neighbourhood(tmp_path) as all_:
        a, b, _ = await all_.start("a"), await all_.start("b"), await all_.start("c")
        await until(lambda: online(a) == {"b", "c"})
        await trio.sleep(2 * NEWS_PAUSE_S)
        await all_.stop("a", "c")
        c = await all_.start("c")
        await trio.sleep(AWAY_S)
        a = await all_.start("a", blind=True)
        await until(lambda: online(a) == {"b", "c"} and online(c) == {"a", "b"} and online(b) == {"a", "c"})


async def test_a_peer_that_knows_only_who_moved_is_found_again_by_who_knows_its_neighbour(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with open_neighbourhood(tmp_path) as all_:
        a, b = await all_.start("a"), await all_.start("b")
        await until(lambda: online(a) == {"b"} and online(b) == {"a"})
        await trio.sleep(2 * NEWS_PAUSE_S)
        await all_.stop("a")
        a = await all_.start("a", blind=True)  # b knows it only where it was
        await until(lambda: online(b) == {"a"})
