"""A node whose parts are small fakes around a real Residency with the echo engine, for tests of the faces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import trio

from meshmax.api.node_view import NodeState
from meshmax.base.catalog import CatalogEntry, ModelDescription, ModelFile, Resolved, TensorShape
from meshmax.base.config import Config, EngineConfig
from meshmax.base.discovery import RungReport
from meshmax.base.doctor import Diagnosis, Facts, MachineFacts, PeerFacts
from meshmax.base.drain import DrainView
from meshmax.base.errors import BlobNotFound, MeshmaxError, ModelNotFound, NoProviders, NotAMember, NotFound
from meshmax.base.events import BlobProgress, Transfer
from meshmax.base.ids import PeerId, Sha256, peer_id_of
from meshmax.base.inference import Ask, Event, Moved, RoutedEvent
from meshmax.base.membership import OPEN_MESH, SCOPES, MemberView, MeshId, MeshView, Scope, Ticket
from meshmax.base.model import Haves, Layer, Manifest, ModelDetails, StoredModel
from meshmax.base.names import parse_name, split_digest
from meshmax.base.reachability import Reachability
from meshmax.base.route import Route, Wishes
from meshmax.base.status import Load, ModelPresence, PeerStatus, PeerView
from meshmax.base.traversal import PathStory
from meshmax.core.doctor import diagnose
from meshmax.core.limits import Override, Plan
from meshmax.engine.echo import EchoEngine
from meshmax.ports import Answer, ConnectionView, Progress
from meshmax.ports.services import WISHES
from meshmax.services.backends import Backends
from meshmax.services.fetchable import Fetchable
from meshmax.services.leftovers import Leftover
from meshmax.services.residency import ModelResidency, open_residency
from meshmax.services.throttle import Limits, RateThrottle
from meshmax.wire.ticket import parse_ticket, ticket_text

OURS = peer_id_of(b"\x01" * 32)
THEIRS = peer_id_of(b"\x02" * 32)
NOW_S = 1_761_498_924.097767  # 2025-10-26T17:15:24.097767Z
DIGEST = Sha256("ab" * 32)
REMOTE_DIGEST = Sha256("cd" * 32)
BLOB = Sha256("6a" * 32)


def details(*capabilities: str) -> ModelDetails:
    return ModelDetails("gguf", "echo", ("echo",), "1M", "F16", 4096, 64, capabilities)


def entry(name: str, digest: Sha256, **fields: Any) -> CatalogEntry:
    given: dict[str, Any] = {
        "size": 1000,
        "modified_at_s": NOW_S,
        "details": details("completion"),
        "local": True,
        "holders": (OURS,),
    }
    return CatalogEntry(name, digest, **(given | fields))


class FakeCatalog:
    def __init__(self) -> None:
        self.known = [
            entry("echo:latest", DIGEST),
            entry("far:latest", REMOTE_DIGEST, local=False, holders=(THEIRS,), modified_at_s=NOW_S - 60),
        ]
        self.description = ModelDescription(
            DIGEST,
            details("completion"),
            {"general.architecture": "echo", "general.name": "x", "tokenizer.ggml.tokens": ["a"] * 6},
            template="{{ .Prompt }}",
            license="MIT",
            parameters={"temperature": 0.5, "stop": ["<end>", "<|eot|>"]},
            modified_at_s=NOW_S,
        )

    def entries(self) -> tuple[CatalogEntry, ...]:
        return tuple(self.known)

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        bare, digest = split_digest(name)
        wanted = parse_name(bare)
        for known in self.known:
            if parse_name(known.name).key == wanted.key and known.digest.startswith(digest or ""):
                return Resolved(known.name, known.digest, known, self._stored(known) if known.local else None)
        raise ModelNotFound(f"model '{name}' not found")

    def _stored(self, known: CatalogEntry) -> StoredModel:
        layers = (Layer("application/vnd.ollama.image.model", BLOB, 900),)
        manifest = Manifest(known.digest, b"{}", Layer("config", Sha256("0c" * 32), 100), layers)
        return StoredModel(known.name, manifest, known.details, known.modified_at_s)

    async def describe(self, name: str, verbose: bool = False) -> ModelDescription:
        await trio.lowlevel.checkpoint()
        self.resolve(name)
        tensors = (TensorShape("blk.0", "F32", (4, 2)),) if verbose else ()
        return msgspec.structs.replace(self.description, tensors=tensors)

    async def copy(self, source: str, destination: str) -> StoredModel:
        await trio.lowlevel.checkpoint()
        found = self.resolve(source).entry
        if not found.local:
            raise ModelNotFound
        self.known.append(msgspec.structs.replace(found, name=str(parse_name(destination))))
        return msgspec.structs.replace(self._stored(self.known[-1]), kept="mine:latest-0" * (destination == "mine"))

    async def delete(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        found = self.resolve(name).entry
        if not found.local:
            raise ModelNotFound
        self.known.remove(found)

    async def add(self, name: str, path: Path, link: bool, progress: Progress) -> StoredModel:
        for done in range(0, 1001, 250):
            progress(done, 1000)
            await trio.sleep(0.1)
        self.known.append(entry(str(parse_name(name)), DIGEST))
        return self._stored(self.known[-1])


class FakePulls:
    """Plays ``script`` for any name but ``missing``."""

    def __init__(self) -> None:
        self.left = 0
        self.missing = "missing"
        self.watched = 0
        self.started: list[str] = []
        one = Transfer("t1", "far:latest", "in", "running", "pulling manifest", bytes_total=1000)
        self.script = [
            one,
            msgspec.structs.replace(one, phase="pulling", blobs=(BlobProgress(BLOB, 900, 0),)),
            msgspec.structs.replace(one, phase="pulling", blobs=(BlobProgress(BLOB, 900, 400),)),
            msgspec.structs.replace(one, phase="success", state="done", blobs=(BlobProgress(BLOB, 900, 900),)),
        ]

    @asynccontextmanager
    async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
        if self.missing in name:
            raise NoProviders(f"no peer that can be reached has '{name}'")
        try:
            async with aclosing(self._play()) as transfers:
                yield transfers
        finally:
            self.left += 1

    async def _play(self) -> AsyncGenerator[Transfer, None]:
        for transfer in self.script:
            await trio.sleep(0.1)
            self.watched += 1
            yield transfer

    def transfers(self) -> tuple[Transfer, ...]:
        return tuple(self.script[-1:])

    async def start_download(self, name: str) -> Transfer:
        await trio.lowlevel.checkpoint()
        if "missing" in name:
            raise NoProviders(f"no peer that can be reached has '{name}'")
        self.started.append(name)
        return self.script[0]

    async def steer(self, transfer_id: str, action: str) -> Transfer:
        await trio.lowlevel.checkpoint()
        if transfer_id != "t1":
            raise NotFound(f"no transfer '{transfer_id}' is known here")
        states = {"cancel": "cancelled", "pause": "paused", "resume": "running"}
        return msgspec.structs.replace(self.script[0], state=states[action])


class FakeLeftovers:
    def __init__(self) -> None:
        self.known = [Leftover("half:latest", 300, 1000)]

    async def list(self) -> tuple[Leftover, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(self.known)

    def freed(self, transfer: str) -> bool:
        return False

    async def drop(self, name: str) -> bool:
        await trio.lowlevel.checkpoint()
        before, self.known = self.known, [each for each in self.known if each.name != str(parse_name(name))]
        return before != self.known


class FakeDistribution:
    """``answers`` is what peers say; ``asked``: (name, peers or a number of replicas)."""

    def __init__(self) -> None:
        self.answers: dict[PeerId, str | MeshmaxError] = {THEIRS: "t9"}
        self.asked: list[tuple[str, Any]] = []

    async def distribute(self, name: str, peers: Any) -> dict[PeerId, str | MeshmaxError]:
        await trio.lowlevel.checkpoint()
        self.asked.append((name, list(peers)))
        return self.answers

    async def replicate(self, name: str, replicas: int) -> dict[PeerId, str | MeshmaxError]:
        await trio.lowlevel.checkpoint()
        if "missing" in name:
            raise ModelNotFound
        self.asked.append((name, replicas))
        return self.answers


class FakeRouter:
    """Answers with our own residency, or fails: ``refuse`` before the first event, ``break_after`` events with ``error``.

    ``moves``: before the event of that number another peer goes on.
    """

    def __init__(self, residency: ModelResidency) -> None:
        self._residency = residency
        self.refuse: MeshmaxError | None = None
        self.break_after: tuple[int, MeshmaxError] | None = None
        self.moves: dict[int, Moved] = {}
        self.asks: list[Ask] = []
        self.wishes: list[Wishes] = []
        self.open = 0

    @asynccontextmanager
    async def open_answer(self, ask: Ask, wishes: Wishes = WISHES) -> AsyncIterator[Answer]:
        self.asks.append(ask)
        self.wishes.append(wishes)
        if self.refuse:
            await trio.lowlevel.checkpoint()
            raise self.refuse
        peer = OURS if ask.digest == DIGEST else THEIRS
        self.open += 1
        try:
            async with self._residency.open_answer(ask) as answered, aclosing(self._broken(answered)) as events:
                route = Route(ask.request_id, ask.digest, peer, "only candidate\n\u00e9")
                yield SimpleNamespace(route=route, events=events)
        finally:
            self.open -= 1

    async def _broken(self, events: AsyncIterator[Event]) -> AsyncGenerator[RoutedEvent, None]:
        count = 0
        async for event in events:
            if count in self.moves:
                yield self.moves[count]
            if self.break_after and count == self.break_after[0]:
                raise self.break_after[1]
            count += 1
            yield event

    def routes(self) -> tuple[Route, ...]:
        return (Route("r1", DIGEST, OURS, "only candidate"),)

    def route(self, request_id: str) -> Route | None:
        return next((route for route in self.routes() if route.request_id == request_id), None)


class FakePresence:
    problem = ""

    def __init__(self) -> None:
        model = ModelPresence(REMOTE_DIGEST, ("registry.ollama.ai/library/far:latest",), "disk", 1000)
        status = PeerStatus(THEIRS, 1, 1, "attic", "0.1.0", models=(model,), load=Load(1, 2))
        own = PeerStatus(OURS, 1, 1, "desk", "0.1.0", cpu_percent=5.0, memory_bytes=1, memory_total_bytes=4)
        self.gone: list[PeerView] = []  # and in no list any more
        self.watchers: list[Callable[[], None]] = []
        self.known = [
            PeerView(OURS, "self", "self", own, last_seen_s=NOW_S),
            PeerView(THEIRS, "online", "direct", status, "/ip4/10.0.0.2/tcp/11435", 0.0015, NOW_S),
        ]

    def peers(self) -> tuple[PeerView, ...]:
        return tuple(self.known)

    def lost(self) -> tuple[PeerView, ...]:
        return tuple(view for view in (*self.known, *self.gone) if view.state == "offline")

    def watch(self, on_news: Callable[[], None]) -> None:
        self.watchers.append(on_news)

    def on_news(self) -> None:
        for on_news in self.watchers:
            on_news()

    def view(self, peer_id: PeerId) -> PeerView | None:
        return next((view for view in (*self.known, *self.gone) if view.peer_id == peer_id), None)


class FakeSwarm:
    peer_id = OURS
    addresses: tuple[str, ...] = (f"/ip4/10.0.0.1/tcp/11435/p2p/{OURS}",)

    def connections(self) -> Mapping[PeerId, ConnectionView]:
        return {THEIRS: ConnectionView(THEIRS, "/ip4/10.0.0.2/tcp/11435", "out", NOW_S)}


class FakeBlobs:
    async def path(self, digest: Sha256) -> Path:
        await trio.lowlevel.checkpoint()
        if digest != BLOB:
            raise BlobNotFound
        return Path("/nowhere")

    async def haves(self, digest: Sha256) -> tuple[Any, Haves] | None:
        await trio.lowlevel.checkpoint()
        return (SimpleNamespace(chunk_bytes=1 << 20, blake3=b"\1" * 32), Haves.all(1)) if digest == BLOB else None


class FakeLadder:
    def reports(self) -> tuple[RungReport, ...]:
        return (RungReport("mdns", "working", "", 2, 0.25), RungReport("dht", "off", "not configured"))


class FakeDoctor:
    """``steps`` that a visit takes; ``left``: visits that ended, however."""

    def __init__(self) -> None:
        self.steps = ["climbing", "asking"]
        self.left = 0

    async def visit(self, step: Callable[[str], Awaitable[None]]) -> Diagnosis:
        try:
            for words in self.steps:
                await step(words)
                await trio.sleep(1)
        finally:
            self.left += 1
        return diagnose(Facts(MachineFacts("/home", ("10.0.0.1",)), PeerFacts(online=0)), 2.0)


class FakeMembership:
    """A mesh of two, or the open one."""

    def __init__(self) -> None:
        self.now = MeshView(OPEN_MESH, "", False, SCOPES)
        self.near = ""
        self.known = (
            MemberView(OURS, "desk", SCOPES, 1_800_000_000),
            MemberView(THEIRS, "attic", ("infer",), 1_800_000_000),
        )
        self.did: list[tuple[Any, ...]] = []

    def view(self) -> MeshView:
        return self.now

    def members(self) -> tuple[MemberView, ...]:
        return self.known if self.now.mesh else ()

    async def create(self, name: str) -> MeshView:
        await trio.lowlevel.checkpoint()
        self.now = MeshView(MeshId(OURS), name, True, SCOPES, 1_800_000_000)
        return self.now

    async def ticket(self, scopes: Sequence[Scope], expires_s: float, uses: int) -> str:
        await trio.lowlevel.checkpoint()
        self.did.append(("ticket", scopes, expires_s, uses))
        return ticket_text(Ticket(MeshId(OURS), "home", OURS, bytes(16), tuple(scopes), 1_800_000_000))

    def only_near(self) -> str:
        return self.near

    async def withdraw_tickets(self) -> int:
        await trio.lowlevel.checkpoint()
        return 3

    async def rejoin(self, wanted: str, name: str) -> MeshView:
        self.did.append(("rejoin", wanted, name))
        return await self.create(name or "home")

    async def join(self, ticket_text: str) -> MeshView:
        await trio.lowlevel.checkpoint()
        if self.now.mesh:
            raise NotAMember("the ticket is used up: ask for a new one")
        return await self.create(parse_ticket(ticket_text).mesh_name)

    async def revoke(self, peer_id: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        self.did.append(("revoke", peer_id))

    async def leave(self) -> None:
        await trio.lowlevel.checkpoint()
        self.now = MeshView(OPEN_MESH, "", False, SCOPES)


class FakeDraining:
    """Every node stands alike. ``refuse``: the answer of other nodes than ours."""

    def __init__(self) -> None:
        self.ending = False
        self.stand = DrainView()
        self.refuse: MeshmaxError | None = None
        self.said: list[tuple[str, PeerId, float]] = []

    async def drain(self, peer: PeerId, deadline_s: float) -> DrainView:
        self.stand = DrainView("draining", 2, deadline_s)
        return await self._answer("drain", peer, deadline_s)

    async def undrain(self, peer: PeerId) -> DrainView:
        self.stand = DrainView()
        return await self._answer("undrain", peer)

    async def view(self, peer: PeerId) -> DrainView:
        return await self._answer("view", peer)

    async def _answer(self, what: str, peer: PeerId, deadline_s: float = 0.0) -> DrainView:
        await trio.lowlevel.checkpoint()
        self.said.append((what, peer, deadline_s))
        if self.refuse and peer != OURS:
            raise self.refuse
        return self.stand


class FakeNode:
    """An ApiNode. Its attributes may be changed by a test."""

    def __init__(self, residency: ModelResidency, config: Config) -> None:
        self.config = config
        self.name = "desk"
        self.token = ""
        self.state: NodeState = "running"
        self.started_at_s = NOW_S - 1.5
        self.signer = SimpleNamespace(peer_id=OURS, sign=lambda data: data)
        self.catalog = FakeCatalog()
        self.pulls = FakePulls()
        self.leftovers = FakeLeftovers()
        self.distribution = FakeDistribution()
        self.fetchable = Fetchable(self.catalog, None, config.routing)
        self.first_moments = SimpleNamespace(left_s=lambda: 0.0)  # they are over
        self.ladder = FakeLadder()
        self.reachability = SimpleNamespace(view=Reachability(), udp_blocked=False)
        self.doctor = FakeDoctor()
        self.draining = FakeDraining()
        self.backends = Backends()
        self.router = FakeRouter(residency)
        self.residency = residency
        self.presence = FakePresence()
        self.swarm = FakeSwarm()
        self.store = SimpleNamespace(blobs=FakeBlobs())
        self.membership = FakeMembership()
        self.saved: list[Override] = []
        self.sought: list[str] = []
        self.farther: dict[str, CatalogEntry] = {}
        throttle = RateThrottle(Plan(config.limits), Override(), trio.current_time, lambda: (0, 0))
        self.limits = Limits(throttle, self._save_limits)

    async def seek(self, name: str, found: Callable[[], bool]) -> bool:
        """Farther away are the models of ``farther``."""
        await trio.sleep(0.5)
        self.sought.append(name)
        if (entry := self.farther.pop(name, None)) is not None:
            self.catalog.known.append(entry)
        return found()

    async def _save_limits(self, override: Override) -> None:
        await trio.lowlevel.checkpoint()
        self.saved.append(override)

    def now(self) -> float:
        return NOW_S

    def path_of(self, peer_id: PeerId) -> PathStory | None:
        return PathStory("direct after 0.05 s", 50.0, 50.0) if peer_id == THEIRS else None

    def resources(self) -> dict[str, Any]:
        return {"cpu_percent": 1.0, "memory_bytes": 1, "memory_total_bytes": 2, "disk_free_bytes": 3, "gpus": []}


@asynccontextmanager
async def open_fake_node(**config: Any) -> AsyncIterator[Any]:
    """A fake node; its engine makes ten tokens a second, in virtual time."""

    async def model_file(digest: Sha256) -> ModelFile:
        await trio.lowlevel.checkpoint()
        return ModelFile(digest, "echo:latest", "/nowhere", 1000, details("completion"))

    engine = EngineConfig(kind="echo", **({"echo_tokens_per_s": 10.0} | config.pop("engine", {})))
    echo = EchoEngine(engine)
    async with open_residency(echo, model_file, engine, wall=lambda: NOW_S) as residency:
        node = FakeNode(residency, Config(engine=engine, **config))
        node.engine = echo  # type: ignore[attr-defined]
        yield node
