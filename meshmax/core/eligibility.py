"""Who may be asked at all, and in words why another may not.

Never: a peer that is not connected, drains, or has only a part of the model; whose breaker is open (core.breaker) or who said
that it is busy, before that time is up; whose queue is full by its own word. A half-open breaker lets one request through, so
that peer may be asked. Pure. Not here: which of those who may be asked is best (core.policies).
"""

from __future__ import annotations

from meshmax.base.route import Verdict
from meshmax.core.breaker import NOT_NOW
from meshmax.core.contender import Contender


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
