"""Progress of transfers, as people and programs see it (mesh-api: transfers)."""

from __future__ import annotations

from typing import Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256

TransferState = Literal["running", "paused", "waiting", "done", "failed", "cancelled"]


class TransferPeer(msgspec.Struct, frozen=True):
    """What one peer gave (or got) in a transfer. ``strikes``: bad chunks it sent."""

    bytes: int = 0
    rate_bytes_per_s: float = 0.0
    lanes: int = 0
    strikes: int = 0


class BlobProgress(msgspec.Struct, frozen=True):
    """One blob of a transfer, bytes verified and in place."""

    digest: Sha256
    size: int
    done: int


class Transfer(msgspec.Struct, frozen=True):
    """A transfer as it is now. ``phase`` is Ollama's status line of the moment; ``reason`` says why it waits or failed.

    ``bytes_wasted`` are bytes received that were not used (bad or double).
    """

    id: str
    model: str
    direction: Literal["in", "out"]
    state: TransferState
    phase: str = ""
    reason: str = ""
    error_code: str = ""
    bytes_total: int = 0
    bytes_done: int = 0
    bytes_wasted: int = 0
    rate_bytes_per_s: float = 0.0
    eta_s: float | None = None
    blobs: tuple[BlobProgress, ...] = ()
    peers: dict[PeerId, TransferPeer] = {}
