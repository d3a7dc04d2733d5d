"""How a node finds others: the watch over our own network, and the ladder of rungs. Not here: who is there (presence)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from meshmax.node.running import Node
from meshmax.services.ladder import Ladder
from meshmax.services.network_watch import NetworkWatch


@asynccontextmanager
async def open_discovery(node: Node) -> AsyncIterator[None]:
    """Make ``node.network`` and ``node.ladder``; the ladder is climbed by presence."""
    world = node.world
    node.network = NetworkWatch(world.addresses, world.unix_now)
    rungs = world.rungs(node.config, node.swarm)
    off = {} if node.config.lan else {"mdns": "it is turned off (--no-lan, or lan: false)"}
    node.ladder = Ladder(rungs, world.random, node.network, off)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.network.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
