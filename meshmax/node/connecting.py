"""How a node reaches members (services.connector) and signals for better paths (services.signalling), joined to the rest of it.

Not here: the other parts of getting through NAT, and their order (node.traversing).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.traversal import PathRecord
from meshmax.core.dial_plan import Own
from meshmax.core.path_memory import PathMemory, fingerprint
from meshmax.net.addresses import is_only_here
from meshmax.node.bootstrapping import bootstrap_places
from meshmax.node.relaying import status_of
from meshmax.services.connector import Connector, Ways, open_connector
from meshmax.services.reachability import ReachabilityService
from meshmax.services.signalling import Signalling
from meshmax.services.spare_port import open_spare_port
from meshmax.store.paths_file import load_paths, save_paths
from meshmax.wire.voucher import verify_voucher

if TYPE_CHECKING:
    from meshmax.node.running import Node

MAX_VOUCHERS: Final = 8  # looked at for one candidate; two observers are enough


@asynccontextmanager
async def open_signalling(node: Node, where: ReachabilityService) -> AsyncIterator[Signalling | None]:
    """Signalling of a node, in private meshes; None where there is nothing to signal for."""
    world = node.world
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(world.open_channels()) if world.open_channels else None
        if channels is None and world.puncher is None:
            yield None
            return
        puncher = world.puncher
        if puncher is not None:
            spare = puncher = await stack.enter_async_context(open_spare_port(puncher, lambda: where.tcp_observers))
            node.network.watch(spare.forget)
            if node.traversal.relays is not None:
                node.traversal.relays.on_circuit = spare.prepare
        signalling = Signalling(
            node.swarm,
            puncher,
            channels,
            where,
            vouched=partial(_vouched, node),
            interfaces=world.interfaces,
            turn=node.config.turn,
            allowed=lambda: node.traversal.wanted,
        )
        node.network.watch(signalling.network_changed)
        yield signalling


@asynccontextmanager
async def open_node_connector(node: Node) -> AsyncIterator[Connector]:
    """The connector of a node."""
    world, home, traversal = node.world, node.home.path, node.traversal

    async def keep(records: tuple[PathRecord, ...]) -> None:
        await world.run_sync(partial(save_paths, home, records))

    def own() -> Own:
        external = traversal.reachability().external_ips
        here = is_only_here(node.swarm.addresses)
        where = Own(node.peer_id, node.network.addresses, _networks(node), external, here=here)
        if (relays := traversal.relays) is None:
            return where
        return msgspec.structs.replace(where, relays=relays.relays, circuits=relays.addresses)

    def told_by(peer_id: PeerId) -> Sequence[str]:
        status = status_of(node, peer_id)
        return status.addresses if status else ()

    def name_of(peer_id: PeerId) -> str:
        status = status_of(node, peer_id)
        return status.name if status else ""

    ways = Ways(
        wanted=lambda: traversal.wanted,
        own=own,
        network=lambda: fingerprint(_networks(node), traversal.reachability().external_ips),
        relays=lambda: traversal.relays,
        signals=lambda: traversal.signals,
        addresses_of=told_by,
        name_of=name_of,
        keep=keep,
        unix_now=world.unix_now,
        random=world.random,
    )

    def on_whereabouts() -> None:
        if connector.on_whereabouts() and traversal.signals is not None:
            traversal.signals.network_changed()

    memory = PathMemory(load_paths(home), world.unix_now())
    async with open_connector(node.swarm, ways, memory) as connector:
        node.network.watch(connector.on_network_change)
        if traversal.where is not None:
            traversal.where.watch(on_whereabouts)
        node.membership.connect = partial(connector.connect, guest=True)
        yield connector


def _networks(node: Node) -> tuple[str, ...]:
    """Those of our interfaces, as CIDR; () where they cannot be told."""
    try:
        interfaces = [each for each in node.world.interfaces() if not (each.loopback or each.bare)]
        return tuple(dict.fromkeys(text for each in interfaces for text in each.networks))
    except OSError:  # an interface that went away in the middle of the look
        return ()


def _vouched(node: Node, peer_id: PeerId, vouchers: Sequence[Signed]) -> frozenset[str]:
    """From where nodes that we know say that the peer came to them: bootstrap nodes, relays of ours, members."""
    relays = node.traversal.relays.relays if node.traversal.relays else ()
    known = {*bootstrap_places(node), *relays, *node.swarm.connections()} - {peer_id}
    ips = set()
    for signed in [each for each in vouchers if each.signer in known][:MAX_VOUCHERS]:
        try:
            word = verify_voucher(signed, node.now())
        except ManifestInvalid:
            continue
        if word.peer_id == peer_id:
            ips.add(word.ip)
    return frozenset(ips)
