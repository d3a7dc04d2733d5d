"""What a model is, asked of a peer and told to one: both ends of ``/meshmax/model/1.0.0``.

The server answers from the stores. The askers check everything that can be checked: the manifest's sha256 is the digest
asked for; the record, if there is one, is signed by its publisher, names this manifest and has a chunk map for each blob;
a map's bytes have the address asked for and are of the blob that they are to describe (of a map that nobody signed, only
the blob's own sha256 can tell whether it is true). What fails a check is an error that names the
peer's fault, and the caller asks another peer. Not here: which peer to ask, whether a publisher is trusted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeVar

import msgspec
import trio

from meshmax.base.catalog import ModelDescription
from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    ManifestInvalid,
    MeshmaxError,
    ModelNotFound,
    NotOffered,
    PeerGone,
    RemoteProtocolError,
)
from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.model import ChunkMap, Layer, Manifest, ModelRecord, Signed
from meshmax.base.names import parse_name
from meshmax.ports import BlobStore, ModelStore, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.wire import model as wire
from meshmax.wire.chunkmap import decode_map, encode_map, map_address
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.manifest import parse_manifest
from meshmax.wire.protocols import MODEL
from meshmax.wire.signed import MODEL_RECORD_DOMAIN, verify

MAX_REQUESTS: Final = 32  # answered at once, in all; a map of 64 MiB may be in memory for each
MAX_REQUESTS_PER_PEER: Final = (
    8  # of those; a pull asks one peer for one thing at a time, and one peer must not take all
)
REPLY_TIMEOUT_S: Final = 10.0  # for one message, either way; a map's parts are half a MiB each

R = TypeVar("R", wire.RecordReply, wire.ManifestReply, wire.MapPart, wire.DescribeReply, wire.DownloadReply)
Guard = Callable[[PeerId, wire.FromAsker], None]  # raises OutOfScope, NotAMember
Describe = Callable[[Sha256], Awaitable[ModelDescription]]  # raises ModelNotFound, EngineError
Accept = Callable[[PeerId, str, Sha256], Awaitable[str]]  # who asks us to pull what, by which name: the transfer's id


class FetchedModel(msgspec.Struct, frozen=True):
    """A model as its holder tells it, checked: ``record`` is what ``signed`` says; both None where nobody signed one."""

    manifest: Manifest
    record: ModelRecord | None
    signed: Signed | None


class ModelServer:
    """Answers from ``models`` and ``blobs``; ``pulling`` knows the models of which we have only some yet.

    ``accept`` decides whether we pull what a peer asks us to; it raises Refused or Busy, or gives the transfer's id.
    ``guard`` decides who may ask for what (services.guards). ``describe``: asked of models that are not in the store; it
    raises ModelNotFound.
    """

    def __init__(
        self,
        models: ModelStore,
        blobs: BlobStore,
        pulling: Callable[[Sha256], FetchedModel | None] = lambda digest: None,
        accept: Accept | None = None,
        guard: Guard = lambda peer, request: None,
        describe: Describe | None = None,
    ) -> None:
        self._accept, self._guard, self._describe = accept, guard, describe
        self._models = models
        self._blobs = blobs
        self._pulling = pulling
        self._running: Counter[PeerId] = Counter()

    def register(self, swarm: Swarm) -> None:
        """Serve on ``swarm`` from now on."""
        swarm.serve(MODEL, self.answer)

    async def answer(self, stream: Stream) -> None:
        """One request. Raises PeerGone, RemoteProtocolError."""
        frames = FrameStream(stream)
        with _in_time("the peer opened a stream and asked for nothing"):
            request = await frames.receive(wire.FROM_ASKER)
        peer = stream.peer
        if self._running[peer] >= MAX_REQUESTS_PER_PEER or self._running.total() >= MAX_REQUESTS:
            await _send(frames, failure_of(Busy("this peer answers as many as it can")))
            return
        self._running[peer] += 1
        try:
            self._guard(peer, request)
            await self._answer(frames, request)
        except (PeerGone, RemoteProtocolError):
            raise
        except MeshmaxError as error:
            await _send(frames, failure_of(error))
        finally:
            self._running[peer] -= 1
            if not self._running[peer]:
                del self._running[peer]

    async def _answer(self, frames: FrameStream, request: wire.FromAsker) -> None:
        match request:
            case wire.GetModel():
                signed, raw = await self._find(request)
                await _send(frames, wire.RecordReply(signed))
                await _send(frames, wire.ManifestReply(raw))
            case wire.GetMap(address=address):
                encoding = await self._blobs.read_map(MapAddress(address))
                await _send_map(frames, encoding, f"chunk map {address[:12]} is not here")
            case wire.GetBlobMap(digest=digest):
                await _send_map(frames, await self._map_of(Sha256(digest)), f"blob {digest[:12]} is not here")
            case wire.Download(digest=digest, name=name):
                if self._accept is None:
                    raise NotOffered("this peer pulls nothing for others")
                await _send(frames, wire.DownloadReply(await self._accept(frames.stream.peer, name, Sha256(digest))))
            case wire.Describe(digest=digest):
                await _send(frames, wire.describe_reply(await self._description(Sha256(digest))))

    async def _description(self, digest: Sha256) -> ModelDescription:
        try:
            return await self._models.describe(digest)
        except ModelNotFound:
            if self._describe is None:
                raise
        with trio.move_on_after(REPLY_TIMEOUT_S / 2):
            return await self._describe(digest)
        raise Busy("the engine that brings this model along does not answer")

    async def _map_of(self, digest: Sha256) -> bytes | None:
        """The map of a blob that is whole, whose sha256 was computed: of one in the making we would pass on a lie."""
        await self._blobs.path(digest)
        known = await self._blobs.haves(digest)
        return encode_map(known[0]) if known else None

    async def _find(self, request: wire.GetModel) -> tuple[Signed | None, bytes]:
        key = parse_name(request.name).key if request.digest is None else ""
        found = [
            stored
            for stored in await self._models.models()
            if (stored.manifest.digest == request.digest if request.digest else parse_name(stored.name).key == key)
        ]
        if found:
            stored = next((stored for stored in found if stored.record), found[0])
            return stored.record, stored.manifest.raw
        pulled = self._pulling(Sha256(request.digest)) if request.digest else None
        if pulled is None:
            raise ModelNotFound(f"model '{(request.digest or request.name)[:100]}' is not here")
        return pulled.signed, pulled.manifest.raw


async def fetch_model(swarm: Swarm, peer: PeerId, digest: Sha256) -> FetchedModel:
    """Manifest and signed record of the model ``digest``, asked of ``peer``.

    Raises ModelNotFound, Busy..., ManifestInvalid (a check failed), RemoteProtocolError, PeerGone, VersionMismatch.
    """
    async with _ask(swarm, peer, wire.GetModel(digest)) as frames:
        record = await _receive(frames, wire.RecordReply)
        manifest = parse_manifest((await _receive(frames, wire.ManifestReply)).manifest)
    if manifest.digest != digest:
        raise ManifestInvalid("the peer sent another manifest than the one asked for")
    if record.record is None:
        return FetchedModel(manifest, None, None)
    return FetchedModel(manifest, check_record(record.record, manifest), record.record)


def check_record(signed: Signed, manifest: Manifest) -> ModelRecord:
    """The record in ``signed``, if it is signed by its publisher and covers ``manifest``. Raises ManifestInvalid."""
    record = verify(MODEL_RECORD_DOMAIN, signed, ModelRecord)
    if record.publisher != signed.signer:
        raise ManifestInvalid("the model record is signed by somebody else than its publisher")
    if record.manifest != manifest.digest:
        raise ManifestInvalid("the model record is about another manifest")
    if any(blob.digest not in record.chunk_maps for blob in manifest.blobs):
        raise ManifestInvalid("the model record has no chunk map for a blob of the model")
    return record


async def fetch_map(swarm: Swarm, peer: PeerId, address: MapAddress, layer: Layer) -> ChunkMap:
    """The chunk map at ``address``, which must be of the blob ``layer``, asked of ``peer``. Errors as `fetch_model`."""
    encoding = await _fetch_map(swarm, peer, wire.GetMap(address), layer)
    if map_address(encoding) != address:
        raise ManifestInvalid("the peer sent another chunk map than the one asked for")
    return _checked_map(encoding, layer)


async def fetch_blob_map(swarm: Swarm, peer: PeerId, layer: Layer) -> ChunkMap:
    """The chunk map by which ``peer`` serves the blob ``layer``: nobody vouches for it. Errors as `fetch_model`."""
    return _checked_map(await _fetch_map(swarm, peer, wire.GetBlobMap(layer.digest), layer), layer)


async def _fetch_map(swarm: Swarm, peer: PeerId, request: wire.GetMap | wire.GetBlobMap, layer: Layer) -> bytes:
    most = wire.max_map_bytes(layer.size)
    encoding = bytearray()
    last = False
    async with _ask(swarm, peer, request) as frames:
        while not last:
            part = await _receive(frames, wire.MapPart)
            encoding += part.data
            last = part.last
            if len(encoding) > most:
                raise RemoteProtocolError("the peer sent a chunk map that is too long for its blob")
    return bytes(encoding)


def _checked_map(encoding: bytes, layer: Layer) -> ChunkMap:
    chunk_map = decode_map(encoding)
    check_map(chunk_map, layer)
    return chunk_map


async def ask_download(swarm: Swarm, peer: PeerId, name: str, digest: Sha256) -> str:
    """Ask ``peer`` to pull the model ``digest`` under ``name``: its id of the transfer. Raises Refused, Busy, and as above."""
    async with _ask(swarm, peer, wire.Download(digest, name)) as frames:
        return (await _receive(frames, wire.DownloadReply)).transfer_id


def check_map(chunk_map: ChunkMap, layer: Layer) -> None:
    """Raise ManifestInvalid unless ``chunk_map`` is of the blob ``layer``."""
    if chunk_map.sha256 != layer.digest or chunk_map.size != layer.size:
        raise ManifestInvalid(f"the chunk map of blob {layer.digest[:12]} is of another blob")


async def describe(swarm: Swarm, peer: PeerId, digest: Sha256) -> ModelDescription:
    """What ``peer`` says of the model ``digest``. Errors as `fetch_model`."""
    async with _ask(swarm, peer, wire.Describe(digest)) as frames:
        description = wire.description_of(await _receive(frames, wire.DescribeReply))
    if description.digest != digest:
        raise RemoteProtocolError("the peer described another model than the one asked for")
    return description


@asynccontextmanager
async def _ask(swarm: Swarm, peer: PeerId, request: wire.FromAsker) -> AsyncIterator[FrameStream]:
    stream = await swarm.open_stream(peer, MODEL)
    try:
        frames = FrameStream(stream)
        with _in_time("the peer does not read"):
            await frames.send(wire.FROM_ASKER, request)
            await stream.send_eof()
        yield frames
        await stream.aclose()
    finally:
        with trio.CancelScope(shield=True):
            await stream.reset()


async def _receive(frames: FrameStream, reply: type[R]) -> R:
    with _in_time("the peer did not answer in time"):
        message = await frames.receive(wire.FROM_HOLDER)
    if isinstance(message, Failure):
        raise error_of(message)
    if not isinstance(message, reply):
        raise RemoteProtocolError("the peer sent an answer to something else")
    return message


async def _send_map(frames: FrameStream, encoding: bytes | None, otherwise: str) -> None:
    if not encoding:
        raise BlobNotFound(otherwise)
    for offset in range(0, len(encoding), wire.MAP_PART_BYTES):
        end = offset + wire.MAP_PART_BYTES
        await _send(frames, wire.MapPart(encoding[offset:end], last=end >= len(encoding)))


async def _send(frames: FrameStream, message: wire.FromHolder) -> None:
    with _in_time("the peer stopped reading"):
        await frames.send(wire.FROM_HOLDER, message)


@contextmanager
def _in_time(otherwise: str) -> Iterator[None]:
    with trio.move_on_after(REPLY_TIMEOUT_S) as scope:
        yield
    if scope.cancelled_caught:
        raise PeerGone(otherwise)
