"""What we give: who got how many bytes of which model from us, now and lately.

`Outflow.note` is called for each piece that is sent, from any thread; everything else belongs to trio's thread. What is
sent of one model belongs to one transfer, whatever blob it is of and whoever gets it, until nothing was sent for IDLE_S:
then the transfer is done, and the next byte begins another. Tables are bounded: beyond MAX_FLOWS at once, what is
sent is counted and not told apart. Not here: what is sent (services.blob_server and the lanes), incoming transfers
(services.pull).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Literal, NoReturn

import msgspec
import trio

from meshmax.base.events import BlobProgress, Transfer, TransferPeer
from meshmax.base.ids import PeerId, Sha256
from meshmax.services.pull_progress import Rate

SAMPLE_INTERVAL_S: Final = 1.0  # how often what was noted is added up while anything moves
IDLE_S: Final = 15.0  # without a byte until a transfer counts as done; a fetcher that waits for others comes back
MAX_FLOWS: Final = 4096  # (peer, blob) pairs at once: 128 sessions serve at a time, each for one blob
MAX_ENDED: Final = 50  # outgoing transfers that are remembered

Owner = Callable[[Sha256], tuple[Sha256, str] | None]  # a blob -> digest and name of a model of ours that it belongs to


class _Flow(msgspec.Struct):
    """One blob to one peer: bytes sent, and how fast."""

    rate: Rate
    bytes: int = 0
    rate_bytes_per_s: float = 0.0


class _Sent(msgspec.Struct):
    """One outgoing transfer: a model, or a blob that belongs to none."""

    id: str
    name: str
    last_s: float
    flows: dict[tuple[PeerId, Sha256], _Flow] = {}


class Outflow:
    """Satisfies what servers note into. ``owner`` says to which model a blob belongs."""

    def __init__(self, owner: Owner = lambda digest: None) -> None:
        self._owner = owner
        self._lock = threading.Lock()  # held for an addition; a chunk of 1 MiB takes a thousand times longer
        self._noted: dict[tuple[PeerId, Sha256], int] = {}
        self._open: dict[str, _Sent] = {}
        self._ended: deque[Transfer] = deque(maxlen=MAX_ENDED)
        self._count = 0

    def note(self, peer: PeerId, digest: Sha256, size: int) -> None:
        """``size`` bytes of the blob ``digest`` went to ``peer``. Thread-safe, cheap, never raises."""
        with self._lock:
            key = (peer, digest)
            if key in self._noted or len(self._noted) < MAX_FLOWS:
                self._noted[key] = self._noted.get(key, 0) + size

    async def run(self) -> NoReturn:
        """Add up what was noted, until cancelled."""
        while True:
            await trio.sleep(SAMPLE_INTERVAL_S)
            self._sample(trio.current_time())

    def transfers(self) -> tuple[Transfer, ...]:
        """What is being sent, then what was, newest first."""
        self._sample(trio.current_time())
        return (*(_shown(sent, "running") for sent in reversed(self._open.values())), *self._ended)

    def sending(self) -> frozenset[Sha256]:
        """The blobs of which something was sent within the last IDLE_S."""
        self._sample(trio.current_time())
        return frozenset(blob for sent in self._open.values() for _, blob in sent.flows)

    def _sample(self, now: float) -> None:
        with self._lock:
            noted, self._noted = self._noted, {}
        for (peer, digest), size in noted.items():
            self._add(peer, digest, size, now)
        for key, sent in tuple(self._open.items()):
            for flow in sent.flows.values():
                flow.rate_bytes_per_s = flow.rate.note(flow.bytes, now)
            if now - sent.last_s >= IDLE_S:
                del self._open[key]
                self._ended.appendleft(_shown(sent, "done"))

    def _add(self, peer: PeerId, digest: Sha256, size: int, now: float) -> None:
        model, name = self._owner(digest) or (digest, f"blob {digest[:12]}")
        sent = self._open.get(model)
        if sent is None:
            if len(self._open) >= MAX_FLOWS:
                return
            self._count += 1
            sent = self._open[model] = _Sent(f"out-{model[:12]}-{self._count}", name, now)
        sent.last_s = now
        flow = sent.flows.get((peer, digest))
        if flow is None:
            if len(sent.flows) >= MAX_FLOWS:
                return
            flow = sent.flows[peer, digest] = _Flow(Rate())
            flow.rate.note(0, now - SAMPLE_INTERVAL_S)
        flow.bytes += size


def _shown(sent: _Sent, state: Literal["running", "done"]) -> Transfer:
    running = state == "running"
    peers: dict[PeerId, TransferPeer] = {}
    blobs: dict[Sha256, int] = {}
    for (peer, digest), flow in sent.flows.items():
        before = peers.get(peer, TransferPeer())
        rate = flow.rate_bytes_per_s if running else 0.0
        peers[peer] = TransferPeer(before.bytes + flow.bytes, before.rate_bytes_per_s + rate)
        blobs[digest] = blobs.get(digest, 0) + flow.bytes
    done = sum(blobs.values())
    return Transfer(
        sent.id,
        sent.name,
        "out",
        state,
        "sending" if running else "sent",
        bytes_total=done,
        bytes_done=done,
        rate_bytes_per_s=sum(peer.rate_bytes_per_s for peer in peers.values()),
        blobs=tuple(BlobProgress(digest, size, size) for digest, size in blobs.items()),
        peers=peers,
    )
