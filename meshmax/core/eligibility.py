"""Who may be asked at all, and in words why another may not.

Never: a peer that is not connected, drains, or has only a part of the model; whose breaker is open (core.breaker) or who said
that it is busy, before that time is up; whose queue is full by its own word. A half-open breaker lets one request through, so
that peer may be asked. Pure. Not here: which of those who may be asked is best (core.policies), who waits for those who may
not (core.delivery).
"""

from __future__ import annotations

import math
from typing import Final

from meshmax.base.route import Verdict
from meshmax.core.breaker import NOT_NOW
from meshmax.core.contender import Contender
from meshmax.core.delivery_words import Rest

MIN_ROOM_S: Final = 1.0  # until a full queue has a place, at least: HTTP's Retry-After counts in seconds
MAX_ROOM_S: Final = 60.0  # estimates of what is farther away are worth little


def kept_out(contender: Contender) -> tuple[Verdict, str] | None:
    """The verdict and its words; None if the peer may be asked."""
    view, standing = contender.view, contender.standing
    if view.state == "offline" or view.status is None:
        return "excluded", "not connected"
    if view.state == "draining" or view.status.draining:
        return "draining", "draining"
    if contender.model.state == "partial":
        return "excluded", "has only a part of it"
    if standing.state != "open":
        load = contender.load
        full = 0 < load.limit <= load.queued and load.running >= load.capacity
        return ("full", "its queue is full") if full else None
    if standing.code in NOT_NOW:
        return "busy", "said it is busy" if standing.code == "busy" else f"takes nothing now ({standing.code})"
    probed = ", and one request is finding out whether it works again" if standing.probing else ""
    return "broken", f"failed lately ({standing.code}){probed}"


def is_resting(verdict: Verdict) -> bool:
    """Whether one kept out with ``verdict`` may be asked again when its time is up."""
    return verdict in ("busy", "broken", "full")


def rest_of(contender: Contender, verdict: Verdict, now: float) -> tuple[Rest, float]:
    """Why one kept out with ``verdict`` rests, and until when (see Choice); ("", 0.0) where only another status could help."""
    standing = contender.standing
    if verdict == "excluded" and contender.view.state == "offline":
        return "gone", math.inf
    if verdict == "full":
        return "full", now + room_s(contender)
    if verdict == "broken":
        return "probed" if standing.probing else "broken", standing.until_s
    return ("busy", standing.until_s) if verdict == "busy" else ("", 0.0)


def room_s(contender: Contender) -> float:
    """In about how long a full queue has places again: when half of it has been served, as its own peer reckons."""
    load, told = contender.load, contender.told
    all_s = told.wait_s if told else (contender.figures.turn_s or 0.0) * load.queued / max(load.capacity, 1)
    return min(max(all_s / 2, MIN_ROOM_S), MAX_ROOM_S)
