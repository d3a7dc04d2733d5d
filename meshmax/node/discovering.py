"""How a node finds others: the watch over our own network, and the ladder of rungs. Not here: who is there (presence)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE, KnownPeer
from meshmax.base.ids import PeerId
from meshmax.base.names import parse_name
from meshmax.base.status import PeerStatus
from meshmax.core.announce import Word
from meshmax.core.known_peers import KnownPeers
from meshmax.node.bootstrapping import bootstrap_outside, bootstrap_places, bootstrap_waiting
from meshmax.node.running import Node
from meshmax.services.announce import Announcer
from meshmax.services.cached_peers import CachedPeers
from meshmax.services.dht_rung import DhtRung
from meshmax.services.ladder import Ladder
from meshmax.services.network_watch import NetworkWatch
from meshmax.services.providers import ProviderSearch
from meshmax.services.rendezvous import Rendezvous
from meshmax.store.peers_file import load_peers, save_peers


@asynccontextmanager
async def open_discovery(node: Node) -> AsyncIterator[None]:
    """Make ``node.network`` and ``node.ladder``; the ladder is climbed by presence."""
    world = node.world
    node.network = NetworkWatch(world.addresses, world.unix_now)
    node.rendezvous = _rendezvous(node)
    known = KnownPeers(load_peers(node.home.path), world.unix_now())
    rungs = (_cached(node, known), *world.rungs(node.config, node.swarm), node.rendezvous, _dht_rung(node, known))
    off = {} if node.config.lan else {"mdns": "it is turned off (--no-lan, or lan: false)"}
    node.ladder = Ladder(rungs, world.random, node.network, off)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.network.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


def _cached(node: Node, known: KnownPeers) -> CachedPeers:
    home, world = node.home.path, node.world

    async def keep(peers: tuple[KnownPeer, ...]) -> None:
        await world.run_sync(partial(save_peers, home, peers))

    def status_of(peer_id: PeerId) -> PeerStatus | None:
        view = node.presence.view(peer_id)
        return view.status if view else None

    return CachedPeers(known, node.swarm, status_of, lambda: node.membership.mesh, world.unix_now, keep)


def _dht_rung(node: Node, known: KnownPeers) -> DhtRung:
    def old_neighbours() -> list[PeerId]:
        return [peer.peer_id for peer in known.to_dial(node.dht.mesh)]

    return DhtRung(
        node.swarm,
        lambda: node.dht.current,
        lambda: node.dht.mesh,
        old_neighbours,
        node.world.random,
        lambda: node.dht.why_off,
    )


def make_provider_search(node: Node) -> ProviderSearch:
    """Finds providers that are no neighbours."""
    return ProviderSearch(
        node.swarm,
        lambda: node.dht.current,
        lambda: node.dht.mesh,
        node.world.random,
        lambda: node.presence.farther(),  # noqa: PLW0108  presence may be opened later
        node.traversal.connector.connect,
    )


@asynccontextmanager
async def open_announcing(node: Node) -> AsyncIterator[None]:
    """Announce what this node has in the DHT for the time of the block."""

    def words() -> Iterator[Word]:
        for stored in node.catalog.local():
            yield Word("model", stored.manifest.digest)
            yield Word("name", parse_name(stored.name).full)

    announcer = Announcer(
        node.signer,
        lambda: node.dht.current,
        lambda: node.dht.mesh,
        words,
        node.told_addresses,
        node.world.unix_now,
        node.world.random,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


def _rendezvous(node: Node) -> Rendezvous:
    def none() -> str:
        if bootstrap_outside(node):
            return BOOTSTRAP_OUTSIDE
        if named := bootstrap_waiting(node):
            return (
                f"none is in use before this peer has joined; the ticket's issuer is looked for at {named[0].address}"
            )
        return "no bootstrap node is configured (--bootstrap), nor was one named by the ticket"

    return Rendezvous(
        node.swarm,
        node.signer,
        lambda: bootstrap_places(node),
        node.told_addresses,
        lambda: node.membership.mesh,
        node.world.unix_now,
        node.world.random,
        in_use=node.traversal.uses,
        none=none,
    )
