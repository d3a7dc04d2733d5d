"""The Protocols between services and the world, and between faces and services: three to six methods each.

Adapters (net, store, engine) and fakes (testing) satisfy the first group and are held to one contract suite per port
(tests/contracts). Services satisfy the second group; node.py joins them. An async method may be cancelled at any await
and then leaves nothing half done that a later call cannot see. Errors are those of base.errors only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import msgspec
import trio

from meshmax.base.catalog import CatalogEntry, LoadedView, ModelDescription, ModelFile, Resolved
from meshmax.base.errors import MeshmaxError, StoreError
from meshmax.base.events import Transfer
from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.inference import Ask, Event, InferRequest
from meshmax.base.model import ChunkMap, Haves, Manifest, Signed, StoredModel
from meshmax.base.names import ModelName
from meshmax.base.route import Route
from meshmax.base.status import Device, Gpu, Load, PeerView, Speed
from meshmax.wire.lane import LaneAsk, LaneGrant

T = TypeVar("T")

# --- small things that several ports use ----------------------------------------------------------------------------


class Signer(Protocol):
    """Our identity: signs without showing the key."""

    @property
    def peer_id(self) -> PeerId:
        """Who this is."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``data``."""
        ...


class RunSync(Protocol):
    """How blocking work is run: in a thread under a named limiter, or in place (simulated nodes own no threads)."""

    async def __call__(self, work: Callable[[], T], /) -> T:
        """The result of ``work``, which is not interrupted by cancellation."""
        ...


Progress = Callable[[int, int], None]  # (bytes done, bytes in all); called from any thread, cheap, never raises

# --- net -------------------------------------------------------------------------------------------------------------


class Stream(Protocol):
    """A byte stream to a peer whose PeerId the connection has proved. One reader and one writer at a time."""

    @property
    def peer(self) -> PeerId:
        """Whose stream this is."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes:
        """1 to ``max_bytes`` bytes, or b"" at the end. Raises PeerGone when the stream was reset or the peer is lost."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send everything. Cancelling it may cost this stream (reset it then), never the connection. Raises PeerGone."""
        ...

    async def send_eof(self) -> None:
        """We send no more; the other direction stays open."""
        ...

    async def reset(self) -> None:
        """Give the stream up in both directions at once; idempotent, never raises."""
        ...

    async def aclose(self) -> None:
        """Close both directions in order; idempotent, never raises; does not block for long on a stalled peer."""
        ...


class ConnectionView(msgspec.Struct, frozen=True):
    """A connection as it is: the remote's address (multiaddr without /p2p), who dialled, since when (Unix time)."""

    peer_id: PeerId
    address: str
    direction: Literal["in", "out"]
    opened_at_s: float


class SwarmEvent(msgspec.Struct, frozen=True):
    """A peer got its first connection to us, or lost its last one."""

    peer_id: PeerId
    kind: Literal["connected", "disconnected"]


class Swarm(Protocol):
    """Authenticated connections to peers and streams over them. The only place that knows libp2p is its adapter."""

    @property
    def peer_id(self) -> PeerId:
        """Who this is."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Dialable multiaddrs of ours, each ending in /p2p/<PeerId>."""
        ...

    async def dial(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Connect, racing ``addresses`` (at most 16; the first to authenticate wins); returns at once if connected.

        Raises ConnectError with every attempt. A peer that failed before is tried again. Deadlines are the caller's.
        """
        ...

    async def open_stream(self, peer_id: PeerId, protocol: str) -> Stream:
        """A new stream on an existing connection. Raises PeerGone, VersionMismatch if the peer does not serve ``protocol``."""
        ...

    def serve(self, protocol: str, answer: Callable[[Stream], Awaitable[None]]) -> None:
        """Run ``answer`` in a task of its own for each stream that peers open; its errors are logged, the stream then reset.

        Streams at once are bounded per peer and in all; those beyond are reset.
        """
        ...

    async def disconnect(self, peer_id: PeerId) -> None:
        """Close every connection to the peer; stalled writers included. No error if there is none."""
        ...

    def connections(self) -> Mapping[PeerId, ConnectionView]:
        """One connection per peer that is connected now."""
        ...

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[SwarmEvent]]:
        """Events from now on, peers that are connected already first, as "connected"; a slow reader misses none."""
        ...


class Sighting(msgspec.Struct, frozen=True):
    """Somebody said that a peer can be reached at these multiaddrs (each may end in /p2p/<PeerId>). Not yet believed."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    source: Literal["mdns", "static", "cached", "gossip", "rendezvous", "dht"]


class Discovery(Protocol):
    """One rung of the discovery ladder."""

    @property
    def name(self) -> str:
        """What it is called in logs and messages."""
        ...

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """Look for peers, and let ourselves be found, until cancelled. Repeats itself; recovers from network errors."""
        ...


# --- blob lanes ------------------------------------------------------------------------------------------------------


class LaneArrived(msgspec.Struct, frozen=True):
    """The sink took the chunk; ``size`` bytes of data."""

    digest: Sha256
    index: int
    size: int


class LaneBad(msgspec.Struct, frozen=True):
    """The sink refused the chunk (ChunkMismatch); ``size`` bytes came for nothing."""

    digest: Sha256
    index: int
    size: int


class LaneLacking(msgspec.Struct, frozen=True):
    """The peer does not have the chunk."""

    digest: Sha256
    index: int


class LaneBusy(msgspec.Struct, frozen=True):
    """The peer does not serve the chunk now; ask again in ``retry_after_s``."""

    digest: Sha256
    index: int
    retry_after_s: float


class LaneCancelled(msgspec.Struct, frozen=True):
    """As asked, the chunk will not come."""

    digest: Sha256
    index: int


class LaneStoreFailed(msgspec.Struct, frozen=True):
    """The sink could not write the chunk (a StoreError, StoreFull among them); the lane goes on."""

    digest: Sha256
    index: int
    error: StoreError


LaneEvent: TypeAlias = LaneArrived | LaneBad | LaneLacking | LaneBusy | LaneCancelled | LaneStoreFailed


class FetchLane(Protocol):
    """The fetching end of a connection beside the control connection, keyed and proved by both ends.

    Every want gets exactly one last word, an event, unless the lane ends before. `want`, `cancel` and `close` belong to
    trio's thread; one worker thread lives while `run` does.
    """

    @property
    def peer(self) -> PeerId:
        """Whose lane this is."""
        ...

    def want(self, digest: Sha256, indexes: Sequence[int]) -> None:
        """Ask for chunks, at most wire.lane.MAX_WANTS unanswered at once. Never blocks. Raises PeerGone once the lane has
        ended or does not take it, LocalProtocolError beyond the bounds."""
        ...

    def cancel(self, digest: Sha256, index: int) -> None:
        """A chunk is no longer wanted; its last word still comes, and may be that it arrived. No error if the lane has ended."""
        ...

    def close(self) -> None:
        """End the lane now; idempotent. Wakes the worker thread, wherever it waits."""
        ...

    def pause(self, seconds: float) -> None:
        """Worker thread only (a sink that keeps to a limit): wait. Raises PeerGone at once when the lane is closed."""
        ...

    async def run(self, sink: Callable[[Sha256, int, memoryview], None], tell: Callable[[LaneEvent], None]) -> None:
        """Fetch until the lane is closed by either end in order (returns) or lost. Once only; `close` is implied.

        ``sink(digest, index, data)`` runs in the worker thread: verifies and writes, keeps no reference to ``data``; raises
        ChunkMismatch or StoreError. ``tell`` runs in this task, in order. Raises PeerGone, RemoteProtocolError. Cancelling
        ends the thread before it returns, in milliseconds if ``sink`` takes no longer.
        """
        ...


class ServeLane(Protocol):
    """The serving end."""

    @property
    def peer(self) -> PeerId:
        """Whose lane this is."""
        ...

    @property
    def sending_s(self) -> float:
        """Seconds spent so far in sending, as against reading and waiting for wants: how loaded our end is."""
        ...

    def close(self) -> None:
        """As FetchLane.close."""
        ...

    def pause(self, seconds: float) -> None:
        """As FetchLane.pause, for a ``read`` that keeps to a limit."""
        ...

    async def run(self, read: Callable[[Sha256, int, memoryview], int]) -> None:
        """Serve until the lane is closed by either end in order (returns) or lost. Once only; `close` is implied.

        ``read(digest, index, buffer)`` runs in the worker thread: puts a verified chunk into ``buffer`` (1 MiB) and returns its
        length; raises BlobNotFound or StoreError (told as lacking) or Busy. Raises PeerGone, RemoteProtocolError. Cancelling:
        as FetchLane.run.
        """
        ...


class ExpectedLane(Protocol):
    """A lane whose fetcher has not come yet."""

    @property
    def grant(self) -> LaneGrant:
        """What the fetcher is to be told, inside the control connection."""
        ...

    async def arrive(self) -> ServeLane:
        """Wait until the fetcher has proved the key. Raises PeerGone when it did not in time, or is cut off meanwhile."""
        ...


class Lanes(Protocol):
    """Opens lanes, both ways. Bounded: MAX_LANES in all, MAX_LANES_PER_PEER a peer and direction."""

    @property
    def port(self) -> int:
        """Where fetchers connect; 0: nowhere, and `expect` refuses."""
        ...

    def ask(self) -> LaneAsk:
        """A fresh secret and our ciphers, for one lane; say it inside the control connection."""
        ...

    def expect(self, peer: PeerId, ask: LaneAsk) -> AbstractContextManager[ExpectedLane]:
        """Let ``peer`` come once within LANE_WAIT_S; leaving the block before it came takes that back; it does not close a lane.

        Raises Busy (bounds), NotOffered (no port), RemoteProtocolError (no cipher in common).
        """
        ...

    async def connect(self, peer: PeerId, ip: str, ask: LaneAsk, grant: LaneGrant) -> FetchLane:
        """Connect to ``ip``, prove the key, be proved to. Deadlines are the caller's; cancelling leaves nothing open. The lane
        must be `run` or closed. Raises ConnectError, RemoteProtocolError (a grant that does not fit), Busy (bounds)."""
        ...

    def close_peer(self, peer: PeerId) -> None:
        """Close every lane with ``peer`` at once and expect none: its last control connection or its membership has ended."""
        ...


class Throttle(Protocol):
    """Limits on moving blobs, each way, in all and a peer."""

    def reserve(self, peer: PeerId, direction: Literal["in", "out"], size: int) -> float:
        """Seconds to wait before ``size`` bytes may move; they count at once. 0.0 while nothing is limited. Any thread, cheap."""
        ...


# --- store -----------------------------------------------------------------------------------------------------------


class ChunkWriter(Protocol):
    """Writes chunks from threads of the caller's own, as blob lanes do, into a partial that its owner keeps open meanwhile."""

    def write_blocking(self, index: int, data: bytes | memoryview) -> None:
        """Verify ``data``, which may be reused afterwards, and put it in its place. Blocks; any thread, several at once.

        It is not marked as there until the owner calls `written`. Raises ChunkMismatch, StoreFull, StoreError.
        """
        ...

    def written(self, index: int) -> None:
        """`write_blocking` has put chunk ``index`` in its place. Called by the owner, in trio's thread."""
        ...


class ChunkReader(Protocol):
    """Reads chunks in threads of the caller's own, as blob lanes do."""

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """Read a verified chunk into ``buffer`` (room for 1 MiB): its length. Blocks; any thread, several at once.

        An adopted blob has no chunks here until somebody has asked for its `haves`. Raises BlobNotFound, StoreCorrupt (and
        offers that chunk no more), StoreError. What ``buffer`` holds after an error is not to be used.
        """
        ...


class ChunkSource(Protocol):
    """Chunks on this machine that are not in the store, such as a bundle on a stick: one more source of a pull."""

    @property
    def name(self) -> str:
        """What it is called among the sources of a transfer."""
        ...

    async def haves(self, digest: Sha256) -> Haves | None:
        """Which chunks of the blob it has; None: nothing of it, or not of that shape."""
        ...

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """A chunk, which is verified by who asks. Raises BlobNotFound, StoreError."""
        ...


class Partial(ChunkWriter, Protocol):
    """A blob being fetched. Owned by one task at a time; chunks written survive kill -9 once `write` has returned and the
    bitmap was synced (at least once a second and at close)."""

    @property
    def chunk_map(self) -> ChunkMap:
        """What the blob must be."""
        ...

    @property
    def haves(self) -> Haves:
        """Which chunks are in their place."""
        ...

    async def write(self, index: int, data: bytes) -> None:
        """Verify ``data`` against the map, put it in its place, mark it. Raises ChunkMismatch, StoreFull, StoreError."""
        ...

    async def finish(self) -> None:
        """Every chunk is there: sync and rename into place. Raises StoreError."""
        ...

    async def discard(self) -> None:
        """Delete what was fetched (its map was a lie)."""
        ...

    async def aclose(self) -> None:
        """Sync bitmap and data, let go; a later `open_partial` goes on from there. Idempotent."""
        ...


class BlobStore(ChunkReader, Protocol):
    """Blobs, whole or partial, with their chunk maps. Every chunk read is verified first."""

    async def haves(self, digest: Sha256) -> tuple[ChunkMap, Haves] | None:
        """The chunk map of a blob and which chunks we can serve; None if we have nothing of it."""
        ...

    async def read_chunk(self, digest: Sha256, index: int) -> bytes:
        """A verified chunk. Raises BlobNotFound (not here, or not yet), StoreCorrupt (and offers that chunk no more)."""
        ...

    async def read_map(self, address: MapAddress) -> bytes | None:
        """The canonical encoding of the chunk map at ``address``, or None."""
        ...

    async def open_partial(self, chunk_map: ChunkMap) -> Partial:
        """Create or resume fetching a blob. Raises StoreFull when it cannot fit, StoreError if it is open already."""
        ...

    async def path(self, digest: Sha256) -> Path:
        """The file of a whole blob; its size and time stamp are checked. Raises BlobNotFound, StoreCorrupt."""
        ...

    async def verify(self, digest: Sha256) -> Haves:
        """Check every chunk on disk. A whole blob with bad chunks becomes a partial without them. Raises BlobNotFound."""
        ...


class Naming(Protocol):
    """What lets names mean models: a ModelStore, or the catalog, which keeps what may be the last copy of another."""

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """As ModelStore.put."""
        ...


class ModelStore(Protocol):
    """Names and manifests over a BlobStore, in Ollama's layout."""

    async def models(self) -> tuple[StoredModel, ...]:
        """Every model that is whole here, newest first. A manifest whose blobs are missing is left out and logged."""
        ...

    async def ingest(self, path: Path, link: bool, progress: Progress) -> Manifest:
        """Take a GGUF file in (reflink or copy; hard link if ``link``) and write its blobs and maps; no name points at it yet.

        Raises InvalidRequest (not a GGUF, truncated), StoreFull. The file is left as it is.
        """
        ...

    async def put(self, name: ModelName, raw_manifest: bytes, record: Signed | None) -> StoredModel:
        """Let ``name`` mean this manifest, whose blobs are all whole. An existing spelling of the name is kept.

        Raises ManifestInvalid, BlobNotFound.
        """
        ...

    async def copy(self, source: ModelName, destination: ModelName) -> None:
        """Let ``destination`` mean what ``source`` means. Raises ModelNotFound."""
        ...

    async def delete(self, name: ModelName) -> None:
        """Forget a name, and every blob that no manifest refers to any more. Raises ModelNotFound."""
        ...

    async def describe(self, digest: Sha256, verbose: bool = False) -> ModelDescription:
        """What the model says of itself; ``verbose``: with its tensors and long arrays, too large for a peer.

        Raises ModelNotFound.
        """
        ...


# --- engine ----------------------------------------------------------------------------------------------------------


class LoadedFacts(msgspec.Struct, frozen=True):
    """How a model was loaded. Sizes in bytes; ``parallel`` answers at once."""

    size: int
    size_vram: int
    context_length: int
    device: Device
    parallel: int


class LoadedModel(Protocol):
    """A model in memory."""

    @property
    def facts(self) -> LoadedFacts:
        """How it was loaded."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine's process has ended."""
        ...

    def answer(self, request: InferRequest) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The answer's events; the last is a Finish. Leaving the block early stops the engine's work within a second.

        Raises CapabilityMissing, ContextTooLong, InvalidRequest before the first event, EngineCrashed at any time.
        """
        ...


class Engine(Protocol):
    """Something that runs models."""

    @property
    def name(self) -> str:
        """What it is called in logs and messages."""
        ...

    async def devices(self) -> tuple[Gpu, ...]:
        """The GPUs that this engine can really use; () is an answer."""
        ...

    def open_model(self, model: ModelFile) -> AbstractAsyncContextManager[LoadedModel]:
        """Load a model; leaving the block unloads it and ends every process it had. Raises EngineUnavailable, EngineCrashed."""
        ...


# --- services, as faces and other services see them --------------------------------------------------------------------


class Catalog(Protocol):
    """Names: what is here and what the mesh has."""

    def entries(self) -> tuple[CatalogEntry, ...]:
        """Every model, local and remote, newest first."""
        ...

    def resolve(self, name: str, *, parts: bool = False) -> Resolved:
        """What ``name`` (or NAME@DIGEST) means: ours first, then the newest record or the digest first seen in the mesh.

        ``parts``: a model that nobody has whole, but somebody in parts, will do (for a pull). Raises InvalidName,
        ModelNotFound.
        """
        ...

    async def describe(self, name: str, verbose: bool = False) -> ModelDescription:
        """From our store, which alone can be ``verbose``, or asked of a holder.

        Raises InvalidName, ModelNotFound, NoProviders.
        """
        ...

    async def copy(self, source: str, destination: str) -> StoredModel:
        """Local models only, the source also as NAME@DIGEST. Raises InvalidName, ModelNotFound."""
        ...

    async def delete(self, name: str) -> None:
        """Local names only. Raises InvalidName, ModelNotFound."""
        ...

    async def add(self, name: str, path: Path, link: bool, progress: Progress) -> StoredModel:
        """Ingest a GGUF file, sign a model record, tell the mesh. Raises InvalidName, InvalidRequest, StoreFull."""
        ...


class Pulls(Protocol):
    """Transfers of models to here."""

    def open_pull(self, name: str) -> AbstractAsyncContextManager[AsyncIterator[Transfer]]:
        """Pull a model (or join the pull that is under way) and watch it; the last value has a final state.

        Leaving the block is not an error: when the last watcher leaves, the transfer is cancelled and the partials are kept.
        Raises InvalidName, NoProviders before the first value; later failures are a Transfer with state "failed".
        """
        ...

    async def start_download(self, name: str) -> Transfer:
        """Pull a model in the background, to the end, over restarts; a pull under way is made such a one.

        Raises InvalidName, NoProviders, Busy.
        """
        ...

    def transfers(self) -> tuple[Transfer, ...]:
        """Running ones and the last 100 ended ones, newest first; then what is sent to others, likewise."""
        ...

    async def steer(self, transfer_id: str, action: Literal["cancel", "pause", "resume"]) -> Transfer:
        """Steer a pull that is under way. Raises NotFound, InvalidRequest (it has ended, or is an outgoing one)."""
        ...


class Distribution(Protocol):
    """Asks other peers to pull a model."""

    async def distribute(self, name: str, peers: Sequence[PeerId]) -> Mapping[PeerId, str | MeshmaxError]:
        """Ask each of ``peers``: the id of its transfer, or why not. Raises InvalidName, ModelNotFound."""
        ...

    async def replicate(self, name: str, replicas: int) -> Mapping[PeerId, str | MeshmaxError]:
        """Ask as many as it takes until ``replicas`` peers have the model; none where they do already.

        Raises NotFound (there are not so many), InvalidName, ModelNotFound.
        """
        ...


class Answer(Protocol):
    """An answer under way. ``route`` is final once the first event is there; `events` ends with a Finish."""

    @property
    def route(self) -> Route:
        """The decision; final once the first event is there."""
        ...

    @property
    def events(self) -> AsyncIterator[Event]:
        """The answer's events; the last is a Finish."""
        ...


class Router(Protocol):
    """Sends each request to the peer that will answer it soonest."""

    def open_answer(self, ask: Ask) -> AbstractAsyncContextManager[Answer]:
        """Entered when the first event is there (or the request has failed everywhere); leaving early cancels remote work.

        Raises ModelNotFound, NoProviders, Busy, EngineError...: what the best peer said, when nobody could.
        """
        ...

    def routes(self) -> tuple[Route, ...]:
        """The last 200 decisions, newest first; never a word of the prompt."""
        ...


class Residency(Protocol):
    """Models in this node's memory, and who may use them."""

    def open_answer(self, ask: Ask) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Load if needed, wait for a slot, answer. A load-only request yields one Finish ("load" or "unload").

        Raises ModelNotFound, Busy, EngineError.
        """
        ...

    def loaded(self) -> tuple[LoadedView, ...]:
        """Models in memory, longest remaining first."""
        ...

    def load(self) -> Load:
        """Prompts running and queued now."""
        ...

    def speed(self, digest: Sha256) -> Speed:
        """What was measured of a model here, loaded now or not."""
        ...

    async def unload(self, digest: Sha256) -> None:
        """Unload when its running answers have ended; does not wait for that. No error if it is not loaded."""
        ...


class Presence(Protocol):
    """Who is there."""

    def peers(self) -> tuple[PeerView, ...]:
        """Ourselves first, then online peers by round trip, then those that left within the last minute."""
        ...

    def view(self, peer_id: PeerId) -> PeerView | None:
        """One peer, ourselves too; None if unknown."""
        ...
