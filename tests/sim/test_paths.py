"""Nodes that cannot reach each other directly: over a relay first, then directly as soon as that works, in virtual time."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import trio
import trio.testing

from meshmax.base.config import Config, EngineConfig, ServeConfig
from meshmax.base.ids import PeerId
from meshmax.net.swarm import LibrarySwarm
from meshmax.node import Node, World
from meshmax.node.serving import open_serving
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import SeededSigner
from tests.sim.site import STARTED_AT_S, Site, ask, online, until

Clock = trio.testing.MockClock
DAY_S = 86400.0
HELPERS = ServeConfig(rendezvous=True, relay=True)


class Apart(Site):
    """Nodes that find each other at bootstrap nodes only, which relay; no LAN has two of them."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        super().__init__(folder, stack)
        self.helpers: list[LibrarySwarm] = []

    async def helper(self) -> LibrarySwarm:
        """A bootstrap node."""
        swarm = await self._stack.enter_async_context(
            self.network.open_swarm(SeededSigner(900 + len(self.helpers)).private_bytes, NoMesh(), 64)
        )
        opened = open_serving(
            Config(), HELPERS, swarm, None, None, trio.current_time, lambda: STARTED_AT_S + trio.current_time()
        )
        await self._stack.enter_async_context(opened)
        self.helpers.append(swarm)
        return swarm

    def parts(self, name: str, engine: EngineConfig = EngineConfig(kind="echo")) -> tuple[Config, World]:  # noqa: B008
        config, world = super().parts(name, engine)
        places = tuple(swarm.addresses[0] for swarm in self.helpers)
        config = msgspec.structs.replace(config, bootstrap=places, dht=False)
        return config, dataclasses.replace(world, rungs=lambda _config, _swarm: ())

    async def apart(self, *names: str) -> list[Node]:
        """Nodes of one mesh, none of which reaches another; each but the first joins by a ticket of the first."""
        first = await self.node(names[0])
        await first.membership.create("home")
        nodes = [first]
        for name in names[1:]:
            node = await self.node(name)
            for other in nodes:
                self.network.partition(node.peer_id, other.peer_id)
            await until(lambda: bool(first.traversal.relays and first.traversal.relays.relays))
            view = await node.membership.join(await first.membership.ticket(("infer", "pull"), DAY_S, 1))
            assert view.mesh == first.membership.mesh, view.problem
            nodes.append(node)
        return nodes


@asynccontextmanager
async def open_apart(folder: Path) -> AsyncIterator[Apart]:
    async with AsyncExitStack() as stack:
        yield Apart(folder, stack)


def path(node: Node, peer: PeerId) -> str:
    view = node.swarm.connections().get(peer)
    return view.path if view else ""


async def test_peers_that_cannot_reach_each_other_meet_over_a_relay_and_move_to_a_direct_path(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_apart(tmp_path) as site:
        await site.helper()
        a, b = await site.apart("a", "b")
        await until(lambda: online(a) == {"b"} and online(b) == {"a"}, 20)
        assert path(a, b.peer_id) == path(b, a.peer_id) == "relay"
        assert any("/p2p-circuit/" in address for address in a.told_addresses())
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        assert await ask(b, "m", "hello") == ("hello", "a")
        site.network.heal(a.peer_id, b.peer_id)
        await until(lambda: path(a, b.peer_id) == path(b, a.peer_id) == "direct", 120)
        assert await ask(b, "m", "again") == ("again", "a")
        told = [node.traversal.connector.path_of(other.peer_id) for node, other in ((a, b), (b, a))]
        assert all(
            each and each.via.startswith(("relay ", "it came to us: relay ")) and "direct after" in each.via
            for each in told
        )


async def test_a_direct_path_that_is_lost_is_replaced_by_a_relay_and_found_again(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_apart(tmp_path) as site:
        await site.helper()
        a, b = await site.apart("a", "b")
        site.network.heal(a.peer_id, b.peer_id)
        await until(lambda: path(a, b.peer_id) == path(b, a.peer_id) == "direct", 120)
        site.network.partition(a.peer_id, b.peer_id)
        await until(
            lambda: path(a, b.peer_id) == path(b, a.peer_id) == "relay", 20
        )  # as soon as the silence is noticed
        site.network.heal(a.peer_id, b.peer_id)
        await until(lambda: path(a, b.peer_id) == path(b, a.peer_id) == "direct", 120)


async def test_when_a_relay_dies_another_one_carries_on(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_apart(tmp_path) as site:
        first, second = await site.helper(), await site.helper()
        a, b = await site.apart("a", "b")
        await until(lambda: path(a, b.peer_id) == path(b, a.peer_id) == "relay", 20)
        used = a.swarm.connections()[b.peer_id].address
        dying, other = (first, second) if first.peer_id in used else (second, first)
        site.network.kill(dying.peer_id)

        def carried_on() -> bool:
            views = [a.swarm.connections().get(b.peer_id), b.swarm.connections().get(a.peer_id)]
            return all(view and other.peer_id in view.address for view in views)

        await until(carried_on, 20)
        await until(lambda: online(a) == {"b"} and online(b) == {"a"}, 30)
