"""Progress of transfers, as people and programs see it (mesh-api: transfers)."""

from __future__ import annotations

from typing import Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Signed

TransferState = Literal["running", "paused", "waiting", "done", "failed", "cancelled"]


class TransferPeer(msgspec.Struct, frozen=True):
    """What one peer gave (or got) in a transfer. ``strikes``: bad chunks it sent.

    ``chunks`` are good ones that it gave, ``wants`` those that were asked of it and are not there yet.
    """

    bytes: int = 0
    rate_bytes_per_s: float = 0.0
    lanes: int = 0
    strikes: int = 0
    chunks: int = 0
    wants: int = 0


class BlobProgress(msgspec.Struct, frozen=True):
    """One blob of a transfer. ``done``: bytes verified and in place; ``haves`` and ``wants``: chunks here and missing."""

    digest: Sha256
    size: int
    done: int
    haves: int = 0
    wants: int = 0


class Transfer(msgspec.Struct, frozen=True):
    """A transfer as it is now. ``phase`` is Ollama's status line of the moment; ``reason`` says why it waits or failed.

    ``bytes_wasted`` are bytes received that were not used (bad or double). ``detached``: it goes on when nobody watches,
    and after a restart. ``note``: what bounds it while it runs, as a relay does. An outgoing transfer counts in
    ``bytes_done`` what was sent, whoever got it.
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
    detached: bool = False
    note: str = ""


class Download(msgspec.Struct, frozen=True):
    """A detached pull, which goes on whoever watches, as it is kept over restarts. ``names`` are full names.

    ``asked_by``: the peer that asked for it, '' for a person here. ``manifest`` and ``record``, once known, let a node that
    has only parts tell others what they are parts of, when nobody else is left who could.
    """

    id: str
    digest: Sha256
    names: tuple[str, ...]
    paused: bool = False
    asked_by: str = ""
    manifest: bytes = b""
    record: Signed | None = None
