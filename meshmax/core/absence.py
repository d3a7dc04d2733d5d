"""What a prompt is told whose model nobody here has, when a peer that has it was lost only a moment ago.

Rules. A connection that broke, a machine that is too busy to answer, a peer that is started again: most of those that are lost
without a farewell are back within seconds, and nothing is wrong with the request. So it is told to come again, and not that
there is no such model; after AWAY_S, or where the peer took its leave, there is none. Pure. Not here: who had it (core.catalog).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshmax.base.errors import Busy, MeshmaxError, PeerGone, Retry
from meshmax.base.status import PeerView

AWAY_S: Final = (
    30.0  # after its last sign of life: a loss is noticed after six seconds, and dialled again at once and often
)
AGAIN_S: Final = 2.0  # a dial and a status take less
MAX_NAMED: Final = 4  # peers, of one refusal


class LostJustNow(Busy):
    """Whoever has the model was lost a moment ago; try again."""


class WentAway(PeerGone):
    """Whoever was asked went away before it answered; try again."""

    http_status = 503
    retry = Retry.LATER
    retry_after_s = AGAIN_S


def lost_just_now(model: str, name: str, view: PeerView | None, now_s: float) -> LostJustNow | None:
    """Of ``view``, a peer called ``name`` that had ``model``; None where it is gone for good, or there. ``now_s``: Unix time."""
    if view is None or view.state != "offline" or view.status is None or view.status.leaving:
        return None
    ago_s = max(0.0, now_s - view.last_seen_s)
    if ago_s > AWAY_S:
        return None
    why = f"{name}, which has model '{model[:200]}', was lost {ago_s:.0f} s ago and is looked for: try again"
    return LostJustNow(why, AGAIN_S)


def all_lost(model: str, names: Sequence[str]) -> LostJustNow:
    """Of a request that has waited for ``names``, one at least, who have ``model`` and are not back yet."""
    who = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    have, was, is_ = ("has", "was", "is") if len(names) == 1 else ("have", "were", "are")
    what = f"model '{model[:200]}'" if model else "the model"
    return LostJustNow(f"{who}, which {have} {what}, {was} lost just now and {is_} looked for: try again", AGAIN_S)


def went_away(errors: Sequence[MeshmaxError], *, alone: bool) -> WentAway:
    """Of a request whose peers, one at least, went away before they answered: ``errors`` name them.

    ``alone``: no other peer was asked, else one that was could not answer.
    """
    said = list(dict.fromkeys(error.message.rstrip(".") for error in errors))
    who = "; ".join(said[-MAX_NAMED:])
    others = "no other peer has the model ready" if alone else "no other peer could answer"
    return WentAway(f"{who}, and {others}: try again in a moment, and see with `meshmax peers` who is there")
