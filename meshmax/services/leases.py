"""Leases between peers: both ends of ``/meshmax/lease/1.0.0``, around one core.lease.LeaseTable.

The holder answers only when its copy is whole, the asker's probes are answered from the disk and no rule of the core speaks
against it. The asker takes one holder after the other, checks the proof against its own copy, and counts whoever is silent,
refuses, breaks the protocol or proves nothing as no holder. Not here: the rules (core.lease), what is swept (core.sweep).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    IntegrityError,
    MeshmaxError,
    NoProviders,
    NotFound,
    PeerGone,
    Refused,
    RemoteProtocolError,
    StoreError,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, Manifest, StoredModel
from meshmax.core.lease import LeaseTable
from meshmax.ports import BlobStore, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.telemetry.log import get_logger
from meshmax.wire import lease as wire
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.protocols import LEASE

PROBES: Final = 4  # chunks, chosen anew for each holder: who lacks a tenth of a model is found out in every third sweep
MAX_ASKED: Final = 8  # holders asked for one model before it stays
ASK_TIMEOUT_S: Final = 10.0  # for a holder's answer: some chunks read from a busy disk
REQUEST_TIMEOUT_S: Final = 10.0  # for an asker's message, and for it to take ours
DISTRUST_S: Final = 60.0  # how long a holder that was silent, or proved nothing, is not asked: it costs each model time
MAX_DISTRUSTED: Final = 256  # of those; the one noted longest ago is forgotten first
MAX_ANSWERS: Final = 8  # asks answered at once; each may hold eight chunks
MAX_ANSWERS_PER_PEER: Final = 2

_log = get_logger("leases")


class Lease:
    """A lease that we hold, or the word that none is needed; `Leases.open` gives it."""

    def __init__(self, table: LeaseTable, digest: Sha256, token: int, holder: PeerId | None, until_s: float) -> None:
        self.holder = holder
        self._table, self._digest, self._token, self._until_s = table, digest, token, until_s

    def commit(self) -> bool:
        """Whether our copy may be dropped now, which is to be done before the block of the lease is left."""
        return self._table.commit(self._digest, self._token, self._until_s, trio.current_time())


class Leases:
    """What this node has leased to others, and how it gets leases. ``local``: the models that are whole here."""

    def __init__(self, swarm: Swarm, blobs: BlobStore, local: Callable[[], Sequence[StoredModel]]) -> None:
        self._swarm = swarm
        self._blobs = blobs
        self._local = local
        self._table = LeaseTable(swarm.peer_id)
        self._answering: Counter[PeerId] = Counter()
        self._distrusted: dict[PeerId, float] = {}  # until when
        # How holders are reached; None: by dialling alone.
        self.connect: Callable[[PeerId, Sequence[str]], Awaitable[None]] | None = None

    def register(self) -> None:
        """Serve from now on."""
        self._swarm.serve(LEASE, self.answer)

    # --- the asker's end ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, manifest: Manifest, holders: Mapping[PeerId, tuple[str, ...]] | None) -> AsyncIterator[Lease]:
        """A lease on the model, asked of ``holders`` (None: the model may go without one).

        Raises Refused (somebody relies on our copy), NoProviders that says what each holder answered, StoreError (our own
        copy cannot be read).
        """
        digest = manifest.digest
        token = self._table.begin(digest, trio.current_time())
        try:
            if holders is None:
                await trio.lowlevel.checkpoint()
                yield Lease(self._table, digest, token, None, float("inf"))
            else:
                holder, until_s = await self._ask_holders(manifest, holders, token)
                yield Lease(self._table, digest, token, holder, until_s)
        finally:
            self._table.end(digest, token)

    async def _ask_holders(
        self, manifest: Manifest, holders: Mapping[PeerId, tuple[str, ...]], token: int
    ) -> tuple[PeerId, float]:
        failures: list[str] = []
        trusted = [peer for peer in holders if self._distrusted.get(peer, 0.0) <= trio.current_time()]
        for peer in trusted[:MAX_ASKED]:
            asked_s = trio.current_time()
            try:
                seconds = await self._ask(peer, holders[peer], manifest)
            except StoreError:
                raise
            except MeshmaxError as error:
                if not isinstance(error, (Refused, NotFound)):
                    self._distrust(peer)
                _log.info("no lease", peer=peer, model=manifest.digest[:12], code=error.code, error=error.message)
                failures.append(f"{peer}: {error.message}")
                if not self._table.intends(manifest.digest, token):
                    raise NoProviders("another peer drops its copy and relies on this one") from None
                continue
            return peer, asked_s + seconds
        raise NoProviders("no other peer vouches for its copy: " + ("; ".join(failures)[:500] or "none is known"))

    def _distrust(self, peer: PeerId) -> None:
        self._distrusted.pop(peer, None)
        while len(self._distrusted) >= MAX_DISTRUSTED:
            del self._distrusted[next(iter(self._distrusted))]
        self._distrusted[peer] = trio.current_time() + DISTRUST_S

    async def _ask(self, peer: PeerId, addresses: Sequence[str], manifest: Manifest) -> float:
        """The seconds for which ``peer`` keeps its copy. Raises what went wrong."""
        nonce, probes = secrets.token_bytes(wire.NONCE_BYTES), choose_probes(manifest)
        expected = wire.proof_of(nonce, manifest.digest, await self._read(probes))
        reply: wire.FromHolder | None = None
        with trio.move_on_after(ASK_TIMEOUT_S):
            await (self.connect or self._swarm.dial)(peer, addresses)
            stream = await self._swarm.open_stream(peer, LEASE)
            try:
                frames = FrameStream(stream)
                await frames.send(wire.FROM_ASKER, wire.LeaseAsk(manifest.digest, nonce, probes))
                reply = await frames.receive(wire.FROM_HOLDER)
            finally:
                with trio.CancelScope(shield=True):  # does not block
                    await stream.reset()
        if reply is None:
            raise PeerGone(f"it did not answer within {ASK_TIMEOUT_S:g} s")
        if isinstance(reply, Failure):
            raise _as_refusal(error_of(reply))
        if not secrets.compare_digest(reply.proof, expected):
            raise IntegrityError("it does not have what it says")
        return reply.seconds

    # --- the holder's end --------------------------------------------------------------------------------------------

    async def answer(self, stream: Stream) -> None:
        """One ask. Raises PeerGone, RemoteProtocolError."""
        frames, peer = FrameStream(stream), stream.peer
        with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
            ask = await frames.receive(wire.FROM_ASKER)
        if scope.cancelled_caught:
            raise RemoteProtocolError("the peer opened a stream and asked for nothing")
        reply: wire.FromHolder
        if self._answering[peer] >= MAX_ANSWERS_PER_PEER or self._answering.total() >= MAX_ANSWERS:
            reply = failure_of(Busy("this peer answers as many as it can"))
        else:
            reply = await self._counted(peer, ask)
        with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
            await frames.send(wire.FROM_HOLDER, reply)
            await stream.aclose()
        if scope.cancelled_caught:
            raise PeerGone("the peer stopped reading")

    async def _counted(self, peer: PeerId, ask: wire.LeaseAsk) -> wire.FromHolder:
        self._answering[peer] += 1
        try:
            return await self._grant(peer, ask)
        except MeshmaxError as error:
            return failure_of(error)
        finally:
            self._answering[peer] -= 1
            if not self._answering[peer]:
                del self._answering[peer]

    async def _grant(self, peer: PeerId, ask: wire.LeaseAsk) -> wire.Leased:
        digest = Sha256(ask.digest)
        manifest = self._manifest(digest)
        for blob in manifest.blobs:
            await self._blobs.path(blob.digest)
        known = {blob.digest for blob in manifest.blobs}
        if any(probe.blob not in known for probe in ask.probes):
            raise BlobNotFound("what was asked for is not part of this model")
        proof = wire.proof_of(ask.nonce, digest, await self._read(ask.probes))
        self._manifest(digest)  # it may have gone while we read
        # Nothing is awaited between this look, the grant and the words that tell of it.
        return wire.Leased(self._table.on_ask(digest, peer, trio.current_time()), proof)

    def _manifest(self, digest: Sha256) -> Manifest:
        found = next((stored for stored in self._local() if stored.manifest.digest == digest), None)
        if found is None:
            raise BlobNotFound(f"model {digest[:12]} is not here")
        return found.manifest

    async def _read(self, probes: Sequence[wire.Probe]) -> list[bytes]:
        return [await self._blobs.read_chunk(Sha256(probe.blob), probe.index) for probe in probes]


def _as_refusal(error: MeshmaxError) -> MeshmaxError:
    """What a holder answers is its own affair: its store's errors are not ours."""
    return error if isinstance(error, (Refused, NotFound)) else Refused(error.message)


def choose_probes(manifest: Manifest) -> tuple[wire.Probe, ...]:
    """PROBES chunks of the model that nobody can foresee, each as likely as any other."""
    counts = [(blob.digest, -(-blob.size // CHUNK_BYTES)) for blob in manifest.blobs]
    total = sum(count for _, count in counts)
    chosen = []
    for _ in range(min(PROBES, total)):
        at = secrets.randbelow(total)
        for digest, count in counts:
            if at < count:
                chosen.append(wire.Probe(digest, at))
                break
            at -= count
    return tuple(chosen)
