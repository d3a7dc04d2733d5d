"""Node: a running node as faces see it, and what it says of itself. Not here: how it is opened (node.opening)."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import trio

from meshmax import __version__
from meshmax.base.catalog import ModelFile
from meshmax.base.config import Config
from meshmax.base.errors import Busy, Draining, EngineUnavailable
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Options
from meshmax.base.model import CHUNK_BYTES, MODEL_MEDIA_TYPE, SYSTEM_MEDIA_TYPE, Manifest, StoredModel
from meshmax.base.names import parse_name
from meshmax.base.status import MAX_MODELS, MAX_PEER_NAME, NO_ENGINE, Gpu, ModelPresence, PeerStatus
from meshmax.base.traversal import PathStory
from meshmax.core.memory import Reading, cache_bytes_per_token
from meshmax.node.dht import NodeDht
from meshmax.node.draining import NodeDrain
from meshmax.node.mapping import mapped_addresses
from meshmax.node.serving import Serving
from meshmax.node.traversing import Traversal
from meshmax.node.world import World
from meshmax.ports import Datagrams, Engine, Pulls, Router, Signer, Swarm
from meshmax.services.adopt import Adoption
from meshmax.services.backends import Backends, served_presence
from meshmax.services.bundles import Bundles
from meshmax.services.catalog import CatalogService
from meshmax.services.distribute import Distribution
from meshmax.services.doctor import Doctor
from meshmax.services.fetchable import Fetchable
from meshmax.services.first_moments import FirstMoments
from meshmax.services.fsck import Fsck
from meshmax.services.garbage import Garbage
from meshmax.services.ladder import Ladder
from meshmax.services.leftovers import Leftovers
from meshmax.services.membership import MembershipService
from meshmax.services.model_exchange import FetchedModel
from meshmax.services.network_watch import NetworkWatch
from meshmax.services.preload import Preloads
from meshmax.services.presence import PresenceService
from meshmax.services.pull import PartialModel
from meshmax.services.pull_first import PullFirst
from meshmax.services.pull_server import OpenAsked
from meshmax.services.pull_world import Seek, seek_nowhere
from meshmax.services.reachability import ReachabilityService
from meshmax.services.rendezvous import Rendezvous
from meshmax.services.repositories import Repositories
from meshmax.services.residency import ModelResidency
from meshmax.services.throttle import Limits
from meshmax.services.uploads import Uploads
from meshmax.store import Store
from meshmax.store.home import Home
from meshmax.telemetry.meter import Meter

MAX_SYSTEM_BYTES: Final = 4 << 20  # of a model's system text; a longer one fits no context

State = Literal["starting", "running", "draining"]


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
        self.membership: MembershipService
        self.swarm: Swarm
        self.datagrams: Datagrams | None = None  # the UDP port
        self.dht = NodeDht(self)
        self.traversal = Traversal(self)
        self.draining = NodeDrain(self)
        self.serving = Serving()
        self.store: Store
        self.engine: Engine  # our own; those of others are backends
        self.backends = Backends()
        self.catalog: CatalogService
        self.presence: PresenceService
        self.network: NetworkWatch
        self.ladder: Ladder
        self.rendezvous: Rendezvous
        self.reachability: ReachabilityService
        self.doctor: Doctor
        self.lane_port = 0  # 0: no lanes are taken
        self.residency: ModelResidency
        self.preloads: Preloads
        self.limits: Limits
        self.fsck: Fsck
        self.adoption: Adoption
        self.bundles: Bundles
        self.garbage: Garbage
        self.leftovers: Leftovers
        self.pulls: Pulls
        self.distribution: Distribution
        self.fetchable: Fetchable
        self.first_moments: FirstMoments
        self.prompts: PullFirst  # the router below, which counts what is under way
        self.router: Router
        self.repositories: Repositories
        self.uploads: Uploads
        self.accept_pull: Callable[[PeerId, str, Sha256], Awaitable[str]] = _starting  # likewise
        self.open_asked: OpenAsked | None = None  # likewise
        self.seek: Seek = seek_nowhere  # likewise
        self.partials: Callable[[], tuple[PartialModel, ...]] = tuple  # until pulls are open there are none
        self.pulling: Callable[[Sha256], FetchedModel | None] = lambda digest: None  # likewise
        models = Path(config.models).expanduser() if config.models else home.path
        self._meter = Meter(models if models.is_dir() else home.path)

    def now(self) -> float:
        """Unix time in seconds."""
        return self.world.unix_now()

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self.signer.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where we can be dialled: see `Traversal.told_addresses`."""
        return self.traversal.told_addresses()

    def told_addresses(self) -> tuple[str, ...]:
        """Our addresses as others may know them and pass them on, with /p2p, at most MAX_ADDRESSES."""
        return self.traversal.told_addresses()

    def path_of(self, peer_id: PeerId) -> PathStory | None:
        """How the path to a connected peer came about; None where it is not connected."""
        return self.traversal.connector.path_of(peer_id)

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

    async def accept(self, peer: PeerId, name: str, digest: Sha256) -> str:
        """A peer asks us to pull a model: see services.pull.

        Raises OutOfScope, NotAMember, Draining; Busy until we are running.
        """
        self.membership.require(peer, "admin")
        if self.state == "draining":
            raise Draining
        return await self.accept_pull(peer, name, digest)

    @asynccontextmanager
    async def open_asked_pull(self, peer: PeerId, name: str, digest: Sha256) -> AsyncIterator[AsyncIterator[Transfer]]:
        """A peer waits for us to pull a model: see services.pull. Raises Draining; Busy until we are running."""
        if self.state == "draining":
            raise Draining
        if self.open_asked is None:
            raise Busy("this peer is starting")
        async with self.open_asked(peer, name, digest) as values:
            yield values

    # --- what we say of ourselves ------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something that our status tells has changed: let the mesh know soon. Cheap."""
        if self.state != "starting":
            self.presence.changed()

    def engines_changed(self) -> None:
        """What engines of others offer has changed: what they ran may be gone."""
        self.residency.look_at_engines()
        self.changed()

    def describe(self) -> PeerStatus:
        """Our status, but for what presence fills in (sequence, time)."""
        reading = self._meter.read(trio.current_time())
        return PeerStatus(
            self.signer.peer_id,
            0,
            0,
            self.name,
            __version__,
            mesh=self.membership.mesh,
            engine=self.engine.name,
            addresses=self.told_addresses(),
            models=self._models(),
            gpus=self.gpus,
            load=self.residency.load(),
            cpu_percent=reading.cpu_percent,
            memory_bytes=reading.memory_bytes,
            memory_total_bytes=reading.memory_total_bytes,
            draining=self.state == "draining",
            udp_port=self.serving.udp_port,
            relay=self.traversal.relays_members,
            mapped=mapped_addresses(self),
            demand=self.preloads.demand(),
        )

    def _models(self) -> tuple[ModelPresence, ...]:
        by_digest: dict[Sha256, list[StoredModel]] = {}
        for stored in self.catalog.local():
            by_digest.setdefault(stored.manifest.digest, []).append(stored)
        whole = [self._presence(models) for models in by_digest.values()]
        served = self._served(by_digest)
        known = {*by_digest, *(model.digest for model in served)}
        partial = [
            ModelPresence(part.digest, part.names, "partial", part.size)
            for part in self.partials()
            if part.digest not in known
        ]
        return tuple((whole + served + partial)[:MAX_MODELS])

    def _served(self, stored: Collection[Sha256]) -> list[ModelPresence]:
        """The models that engines of others bring along and that are not in our store."""
        names: dict[Sha256, list[str]] = {}
        for offer in self.backends.offered():
            if offer.digest not in stored:
                names.setdefault(offer.digest, []).append(parse_name(offer.name).full)
        offers = [(self.backends.by_digest(digest), given) for digest, given in names.items()]
        return [
            served_presence(offer, given[:64], self.residency.speed(offer.digest)) for offer, given in offers if offer
        ]

    def runs_itself(self, digest: Sha256) -> bool:
        """Whether our own engine runs a model: one of our store."""
        own = self.engine.name != NO_ENGINE
        return own and any(stored.manifest.digest == digest for stored in self.catalog.local())

    def _presence(self, models: list[StoredModel]) -> ModelPresence:
        stored = models[0]
        details = stored.details
        loaded = next((view for view in self.residency.loaded() if view.digest == stored.manifest.digest), None)
        speed = self.residency.speed(stored.manifest.digest)
        engine = self._engine_of(stored.manifest.digest)
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
            engine=engine,
            loaded_context=loaded.context_length if loaded and not engine else 0,
        )

    def _engine_of(self, digest: Sha256) -> str:
        """What runs a model of our store, if it is not our own engine."""
        offer = self.backends.by_digest(digest) if self.engine.name == NO_ENGINE else None
        return offer.engine if offer else ""

    async def model_file(self, digest: Sha256) -> ModelFile:
        """What the engine needs to load a model that is here. Raises ModelNotFound, BlobNotFound, StoreCorrupt."""
        if self.backends.brings(digest):
            return self.backends.model_file(digest)
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
            await self._system(stored.manifest) or description.system,
            _parameters(description.parameters),
            cache_bytes_per_token(description.model_info),
        )

    async def _system(self, manifest: Manifest) -> str:
        """The whole system text, which a description cuts; '' if there is none."""
        layer = manifest.layer(SYSTEM_MEDIA_TYPE)
        if layer is None or layer.size > MAX_SYSTEM_BYTES:
            return ""
        chunks = [await self.store.blobs.read_chunk(layer.digest, n) for n in range(-(-layer.size // CHUNK_BYTES))]
        return b"".join(chunks).decode("utf-8", "replace")

    async def find_gpus(self) -> None:
        """Ask the engine for its GPUs and their figures of now; tells the mesh at once when there are others."""
        moves = self.residency.moves
        before, self.gpus = self.gpus, await self.engine.devices()
        if [gpu.name for gpu in before] != [gpu.name for gpu in self.gpus]:
            self.presence.changed()  # memory and load go along with the next status
        self.residency.look_at_memory(moves)

    def memory(self) -> Reading:
        """What models may take memory of; an echo takes none, so that nothing is known of it."""
        if self.config.engine.kind == "echo":
            return Reading()
        reading = self._meter.read(trio.current_time())
        gpus = self.gpus if self.config.engine.gpu_layers else ()
        return Reading(reading.memory_bytes, reading.memory_total_bytes, gpus)


async def _starting(_peer: PeerId, _name: str, _digest: Sha256) -> str:
    await trio.lowlevel.checkpoint()
    raise Busy("this peer is starting")


def _parameters(raw: dict[str, Any]) -> Options:
    """The params layer of a model as options; what this version does not know is left out."""
    known = {key: value for key, value in raw.items() if key in Options.__struct_fields__}
    try:
        return msgspec.convert(known, Options, strict=False)
    except msgspec.ValidationError as error:
        raise EngineUnavailable(f"the model's own parameters are not valid: {error}") from None
