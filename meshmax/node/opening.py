"""The composition root: everything is joined here. `async with open_node(config) as node`.

One tree of tasks; what is opened first is closed last:

    home (lock) > store > swarm > residency (engine processes) > catalog > presence > pulls > router > background
                                                                                                       (scrub, GPU facts)

A simulated node is the same tree over another `World`. Not here: faces (api, cli), decisions (core).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from meshmax.base.config import Config
from meshmax.base.events import Download
from meshmax.base.ids import Sha256
from meshmax.base.model import StoredModel
from meshmax.base.names import parse_name
from meshmax.core.catalog import FirstSeen
from meshmax.core.limits import Override, Plan
from meshmax.core.mirror import MirrorPlan
from meshmax.core.sequence import StatusSequence
from meshmax.node.dht import open_node_dht
from meshmax.node.discovering import make_provider_search, open_announcing, open_discovery
from meshmax.node.joining import allow_of, follow_mesh, make_membership
from meshmax.node.mapping import tell_lanes
from meshmax.node.running import Node
from meshmax.node.serving import open_node_serving
from meshmax.node.traversing import open_traversal
from meshmax.node.visiting import make_doctor
from meshmax.node.world import World, real_world, several_engines
from meshmax.ports import Lanes, PromisesProtocols
from meshmax.services.adopt import Adoption, run_watch
from meshmax.services.backends import Backends, open_backends
from meshmax.services.blob_server import BlobServer
from meshmax.services.bundle_source import LocalSources
from meshmax.services.bundles import make_bundles
from meshmax.services.catalog import CatalogService, open_catalog
from meshmax.services.distribute import Distribution
from meshmax.services.drain import open_drain
from meshmax.services.fetchable import Fetchable
from meshmax.services.first_moments import FirstMoments
from meshmax.services.fsck import Fsck
from meshmax.services.garbage import Garbage, Kept
from meshmax.services.guards import MODEL_GUARDS
from meshmax.services.infer_server import InferServer
from meshmax.services.lane_client import LaneOpener
from meshmax.services.lane_server import LaneServer, open_lane_server
from meshmax.services.leftovers import make_leftovers, open_leftovers
from meshmax.services.membership import open_membership
from meshmax.services.mirror import Mirror
from meshmax.services.model_exchange import ModelServer
from meshmax.services.model_exchange import describe as ask_description
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.services.preload import Preloads
from meshmax.services.presence import open_presence
from meshmax.services.pull import open_pulls
from meshmax.services.pull_first import PullFirst
from meshmax.services.pull_server import PullServer
from meshmax.services.registries import open_served, open_upstream
from meshmax.services.residency import open_residency
from meshmax.services.router import open_router
from meshmax.services.scrub import run_scrub
from meshmax.services.shared_pulls import open_shared_pulls
from meshmax.services.throttle import open_throttle
from meshmax.store import open_store
from meshmax.store.downloads import load_downloads, save_downloads
from meshmax.store.first_seen import load_first_seen, save_first_seen
from meshmax.store.home import open_home
from meshmax.store.identity import load_identity
from meshmax.store.limits_file import load_override, save_override
from meshmax.store.sequence_file import load_sequence, save_sequence
from meshmax.telemetry.isolate import isolate
from meshmax.wire.protocols import (
    BLOB,
    DRAIN,
    INFER,
    LANE,
    LEASE,
    LOOK_BACK,
    MODEL,
    OBSERVE,
    PULL,
    RELAY_HOP,
    RELAY_STOP,
    RENDEZVOUS,
    SIGNAL,
    STATUS,
    TICKET,
)

# By every node, or by what its configuration and machine allow. Who comes before they are served waits for them.
SERVED: Final = (
    STATUS, MODEL, PULL, BLOB, INFER, LANE, DRAIN, LEASE, TICKET, LOOK_BACK, SIGNAL, OBSERVE, RENDEZVOUS, RELAY_HOP, RELAY_STOP,
)  # fmt: skip
GPU_REFRESH_S: Final = 15.0  # as often as a status goes out by itself


@asynccontextmanager
async def open_node(config: Config, world: World | None = None) -> AsyncIterator[Node]:
    """A node, running: it listens, discovers and answers. Leaving the block ends everything that it started.

    Raises ConfigError (home in use or not writable, bad addresses), StoreError.
    """
    world = world or real_world()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        home = await enter(open_home(Path(config.home).expanduser()))
        node = Node(config, home, world)
        identity = load_identity(home.path)
        node.signer = identity
        models = Path(config.models).expanduser() if config.models else home.path / "models"
        node.store = await enter(open_store(models, home.path / "state", world.run_sync))
        node.membership = make_membership(node)
        node.swarm = await enter(world.open_swarm(config, identity.private_bytes, node.membership))
        if isinstance(node.swarm, PromisesProtocols):
            node.swarm.promise(SERVED)
        await enter(open_membership(node.membership, node.swarm))
        node.engine = world.engine(config, home.path / "logs")
        unasked = "ollama" if config.engine.ollama == "auto" else ""
        node.backends = Backends(world.backends(config), node.engines_changed, node.runs_itself, unasked)

        async def save_limits(override: Override) -> None:
            await world.run_sync(partial(save_override, home.path, override))

        override, local_time = load_override(home.path), partial(_local_time, world.unix_now)
        node.limits = await enter(open_throttle(Plan(config.limits), override, save_limits, world.clock, local_time))
        await _Opening(node, stack).run()
        if isinstance(node.swarm, PromisesProtocols):
            node.swarm.promised_all()
        node.first_moments.begin()
        node.state = "running"
        node.changed()
        yield node


class _Opening:
    """The steps of opening a node's services, in their order, and what they hand on to each other."""

    def __init__(self, node: Node, stack: AsyncExitStack) -> None:
        self.node, self.world, self.config, self.store = node, node.world, node.config, node.store
        self.enter = stack.enter_async_context
        self.first_seen = FirstSeen(load_first_seen(node.home.path))
        self.kept = Kept(node.home.path, node.world.unix_now)
        self.outflow, self.offers = Outflow(partial(_owner, node)), Offers(node.world.clock)
        self.throttle = node.limits.throttle
        self.lanes: Lanes | None = None
        self.opener: LaneOpener | None = None

    async def run(self) -> None:
        """All of them."""
        await self._open_models()
        await self._open_serving()
        await self._open_pulls()
        await self._open_prompts()
        await self.enter(_open_background(self.node, self.first_seen))

    async def _open_models(self) -> None:
        node, world, store = self.node, self.world, self.store
        drain = node.draining.here = await self.enter(open_drain(node.draining.changed))
        node.residency = await self.enter(
            open_residency(
                several_engines(node.engine, node.backends.owners),
                node.model_file,
                self.config.engine,
                world.unix_now,
                on_change=node.changed,
                on_use=self.kept.used,
                brought=node.backends,
                drain=drain,
                memory=node.memory,
            )
        )
        keep_alive_s = self.config.engine.keep_alive_s
        node.preloads = Preloads(node.peer_id, node.residency, lambda: node.presence.peers(), keep_alive_s)  # noqa: PLW0108
        node.catalog = CatalogService(
            store.models,
            store.blobs,
            node.signer,
            world.unix_now,
            lambda: node.presence.peers(),  # noqa: PLW0108  presence is opened after the catalog that it tells about
            lambda: {part.digest: part.fraction for part in node.partials()},
            lambda peer_id, digest: ask_description(node.swarm, peer_id, digest),
            self.first_seen,
            node.changed,
            self.kept.pins,
            node.backends,
        )
        await self.enter(open_catalog(node.catalog))
        node.fsck = Fsck(store.models.listing, store.blobs, node.catalog.refresh, lambda: node.pulls)
        node.adoption = Adoption(store.models.adopt, node.catalog.refresh, world.run_sync)

    async def _open_serving(self) -> None:
        """Protocols are served before anybody is told our address; who knows it from before waits for them (SERVED)."""
        node, world, store = self.node, self.world, self.store
        if world.open_lanes is not None and self.config.lanes_per_peer:
            lanes = self.lanes = await self.enter(
                world.open_lanes(self.config, node.peer_id, allow_of(node.membership))
            )
            lane_server = LaneServer(store.blobs, lanes, self.outflow, self.offers, self.throttle)
            await self.enter(open_lane_server(lane_server, node.swarm, lanes))
            self.opener = LaneOpener(node.swarm, lanes, self.config.lanes_per_peer)
            node.lane_port = lanes.port
        node.garbage = Garbage(node, self.kept, self.outflow, world.run_sync)
        # Pulls are opened after this, hence the looking up at each call.
        ModelServer(
            store.models,
            store.blobs,
            lambda digest: node.pulling(digest),  # noqa: PLW0108
            node.accept,
            lambda peer, request: node.membership.require(peer, *MODEL_GUARDS[type(request)]),
            node.backends.describe,
        ).register(node.swarm)
        PullServer(node.open_asked_pull).register(node.swarm)
        BlobServer(store.blobs, outflow=self.outflow, offers=self.offers, throttle=self.throttle).register(node.swarm)
        infer_server = InferServer(node.residency, self.throttle.precedence)
        infer_server.register(node.swarm)
        node.draining.serve(infer_server)
        await self.enter(open_node_serving(node))
        await self.enter(open_discovery(node))
        await self.enter(open_traversal(node))
        if node.traversal.mapping and self.lanes:
            tell_lanes(node.traversal.mapping, self.lanes)
        if (signals := node.traversal.signals) and self.lanes and self.opener:
            signals.on_lane_stream, self.opener.signalled = self.lanes.take, signals.open_lane_stream
        node.doctor = make_doctor(node)
        node.presence = await self.enter(
            open_presence(
                node.swarm,
                node.signer,
                self.config,
                node.describe,
                node.ladder,
                world.unix_now,
                world.random,
                StatusSequence(load_sequence(node.home.path)),
                self._keep_sequence,
                node.traversal.connector.connect,
                node.traversal.stand,
                node.traversal.on_silent,
                node.traversal.connector.on_told,
            )
        )
        node.garbage.leases.connect = node.traversal.connector.connect
        node.network.watch(node.presence.on_network_change)
        node.presence.watch(node.traversal.connector.on_news)
        node.first_moments = FirstMoments(node.ladder.reports, node.presence.watch)
        follow_mesh(node, self.first_seen)
        await self.enter(open_node_dht(node))
        await self.enter(open_announcing(node))

    async def _open_pulls(self) -> None:
        node, world, store, config = self.node, self.world, self.store, self.config
        node.seek = make_provider_search(node).seek
        opened = open_upstream(world.open_registry, store.staging, node.catalog, config, world.random, self.throttle)
        upstream = await self.enter(opened)
        node.fetchable = Fetchable(node.catalog, upstream, config.routing)
        local, leftovers = LocalSources(), make_leftovers(node, world.run_sync)
        node.pulls = pulls = await self.enter(
            open_pulls(
                node.swarm,
                store,
                node.catalog,
                node.presence,
                random=world.random,
                run_sync=world.run_sync,
                on_stored=self._stored,
                on_change=leftovers.before(node.changed),
                outflow=self.outflow,
                downloads=load_downloads(node.home.path),
                keep=self._keep_downloads,
                accept=config.accept_distribute,
                upstream=upstream,
                local=local.of,
                opener=self.opener,
                throttle=self.throttle,
                room=node.garbage.sweeper.room,
                guard=self.kept.pins.require_free,
                naming=node.catalog,
                seek=self._meet_and_seek,
            )
        )
        node.partials, node.pulling = pulls.partials, pulls.pulling
        node.accept_pull, node.open_asked = pulls.accept, pulls.open_asked
        await self.enter(node.garbage.open(pulls))
        node.leftovers = await self.enter(open_leftovers(leftovers))
        node.bundles = make_bundles(node, world.run_sync, local, pulls.held, self._stored)
        node.distribution = Distribution(node.swarm, node.catalog, node.presence, pulls.start_download)
        served = open_served(store, node.catalog, node.swarm, node.presence, pulls, upstream)
        node.repositories, node.uploads = await self.enter(served)

    async def _open_prompts(self) -> None:
        node = self.node
        precedence = self.throttle.precedence
        router = await self.enter(
            open_router(
                node.swarm,
                node.residency,
                node.catalog,
                node.presence,
                node.peer_id,
                precedence,
                node.config.routing,
                jitter=self.world.random,
                unix_now=self.world.unix_now,
            )
        )
        node.presence.watch(router.on_news)
        fetching = await self.enter(open_shared_pulls(node.swarm, node.pulls))
        config, unix_now = self.config.routing, self.world.unix_now
        node.prompts = PullFirst(
            router,
            node.catalog,
            node.presence,
            fetching,
            config,
            unix_now,
            node.preloads.on_ask,
            node.fetchable.entry,
        )
        node.router = node.prompts

    async def _meet_and_seek(self, name: str, found: Callable[[], bool]) -> bool:
        await self.node.first_moments.wait(found)
        return found() or await self.node.seek(name, found)

    async def _stored(self, model: StoredModel) -> None:
        await self.node.catalog.refresh()
        if model.record is None:  # nobody vouched for it; its digests were computed here, so we can
            await self.node.catalog.sign_missing_records()
        self.node.garbage.sweeper.wake()

    async def _keep_sequence(self, bound: int) -> None:
        await self.world.run_sync(partial(save_sequence, self.node.home.path, bound))

    async def _keep_downloads(self, downloads: tuple[Download, ...]) -> None:
        await self.world.run_sync(partial(save_downloads, self.node.home.path, downloads))


def _local_time(unix_now: Callable[[], float]) -> tuple[int, int]:
    """Weekday (0 Monday) and minutes after midnight, where this machine is."""
    now = time.localtime(unix_now())
    return now.tm_wday, now.tm_hour * 60 + now.tm_min


def _owner(node: Node, blob: Sha256) -> tuple[Sha256, str] | None:
    """The model of ours, whole or in parts, that a blob which we send belongs to."""
    for stored in node.catalog.local():
        if any(layer.digest == blob for layer in stored.manifest.blobs):
            return stored.manifest.digest, stored.name
    for part in node.partials():
        model = node.pulling(part.digest)
        if model and any(layer.digest == blob for layer in model.manifest.blobs):
            return part.digest, str(parse_name(part.names[0]))
    return None


async def _watch_gpus(node: Node) -> NoReturn:
    while True:
        await isolate("gpus", node.find_gpus)
        await trio.sleep(GPU_REFRESH_S)


@asynccontextmanager
async def _open_background(node: Node, first_seen: FirstSeen) -> AsyncIterator[None]:
    """What goes on by itself: GPU facts, scrubbing, keeping what names meant."""
    noted = trio.Event()

    def on_news() -> None:
        if node.catalog.note_names():
            noted.set()

    async def keep_names() -> None:
        nonlocal noted
        while True:
            await noted.wait()
            noted = trio.Event()
            save = partial(save_first_seen, node.home.path, first_seen.items())
            await isolate("names", partial(node.world.run_sync, save))

    node.presence.watch(on_news)
    async with open_backends(node.backends), trio.open_nursery() as nursery:
        nursery.start_soon(_watch_gpus, node)
        nursery.start_soon(keep_names)
        if node.config.engine.preload:
            nursery.start_soon(node.preloads.run)
        if node.config.mirror:
            mirror = Mirror(MirrorPlan(node.config.mirror), node.pulls, node.presence.peers, node.catalog.local)
            nursery.start_soon(mirror.run)
        nursery.start_soon(run_watch, node.catalog.refresh_if_changed)
        nursery.start_soon(
            run_scrub, node.store.blobs, node.catalog.local, node.catalog.refresh, node.config.scrub_interval_s
        )
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
