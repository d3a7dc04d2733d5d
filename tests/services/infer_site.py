"""A few peers with echo engines on a network in memory, for tests of asking and routing."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from meshmax.base.catalog import CatalogEntry, ModelDescription, ModelFile, Resolved
from meshmax.base.config import EngineConfig
from meshmax.base.errors import ModelNotFound
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, Delta, Finish, GenerateRequest, InferRequest, RoutedEvent
from meshmax.base.model import ModelDetails, StoredModel
from meshmax.base.names import ModelName
from meshmax.base.status import Load, ModelPresence, PeerStatus, PeerView
from meshmax.engine.echo import EchoEngine
from meshmax.ports import Progress
from meshmax.services.drain import Drain, open_drain
from meshmax.services.infer_server import InferServer
from meshmax.services.residency import ModelResidency, open_residency
from meshmax.services.router import MeshRouter, open_router
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner

MODEL = Sha256("ab" * 32)
OTHER = Sha256("cd" * 32)
WORDS = " ".join(f"word{n}" for n in range(100))


def ask(request: InferRequest | str = WORDS, digest: Sha256 = MODEL, **fields: Any) -> Ask:
    """A request for a completion of ``request`` by the model."""
    if isinstance(request, str):
        request = GenerateRequest(request, raw=True)
    return Ask("request-1", digest, "echo", request, **fields)


async def text_of(events: AsyncIterator[RoutedEvent]) -> str:
    """The whole text; the last event is a Finish."""
    got = [event async for event in events]
    assert isinstance(got[-1], Finish)
    return "".join(event.text for event in got if isinstance(event, Delta))


class Node:
    """One peer: engine, residency, server, router. ``has``: the models on its disk."""

    def __init__(self, site: "Site", name: str, swarm: MemorySwarm, engine: EchoEngine) -> None:
        self.site, self.name, self.swarm, self.engine = site, name, swarm, engine
        self.peer_id = swarm.peer_id
        self.has: set[Sha256] = {MODEL}
        self.change: Callable[[PeerView], PeerView] = lambda view: view
        self.drain: Drain
        self.residency: ModelResidency
        self.server: InferServer
        self.router: MeshRouter

    async def model_file(self, digest: Sha256) -> ModelFile:
        if digest not in self.has:
            raise ModelNotFound(f"model '{digest[:12]}' not found")
        return ModelFile(digest, "echo", "/nowhere", 1 << 20)

    @property
    def produced(self) -> int:
        return sum(model.produced for model in self.engine.models)

    async def connect(self, *others: "Node") -> None:
        for other in others:
            await self.swarm.dial(other.peer_id, other.swarm.addresses)

    # --- ports.Presence, as this node sees the site ---

    def peers(self) -> tuple[PeerView, ...]:
        others = [node.seen() for node in self.site.nodes if node is not self]
        own = msgspec.structs.replace(self.seen(), state="self", path="self", rtt_s=0.0)
        return (own, *others)

    def view(self, peer_id: PeerId) -> PeerView | None:
        return next((view for view in self.peers() if view.peer_id == peer_id), None)

    def seen(self) -> PeerView:
        loaded = {model.digest for model in self.residency.loaded()}
        models = tuple(
            ModelPresence(digest, ("x",), "loaded" if digest in loaded else "disk", 1 << 30)
            for digest in sorted(self.has | loaded)
        )
        draining = self.drain.view.state != "running"
        load = Load(0, 0, 4)
        status = PeerStatus(self.peer_id, 1, 0, self.name, "0", models=models, load=load, draining=draining)
        return self.change(PeerView(self.peer_id, "online", "direct", status, rtt_s=0.002))

    # --- ports.Catalog ---

    def entries(self) -> tuple[CatalogEntry, ...]:
        return tuple(
            CatalogEntry("echo", digest, 1 << 30, 0.0, ModelDetails(), digest in self.has)
            for digest in {model for node in self.site.nodes for model in node.has}
        )

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        raise NotImplementedError

    async def describe(self, name: str, verbose: bool = False) -> ModelDescription:
        raise NotImplementedError

    async def copy(self, source: str, destination: str) -> StoredModel:
        raise NotImplementedError

    async def delete(self, name: str) -> None:
        raise NotImplementedError

    async def add(self, name: str | ModelName, path: Path, link: bool, progress: Progress) -> StoredModel:
        raise NotImplementedError


class Site:
    """Nodes on one network; the first is where the client asks."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(latency_s=0.001)
        self.nodes: list[Node] = []

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]


@asynccontextmanager
async def open_site(count: int, **engine: Any) -> AsyncIterator[Site]:
    """``count`` nodes, each connected to each. ``engine``: of EngineConfig, and ``load_s``."""
    load_s = engine.pop("load_s", 0.0)
    config = EngineConfig(kind="echo", **engine)
    site = Site()
    async with AsyncExitStack() as stack:
        for number in range(count):
            swarm = await stack.enter_async_context(site.network.open_swarm(SeededSigner(number + 1)))
            node = Node(site, f"peer{number}", swarm, EchoEngine(config, load_s))
            node.drain = await stack.enter_async_context(open_drain())
            node.residency = await stack.enter_async_context(
                open_residency(node.engine, node.model_file, config, drain=node.drain)
            )
            node.server = InferServer(node.residency)
            node.server.register(swarm)
            node.router = await stack.enter_async_context(
                open_router(swarm, node.residency, node, node, node.peer_id, jitter=random.Random(number))
            )
            await node.connect(*site.nodes)
            site.nodes.append(node)
        yield site
