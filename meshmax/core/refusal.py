"""What a request is told that nobody can be asked for now: how many have the model, what keeps them, and when to come again.

Pure. Not here: that it is refused (core.delivery), what a peer said that was asked (core.retrying).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from meshmax.base.errors import Busy
from meshmax.core.absence import LostJustNow, all_lost
from meshmax.core.delivery_words import Choice, Rest

MIN_RETRY_S: Final = 1.0  # HTTP's Retry-After counts in seconds
MAX_SAID: Final = 120  # characters of what a peer said when it failed
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
