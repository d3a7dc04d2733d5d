"""Why a prompt went where it went: what X-Meshmax-Route and /api/v1/requests tell."""

from __future__ import annotations

from typing import Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Device

Verdict = Literal["chosen", "slower", "busy", "failed", "draining", "excluded"]


class Candidate(msgspec.Struct, frozen=True):
    """A peer that has the model, as the router saw it. ``estimate_s``: time until the whole answer, by our figures."""

    peer_id: PeerId
    name: str
    device: Device
    loaded: bool
    rtt_s: float
    queue: int
    estimate_s: float
    verdict: Verdict
    why: str


class Attempt(msgspec.Struct, frozen=True):
    """One try of a request at a peer. ``error`` '' where it answered; ``first_token_s`` from our sending, None if none came."""

    peer_id: PeerId
    error: str = ""
    first_token_s: float | None = None


class Route(msgspec.Struct, frozen=True):
    """The decision for one request. ``line`` is one line of ASCII for the header."""

    request_id: str
    digest: Sha256
    peer_id: PeerId
    line: str
    candidates: tuple[Candidate, ...] = ()
    attempts: tuple[Attempt, ...] = ()
