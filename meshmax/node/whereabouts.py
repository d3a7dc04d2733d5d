"""How a node knows where it stands (services.reachability): whom it asks, what it remembers. Not here: what follows from it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from meshmax.base.config import parse_host_port
from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import PeerId
from meshmax.core.networks import BlockedNetworks
from meshmax.net.addresses import parse_endpoint
from meshmax.node.bootstrapping import bootstrap_places
from meshmax.services.reachability import ReachabilityService, open_reachability, resolve_servers
from meshmax.store.networks_file import load_networks, save_networks

if TYPE_CHECKING:
    from meshmax.node.running import Node


@asynccontextmanager
async def open_whereabouts(node: Node) -> AsyncIterator[ReachabilityService]:
    """The service of a node, looking until the block ends. Raises ConfigError: a STUN server's address is none."""
    world, home = node.world, node.home.path
    stun = [parse_host_port(text) for text in node.config.stun]

    async def keep(networks: BlockedNetworks) -> None:
        await world.run_sync(partial(save_networks, home, networks))

    service = ReachabilityService(
        node.swarm,
        lambda: bootstrap_places(node),
        lambda: node.network.addresses,
        lambda: control_port_of(node.swarm.addresses),
        world.unix_now,
        probes=world.probes,
        stun=partial(resolve_servers, stun) if stun else None,
        mappings=lambda: node.traversal.mapping.mappings if node.traversal.mapping is not None else (),
        mapping_why=lambda: node.traversal.mapping.why if node.traversal.mapping is not None else "",
        relays=lambda: _relays(node),
        blocked=load_networks(home),
        keep=keep,
    )
    node.network.watch(service.look_again)
    async with open_reachability(service):
        yield service


def control_port_of(addresses: Sequence[str]) -> int:
    """The TCP port in the first of our addresses; 0 where there is none, as in simulated networks."""
    for text in addresses[:1]:
        try:
            return parse_endpoint(text).port
        except InvalidRequest:
            break
    return 0


def _relays(node: Node) -> tuple[PeerId, ...]:
    return node.traversal.relays.relays if node.traversal.relays is not None else ()
