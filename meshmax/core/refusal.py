"""What a request is told that nobody can answer now: how many have the model, what keeps them, and when to come again.

Rules. Peers that rest are counted with what keeps them, and the first to be there again says when to come. One that was lost
only a moment ago is no reason to say that there is no such model: a connection that broke, a machine that is too busy to
answer, a peer that is started again; most of those that are lost without a farewell are back within seconds, and nothing is
wrong with the request. So it is told to come again; after AWAY_S, or where the peer took its leave, there is none. Pure. Not
here: that it is refused (core.delivery), what a peer said that was asked (core.retrying), who had the model (core.catalog).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from meshmax.base.errors import Busy, MeshmaxError, PeerGone, Retry
from meshmax.base.status import PeerView
from meshmax.core.delivery_words import Choice, Rest

MIN_RETRY_S: Final = 1.0  # HTTP's Retry-After counts in seconds
MAX_SAID: Final = 120  # characters of what a peer said when it failed
AWAY_S: Final = 30.0  # after its last sign of life: a loss is noticed after six seconds, and dialled again often
AGAIN_S: Final = 2.0  # a dial and a status take less
TRY_AGAIN: Final = ": try again"  # the end of what a client is told of it
MAX_NAMED: Final = 4  # peers, of one refusal
_WORDS: Final[dict[Rest, str]] = {
    "": "failed a moment ago",
    "busy": "busy",
    "full": "full",
    "broken": "out of order",
    "probed": "out of order",
    "gone": "not connected",
}


class NobodyNow(Busy):
    """No peer can be asked now, for the answer or to fetch its model."""

    def __init__(self, message: str | None = None, retry_after_s: float = 1.0, *, full: bool = False) -> None:
        """``full``: none of them is out of order, all are full or busy."""
        super().__init__(message, retry_after_s)
        self.full = full


class LostJustNow(Busy):
    """Whoever has the model was lost a moment ago; try again."""


class WentAway(PeerGone):
    """Whoever was asked went away before it answered; try again."""

    http_status = 503
    retry = Retry.LATER
    retry_after_s = AGAIN_S


def refusal(model: str, choices: Sequence[Choice], now: float) -> NobodyNow | LostJustNow:
    """Of a request for ``model`` where all ``choices``, one at least, rest."""
    there = [choice for choice in choices if choice.rests != "gone"]
    if not there:
        return all_lost(model, [choice.name or "one" for choice in choices])
    choices = there
    after_s = max(min(choice.from_s for choice in choices) - now, MIN_RETRY_S)
    full = all(choice.rests in ("busy", "full") for choice in choices)
    return NobodyNow(f"{why_nobody(model, choices)}; {_again(choices, after_s)}", after_s, full=full)


def why_nobody(model: str, choices: Sequence[Choice]) -> str:
    """What keeps all of ``choices``, as a clause."""
    what = _what(model)
    if len(choices) == 1:
        (one,) = choices
        who = "this peer" if one.ours else one.name or "the peer"
        return f"{who}, the only one that has {what} ready, {_is(one)}"
    words = sorted({_WORDS[choice.rests] for choice in choices})
    failed = next((choice for choice in choices if choice.rests in ("broken", "probed")), None)
    lately = f" ({failed.name or 'one'} {_is(failed)})" if failed else ""
    if len(words) == 1:
        return f"all {len(choices)} peers that have {what} ready are {words[0]}{lately}"
    counts = ", ".join(f"{sum(_WORDS[c.rests] == word for c in choices)} {word}" for word in words)
    return f"none of the {len(choices)} peers that have {what} ready can be asked now: {counts}{lately}"


def lost_just_now(model: str, name: str, view: PeerView | None, now_s: float) -> LostJustNow | None:
    """Of ``view``, a peer called ``name`` that had ``model``; None where it is gone for good, or there. ``now_s``: Unix time."""
    if view is None or view.state != "offline" or view.status is None or view.status.leaving:
        return None
    ago_s = max(0.0, now_s - view.last_seen_s)
    if ago_s > AWAY_S:
        return None
    why = f"{name}, which has model '{model[:200]}', was lost {ago_s:.0f} s ago and is looked for{TRY_AGAIN}"
    return LostJustNow(why, AGAIN_S)


def all_lost(model: str, names: Sequence[str]) -> LostJustNow:
    """Of a request that has waited for ``names``, one at least, who have ``model`` and are not back yet."""
    who = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    have, was, is_ = ("has", "was", "is") if len(names) == 1 else ("have", "were", "are")
    return LostJustNow(
        f"{who}, which {have} {_what(model)}, {was} lost just now and {is_} looked for{TRY_AGAIN}", AGAIN_S
    )


def went_away(errors: Sequence[MeshmaxError], *, alone: bool) -> WentAway:
    """Of a request whose peers, one at least, went away before they answered: ``errors`` name them.

    ``alone``: no other peer was asked, else one that was could not answer.
    """
    said = list(dict.fromkeys(error.message.rstrip(".") for error in errors))
    who = "; ".join(said[-MAX_NAMED:])
    others = "no other peer has the model ready" if alone else "no other peer could answer"
    return WentAway(f"{who}, and {others}: try again in a moment, and see with `meshmax peers` who is there")


def _what(model: str) -> str:
    return f"model '{model[:200]}'" if model else "the model"


def _is(choice: Choice) -> str:
    if choice.rests in ("", "gone"):
        return _WORDS[""] if not choice.rests else "was lost just now"
    if choice.rests == "full":
        return "has no room in its queue"
    if choice.rests == "busy":
        return "is busy" if choice.code in ("", "busy") else f"takes nothing now ({choice.code})"
    said = "".join(c if " " <= c <= "~" else "?" for c in choice.reason[:MAX_SAID]).rstrip(".")
    reason = f": {said}" if said else ""
    return f"failed lately ({choice.code or 'error'}{reason})"


def _again(choices: Sequence[Choice], after_s: float) -> str:
    about = f"in about {math.ceil(after_s)} s"
    first = min(choices, key=lambda choice: choice.from_s)
    if first.rests == "probed":
        return "one request is finding out whether it works again"
    if first.rests == "broken":
        return f"it is tried again {about}" if len(choices) == 1 else f"the first is tried again {about}"
    return f"there is room {about}" if len(choices) == 1 else f"the first has room {about}"
