"""A site of simulated nodes: real nodes, real libp2p, real files, over an in-memory cable in virtual time."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import trio

from meshmax.base.config import Config, EngineConfig
from meshmax.base.events import Transfer
from meshmax.base.inference import Ask, Delta, Finish, GenerateRequest
from meshmax.engine.echo import EchoEngine
from meshmax.engine.none import NoEngine
from meshmax.node import Node, World, open_node
from meshmax.testing.gguf import build_gguf
from meshmax.testing.sim_network import SimNetwork

T = TypeVar("T")
STARTED_AT_S = 1_700_000_000.0


async def in_place(work: Callable[[], T], /) -> T:
    """Threads would be invisible to the simulated clock."""
    await trio.lowlevel.checkpoint()
    return work()


class Site:
    """Nodes on one LAN."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.network = SimNetwork()
        self._folder = folder
        self._stack = stack
        self.nodes: list[Node] = []
        self.ahead_s: dict[str, float] = {}  # by node: how far its clock is set; "": everybody's, as when days go by

    async def node(
        self,
        name: str,
        engine: EngineConfig = EngineConfig(kind="echo"),  # noqa: B008  frozen
        **world: Any,
    ) -> Node:
        """Start a node called ``name``; ``world``: what of its World is another."""
        config, usual = self.parts(name, engine)
        node = await self._stack.enter_async_context(open_node(config, replace(usual, **world)))
        self.nodes.append(node)
        return node

    def parts(self, name: str, engine: EngineConfig = EngineConfig(kind="echo")) -> tuple[Config, World]:  # noqa: B008
        """What a node called ``name`` is opened with; each start is on a host with an address of its own."""
        config = Config(home=str(self._folder / name), name=name, engine=engine)
        world = World(
            open_swarm=lambda _config, private_bytes, membership: self.network.open_swarm(private_bytes, membership),
            rungs=lambda _config, swarm: (self.network.discovery(swarm.peer_id),),
            engine=lambda config, _logs: NoEngine() if config.engine.kind == "none" else EchoEngine(config.engine),
            run_sync=in_place,
            unix_now=lambda: (
                STARTED_AT_S + trio.current_time() + self.ahead_s.get(name, 0.0) + self.ahead_s.get("", 0.0)
            ),
            random=random.Random(name),
            clock=trio.current_time,
        )
        return config, world

    async def add(self, node: Node, name: str, size: int = 4 << 20) -> None:
        """Give ``node`` a model of ``size`` bytes."""
        path = self._folder / f"{name}.gguf"
        path.write_bytes(build_gguf(tensor_bytes=size))
        await node.catalog.add(name, path, False, lambda _done, _total: None)


@asynccontextmanager
async def open_site(folder: Path) -> AsyncIterator[Site]:
    """A site; everything ends with the block, whose own exception comes out as it is, out of all nurseries' groups."""
    try:
        async with AsyncExitStack() as stack:
            yield Site(folder, stack)
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        raise leaf from None  # noqa: ASYNC123  a test says what it expects without the nurseries around it


def online(node: Node) -> set[str]:
    """Names of the peers that a node sees online."""
    return {view.status.name for view in node.presence.peers() if view.state == "online" and view.status}


async def pull(node: Node, name: str) -> Transfer:
    """Pull a model; the last word of the transfer."""
    async with node.pulls.open_pull(name) as progress:
        return [transfer async for transfer in progress][-1]


async def ask(node: Node, name: str, prompt: str) -> tuple[str, str]:
    """(answer, name of the peer that gave it)."""
    digest = node.catalog.resolve(name).digest
    request = Ask("r", digest, name, GenerateRequest(prompt=prompt))
    text = []
    async with node.router.open_answer(request) as answer:
        async for event in answer.events:
            if isinstance(event, Delta):
                text.append(event.text)
            else:
                assert isinstance(event, Finish)
    view = node.presence.view(answer.route.peer_id)
    assert view is not None
    assert view.status is not None
    return "".join(text), view.status.name


async def until(condition: Callable[[], bool], deadline_s: float = 60.0) -> float:
    """Virtual seconds until ``condition`` holds; TooSlowError after ``deadline_s``."""
    began = trio.current_time()
    with trio.fail_after(deadline_s):
        while not condition():  # noqa: ASYNC110  it looks from outside, as a person would
            await trio.sleep(0.05)
    return trio.current_time() - began
