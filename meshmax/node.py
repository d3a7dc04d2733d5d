"""The composition root: the only module that names concrete adapters. `async with open_node(config) as node`.

One tree of tasks; what is opened first is closed last:

    home (lock) > store > swarm > residency (engine processes) > catalog > presence > pulls > router > background
                                                                                                       (scrub, GPU facts)

A simulated node is the same tree over another `World`. Not here: faces (api, cli), decisions (core).
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import trio

from meshmax import __version__
from meshmax.base.catalog import ModelFile
from meshmax.base.config import DEFAULT_CONTROL_PORT, Config, parse_host_port
from meshmax.base.errors import Busy, EngineUnavailable
from meshmax.base.events import Download
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Options
from meshmax.base.model import MODEL_MEDIA_TYPE, StoredModel
from meshmax.base.names import parse_name
from meshmax.base.status import MAX_MODELS, MAX_PEER_NAME, Gpu, ModelPresence, PeerStatus
from meshmax.core.backoff import Random
from meshmax.core.catalog import FirstSeen
from meshmax.core.limits import Override, Plan
from meshmax.core.mirror import MirrorPlan
from meshmax.engine.echo import EchoEngine
from meshmax.engine.llamacpp import LlamaCppEngine
from meshmax.engine.none import NoEngine
from meshmax.net.addresses import is_lan_address
from meshmax.net.lanes import open_lanes
from meshmax.net.mdns import Mdns
from meshmax.net.registry_client import open_registry_client
from meshmax.net.static import Static
from meshmax.net.swarm import open_swarm
from meshmax.ports import Discovery, Engine, Lanes, Pulls, Router, RunSync, Signer, Swarm
from meshmax.services.adopt import Adoption, run_watch
from meshmax.services.blob_server import BlobServer
from meshmax.services.bundle_source import LocalSources
from meshmax.services.bundles import Bundles, make_bundles
from meshmax.services.catalog import CatalogService, open_catalog
from meshmax.services.distribute import Distribution
from meshmax.services.fsck import Fsck
from meshmax.services.garbage import Garbage, Kept
from meshmax.services.infer_server import InferServer
from meshmax.services.lane_client import LaneOpener
from meshmax.services.lane_server import LaneServer, open_lane_server
from meshmax.services.leftovers import Leftovers, make_leftovers, open_leftovers
from meshmax.services.mirror import Mirror
from meshmax.services.model_exchange import FetchedModel, ModelServer
from meshmax.services.model_exchange import describe as ask_description
from meshmax.services.offers import Offers
from meshmax.services.outflow import Outflow
from meshmax.services.presence import PresenceService, open_presence
from meshmax.services.pull import PartialModel, open_pulls
from meshmax.services.registries import OpenRegistry, open_served, open_upstream
from meshmax.services.repositories import Repositories
from meshmax.services.residency import ModelResidency, open_residency
from meshmax.services.router import open_router
from meshmax.services.scrub import run_scrub
from meshmax.services.throttle import Limits, open_throttle
from meshmax.services.uploads import Uploads
from meshmax.store import Store, open_store
from meshmax.store.downloads import load_downloads, save_downloads
from meshmax.store.first_seen import load_first_seen, save_first_seen
from meshmax.store.home import Home, open_home
from meshmax.store.identity import load_identity
from meshmax.store.limits_file import load_override, save_override
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.meter import Meter

# More would only queue at one disk. The limiter is its own, so that a stuck disk blocks nothing else.
DISK_THREADS: Final = 4

T = TypeVar("T")
State = Literal["starting", "running", "draining"]


@dataclass(frozen=True)
class World:
    """What a node takes from outside: the network, the engine, threads, the clock, chance."""

    open_swarm: Callable[[Config, bytes], AbstractAsyncContextManager[Swarm]]
    rungs: Callable[[Config, Swarm], Sequence[Discovery]]
    engine: Callable[[Config, Path], Engine]
    run_sync: RunSync
    unix_now: Callable[[], float]
    random: Random
    open_registry: OpenRegistry | None = None  # None: no upstream registries
    open_lanes: Callable[[Config, PeerId], AbstractAsyncContextManager[Lanes]] | None = None  # None: no blob lanes


class Node:
    """A running node; made by `open_node`. Attributes are the ports that faces use."""

    def __init__(self, config: Config, home: Home, world: World) -> None:
        self.config = config
        self.home = home
        self.world = world
        self.state: State = "starting"
        self.name = (config.name or socket.gethostname().split(".")[0])[:MAX_PEER_NAME]
        self.token = config.token
        self.started_at_s = world.unix_now()
        self.gpus: tuple[Gpu, ...] = ()
        self.signer: Signer
        self.swarm: Swarm
        self.store: Store
        self.engine: Engine
        self.catalog: CatalogService
        self.presence: PresenceService
        self.residency: ModelResidency
        self.limits: Limits
        self.fsck: Fsck
        self.adoption: Adoption
        self.bundles: Bundles
        self.garbage: Garbage
        self.leftovers: Leftovers
        self.pulls: Pulls
        self.distribution: Distribution
        self.router: Router
        self.repositories: Repositories
        self.uploads: Uploads
        self.partials: Callable[[], tuple[PartialModel, ...]] = tuple  # until pulls are open there are none
        self.pulling: Callable[[Sha256], FetchedModel | None] = lambda digest: None  # likewise
        self._meter = Meter(home.path)

    def now(self) -> float:
        """Unix time in seconds."""
        return self.world.unix_now()

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self.signer.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be dialled."""
        return self.swarm.addresses

    def resources(self) -> dict[str, Any]:
        """The machine now, in the shape of the status interface."""
        reading = self._meter.read(trio.current_time())
        return {
            "cpu_percent": reading.cpu_percent,
            "memory_bytes": reading.memory_bytes,
            "memory_total_bytes": reading.memory_total_bytes,
            "disk_free_bytes": reading.disk_free_bytes,
            "gpus": [
                {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "memory_total_bytes": gpu.memory_total_bytes}
                for gpu in self.gpus
            ],
        }

    # --- what we say of ourselves ------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something that our status tells has changed: let the mesh know soon. Cheap."""
        if self.state != "starting":
            self.presence.changed()

    def describe(self) -> PeerStatus:
        """Our status, but for what presence fills in (sequence, time, addresses)."""
        reading = self._meter.read(trio.current_time())
        return PeerStatus(
            self.signer.peer_id,
            0,
            0,
            self.name,
            __version__,
            engine=self.engine.name,
            models=self._models(),
            gpus=self.gpus,
            load=self.residency.load(),
            cpu_percent=reading.cpu_percent,
            memory_bytes=reading.memory_bytes,
            memory_total_bytes=reading.memory_total_bytes,
            draining=self.state == "draining",
        )

    def _models(self) -> tuple[ModelPresence, ...]:
        by_digest: dict[Sha256, list[StoredModel]] = {}
        for stored in self.catalog.local():
            by_digest.setdefault(stored.manifest.digest, []).append(stored)
        whole = [self._presence(models) for models in by_digest.values()]
        partial = [
            ModelPresence(part.digest, part.names, "partial", part.size)
            for part in self.partials()
            if part.digest not in by_digest
        ]
        return tuple((whole + partial)[:MAX_MODELS])

    def _presence(self, models: list[StoredModel]) -> ModelPresence:
        stored = models[0]
        details = stored.details
        loaded = next((view for view in self.residency.loaded() if view.digest == stored.manifest.digest), None)
        speed = self.residency.speed(stored.manifest.digest)
        return ModelPresence(
            stored.manifest.digest,
            tuple(parse_name(model.name).full for model in models[:64]),
            "loaded" if loaded else "disk",
            stored.manifest.size,
            device=loaded.device if loaded else "gpu" if self.gpus else "cpu",
            family=details.family,
            parameter_size=details.parameter_size,
            quantization_level=details.quantization_level,
            context_length=details.context_length,
            embedding_length=details.embedding_length,
            capabilities=details.capabilities,
            modified_at_s=int(min(model.modified_at_s for model in models)),  # a further name changes nothing
            prefill_per_s=speed.prefill_per_s,
            decode_per_s=speed.decode_per_s,
            load_s=speed.load_s,
        )

    async def model_file(self, digest: Sha256) -> ModelFile:
        """What the engine needs to load a model of ours. Raises ModelNotFound, BlobNotFound, StoreCorrupt."""
        stored = self.catalog.by_digest(digest)
        layer = stored.manifest.layer(MODEL_MEDIA_TYPE)
        if layer is None:
            raise EngineUnavailable(f"'{stored.name}' has no GGUF layer; models of other formats cannot be run yet")
        path = await self.store.blobs.path(layer.digest)
        description = await self.store.models.describe(digest)
        return ModelFile(
            digest,
            stored.name,
            str(path),
            layer.size,
            stored.details,
            description.system,
            _parameters(description.parameters),
        )

    async def find_gpus(self) -> None:
        """Ask the engine for its GPUs; tells the mesh when there are some."""
        self.gpus = await self.engine.devices()
        self.presence.changed()


def _parameters(raw: dict[str, Any]) -> Options:
    """The params layer of a model as options; what this version does not know is left out."""
    known = {key: value for key, value in raw.items() if key in Options.__struct_fields__}
    try:
        return msgspec.convert(known, Options, strict=False)
    except msgspec.ValidationError as error:
        raise EngineUnavailable(f"the model's own parameters are not valid: {error}") from None


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
        node.swarm = await enter(world.open_swarm(config, identity.private_bytes))
        node.engine = world.engine(config, home.path / "logs")

        async def save_limits(override: Override) -> None:
            await world.run_sync(partial(save_override, home.path, override))

        node.limits = await enter(open_throttle(Plan(config.limits), load_override(home.path), save_limits))
        await _open_services(node, stack)
        node.state = "running"
        node.changed()
        yield node


async def _open_services(node: Node, stack: AsyncExitStack) -> None:
    enter, world, config, store = stack.enter_async_context, node.world, node.config, node.store
    kept = Kept(node.home.path, world.unix_now)
    node.residency = await enter(
        open_residency(
            node.engine, node.model_file, config.engine, world.unix_now, on_change=node.changed, on_use=kept.used
        )
    )
    first_seen = FirstSeen(load_first_seen(node.home.path))
    node.catalog = CatalogService(
        store.models,
        store.blobs,
        node.signer,
        world.unix_now,
        lambda: node.presence.peers(),  # noqa: PLW0108  presence is opened after the catalog that it tells about
        lambda: {part.digest: part.fraction for part in node.partials()},
        lambda peer_id, digest: ask_description(node.swarm, peer_id, digest),
        first_seen,
        node.changed,
        kept.pins,
    )
    await enter(open_catalog(node.catalog))
    node.fsck = Fsck(store.models.listing, store.blobs, node.catalog.refresh, lambda: node.pulls)
    node.adoption = Adoption(store.models.adopt, node.catalog.refresh, world.run_sync)

    def pulling(digest: Sha256) -> FetchedModel | None:
        return node.pulling(digest)  # looked up late: pulls are opened after this

    # Protocols are served before anybody can know our address, so that no early peer is refused.
    async def accept(peer: PeerId, name: str, digest: Sha256) -> str:
        if node.state == "starting":
            raise Busy("this peer is starting")
        return await pulls.accept(peer, name, digest)

    outflow, offers, throttle = Outflow(partial(_owner, node)), Offers(time.monotonic), node.limits.throttle
    opener: LaneOpener | None = None
    if world.open_lanes is not None and config.lanes_per_peer:
        lanes = await enter(world.open_lanes(config, node.peer_id))
        lane_server = LaneServer(store.blobs, lanes, outflow, offers, throttle)
        await enter(open_lane_server(lane_server, node.swarm, lanes))
        opener = LaneOpener(node.swarm, lanes, config.lanes_per_peer)
    node.garbage = garbage = Garbage(node, kept, outflow, world.run_sync)
    ModelServer(store.models, store.blobs, pulling, accept).register(node.swarm)
    BlobServer(store.blobs, outflow=outflow, offers=offers, throttle=throttle).register(node.swarm)
    InferServer(node.residency, node.limits.throttle.precedence).register(node.swarm)
    rungs = world.rungs(config, node.swarm)
    node.presence = await enter(
        open_presence(node.swarm, node.signer, config, node.describe, rungs, world.unix_now, world.random)
    )

    async def stored(model: StoredModel) -> None:
        await node.catalog.refresh()
        if model.record is None:  # nobody vouched for it; its digests were computed here, so we can
            await node.catalog.sign_missing_records()
        garbage.sweeper.wake()

    async def keep(downloads: tuple[Download, ...]) -> None:
        await world.run_sync(partial(save_downloads, node.home.path, downloads))

    upstream = await enter(
        open_upstream(world.open_registry, store.staging, node.catalog, config, world.random, throttle)
    )
    local = LocalSources()
    leftovers = make_leftovers(node, world.run_sync)
    node.pulls = pulls = await enter(
        open_pulls(
            node.swarm,
            store,
            node.catalog,
            node.presence,
            random=world.random,
            run_sync=world.run_sync,
            on_stored=stored,
            on_change=leftovers.before(node.changed),
            outflow=outflow,
            downloads=load_downloads(node.home.path),
            keep=keep,
            accept=config.accept_distribute,
            upstream=upstream,
            local=local.of,
            opener=opener,
            throttle=throttle,
            room=garbage.sweeper.room,
            naming=node.catalog,
        )
    )
    node.partials, node.pulling = pulls.partials, pulls.pulling
    await enter(garbage.open(pulls))
    node.leftovers = await enter(open_leftovers(leftovers))
    node.bundles = make_bundles(node, world.run_sync, local, pulls.held, stored)
    node.distribution = Distribution(node.swarm, node.catalog, node.presence, pulls.start_download)
    served = open_served(store, node.catalog, node.swarm, node.presence, pulls, upstream)
    node.repositories, node.uploads = await enter(served)
    node.router = await enter(
        open_router(
            node.swarm,
            node.residency,
            node.catalog,
            node.presence,
            node.peer_id,
            node.limits.throttle.precedence,
        )
    )
    await enter(_open_background(node, first_seen))


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
    async with trio.open_nursery() as nursery:
        nursery.start_soon(isolate, "gpus", node.find_gpus)
        nursery.start_soon(keep_names)
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


# --- the real world --------------------------------------------------------------------------------------------------


def real_world() -> World:
    """libp2p, mDNS, llama.cpp, threads, the system's clock."""
    system_random = random.SystemRandom()
    return World(
        _open_swarm, _rungs, _engine, _disk_threads(), time.time, system_random, open_registry_client, _open_lanes
    )


def _listen(config: Config) -> list[tuple[str, int]]:
    if config.listen:
        return [parse_host_port(text) for text in config.listen]
    # Without a LAN to take part in, only this machine may reach us unless --listen says otherwise.
    hosts = ("0.0.0.0", "::") if config.lan else ("127.0.0.1",)  # noqa: S104
    return [(host, DEFAULT_CONTROL_PORT) for host in hosts]


def _open_swarm(config: Config, private_bytes: bytes) -> AbstractAsyncContextManager[Swarm]:
    return open_swarm(private_bytes, _listen(config), allow=is_lan_address)


def _open_lanes(config: Config, peer_id: PeerId) -> AbstractAsyncContextManager[Lanes]:
    hosts = dict.fromkeys(host for host, _ in _listen(config))
    return open_lanes(peer_id, [(host, config.lane_port) for host in hosts], allow=is_lan_address)


def _rungs(config: Config, swarm: Swarm) -> tuple[Discovery, ...]:
    static = Static(config.join)
    if not config.lan:
        return (static,)
    return (static, Mdns(swarm.peer_id, lambda: swarm.addresses, config.lan_interfaces))


def _engine(config: Config, logs: Path) -> Engine:
    match config.engine.kind:
        case "echo":
            return EchoEngine(config.engine)
        case "none":
            return NoEngine()
        case _:
            return LlamaCppEngine(config.engine, logs)


def _disk_threads() -> RunSync:
    limiter = trio.CapacityLimiter(DISK_THREADS)

    async def run_sync(work: Callable[[], T], /) -> T:
        return await trio.to_thread.run_sync(work, limiter=limiter)

    return run_sync
