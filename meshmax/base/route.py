"""Why a prompt went where it went, and what came of it: what X-Meshmax-Route, `meshmax why` and /api/v1/requests tell."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Device

Policy = Literal["latency", "least-loaded", "round-robin", "weighted", "affinity", "local-only"]
POLICIES: Final[tuple[Policy, ...]] = ("latency", "least-loaded", "round-robin", "weighted", "affinity", "local-only")
Verdict = Literal["chosen", "slower", "busy", "failed", "draining", "broken", "full", "excluded"]
AttemptKind = Literal["first", "retry", "hedge", "continuation", "fetch"]
RequestState = Literal["running", "done", "failed", "cancelled"]
RequestKind = Literal["text", "vectors", "load", "unload"]


class Wishes(msgspec.Struct, frozen=True):
    """What a request asks of its routing. None: as this node is configured.

    ``pull``: a peer may fetch the model first where none that could answer has it.
    """

    policy: Policy | None = None
    pull: bool | None = None


class Figures(msgspec.Struct, frozen=True):
    """What an estimate is made of, in seconds: they add up to it."""

    rtt_s: float = 0.0
    queue_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    output_s: float = 0.0


class Candidate(msgspec.Struct, frozen=True):
    """A peer that has the model, as the router saw it. ``loaded``: as this request wants it.

    ``estimate_s``: time until the whole answer, by our figures.
    ``told_wait_s``: how long the peer said that one who comes now waits for a slot, None where it said nothing that counts.
    """

    peer_id: PeerId
    name: str
    device: Device
    loaded: bool
    rtt_s: float
    queue: int
    estimate_s: float
    verdict: Verdict
    why: str
    figures: Figures = Figures()
    told_wait_s: float | None = None


class Attempt(msgspec.Struct, frozen=True):
    """One try of a request at a peer. ``error``: code of what ended it, '' where it answered or still does.

    ``kind`` "fetch": the peer pulled the model first.
    ``at_s``: when it was sent, after the request came; ``first_token_s`` and ``ended_s`` after that, None if it did not.
    ``tokens``: how many of the client's tokens came from it. ``message``: the error's sentence, without the prompt.
    ``stopping``: the error is that the peer ended, and was not drained by somebody.
    ``load_s``: how long of the time to the first token the model was loading, 0 where it was in memory, or where the peer did
    not give the end of the answer, which tells.
    """

    peer_id: PeerId
    error: str = ""
    first_token_s: float | None = None
    kind: AttemptKind = "first"
    at_s: float = 0.0
    ended_s: float | None = None
    tokens: int = 0
    message: str = ""
    stopping: bool = False
    load_s: float = 0.0


class Wait(msgspec.Struct, frozen=True):
    """A time in which nobody could be asked, from ``at_s`` after the request came.

    ``took_s``: None while it lasts. ``why``: a clause.
    """

    at_s: float
    took_s: float | None
    why: str


class Route(msgspec.Struct, frozen=True):
    """The decision for one request. ``line`` is one line of ASCII for the header; ``peer_id`` began the answer.

    ``started_at_s``: Unix time. ``first_token_s``, ``total_s``: after that, None until then. ``model``: as it was asked for.
    ``kind``: what was asked for. ``among``: how many peers could be asked when it came, of whom ``candidates`` tells
    the best. ``output_tokens``: as the engine counts them, the one that ends the answer too; those of ``attempts`` have text.
    ``error``, ``message``: code and sentence of what ended it, '' where nothing did; never a word of the prompt.
    """

    request_id: str
    digest: Sha256
    peer_id: PeerId
    line: str
    candidates: tuple[Candidate, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    model: str = ""
    policy: Policy = "latency"
    state: RequestState = "running"
    started_at_s: float = 0.0
    first_token_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    kind: RequestKind = "text"
    among: int | None = None
    waits: tuple[Wait, ...] = ()
    error: str = ""
    message: str = ""
