"""The ports of a node that its router is asked to forward: control and lanes (TCP), datagrams (UDP); in private meshes only.

Nothing is asked where `port_mapping` is off, or while this peer listens on loopback alone. What is mapped counts once others
came through (services.reachability). Not here: asking (services.port_mapping).
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from meshmax.base.errors import InvalidRequest
from meshmax.base.status import MAX_MAPPED
from meshmax.core.port_mapping import PortWanted
from meshmax.net.addresses import parse_endpoint
from meshmax.ports import Lanes
from meshmax.services.port_mapping import PortMappingService, open_port_mapping

if TYPE_CHECKING:
    from meshmax.node.running import Node


@asynccontextmanager
async def open_node_mapping(node: Node) -> AsyncIterator[PortMappingService | None]:
    """The service of a node; None where nothing is ever asked."""
    mappers = node.world.port_mappers()
    if not node.config.port_mapping or not mappers:
        yield None
        return
    async with open_port_mapping(mappers, lambda: ports_of(node), node.world.random) as service:
        node.network.watch(service.look_again)
        node.traversal.watch(service.check)
        yield service


def ports_of(node: Node) -> tuple[PortWanted, ...]:
    """The ports that peers anywhere should reach now."""
    control = _control_port(node.swarm.addresses)
    if not node.traversal.wanted or not control:
        return ()
    wanted = (
        PortWanted("tcp", control),
        PortWanted("tcp", node.lane_port),
        PortWanted("udp", node.serving.udp_port),
    )
    return tuple(each for each in wanted if each.port)


def tell_lanes(service: PortMappingService, lanes: Lanes) -> None:
    """Lanes know from now on at which port of the router fetchers outside come through."""

    def tell() -> None:
        lanes.external_port = service.external_port(PortWanted("tcp", lanes.port))

    service.watch(tell)
    tell()


def mapped_addresses(node: Node) -> tuple[str, ...]:
    """Multiaddrs, without /p2p, at which our router forwards to the control port."""
    service = node.traversal.mapping
    if service is None or not node.traversal.wanted:
        return ()
    control = _control_port(node.swarm.addresses)
    return tuple(
        f"/ip{6 if ':' in each.external_ip else 4}/{each.external_ip}/tcp/{each.external_port}"
        for each in service.mappings
        if (each.protocol, each.port) == ("tcp", control)
    )[:MAX_MAPPED]


def _control_port(addresses: tuple[str, ...]) -> int:
    """Of the first address of ours that another machine could dial over IPv4; 0 where there is none."""
    for text in addresses:
        try:
            endpoint = parse_endpoint(text)
            ip = ipaddress.ip_address(endpoint.host)
        except (InvalidRequest, ValueError):
            continue
        if ip.version == 4 and not ip.is_loopback:
            return endpoint.port
    return 0
