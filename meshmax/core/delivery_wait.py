"""How long one request waits where nobody can be asked now, and what for. Sans-IO.

Rules. It waits for the first of those that have the model to be asked again: when its time out is over, when the probe of another
request has told (which `Delivery.on_news` brings), when its status tells of room, or when somebody comes who has the model. Who
failed this request before is asked again after a pause of this request's own as well, with backoff and jitter; who told it that
it is busy not before the time that it told.

Before the first token a request waits PATIENCE_S at most, also for a peer that was lost just now and may be back, and for a
probe that is under way then until that has told: whoever asks can as well ask again, and hears when. Prompts wait in the queues
of peers, not here: where all are full or busy that is told at once. In the middle of an answer what is half said should not be
lost: it waits MIDDLE_S for peers that rest, STUCK_S since somebody was there last (a peer that comes back is often lost once more
before it is there for good), and MIDDLE_S in all. Time and randomness are passed in. Not here: who is
asked (core.delivery), the words (core.refusal).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from meshmax.base.errors import Busy, CapabilityMissing, ConnectError, MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.route import Wait
from meshmax.core.backoff import Random, backoff_s
from meshmax.core.delivery_words import Choice
from meshmax.core.refusal import why_nobody
from meshmax.core.retrying import passes

FIRST_PAUSE_S: Final = 0.1  # before a peer that failed is asked again; an engine starts in about that
MOST_PAUSE_S: Final = 2.0
PATIENCE_S: Final = 8.0  # before the first token: a peer restarts in that; a client that has seen nothing can ask again
STUCK_S: Final = 60.0  # in the middle of an answer, nobody there: a busy machine restarts and is found again in that
MIDDLE_S: Final = 300.0  # the same where peers are there but rest; clients wait ten minutes for the next byte
MAX_WAITS: Final = 16  # that are told of one request


class Patience:
    """What one request waits for. ``waits``: every time that it did, ``at_s`` after it came."""

    def __init__(self, random: Random, began_s: float, ends_s: float) -> None:
        """``ends_s``: its one deadline."""
        self._random, self._began_s, self._ends_s = random, began_s, ends_s
        self._stuck_s: float | None = None  # since when nobody can be asked
        self._alone_s = began_s  # since when nobody is there
        self._again_s: float | None = None  # when those may be asked again that were asked before
        self._pauses = 0
        self._own_busy_s = -math.inf  # our own queue is full until then; others' times are the breakers'
        self.tried: Counter[PeerId] = Counter()  # who was asked in vain how often, since there was progress
        self.lost: Sequence[Choice] = ()  # who was gone when this was looked at last: soon they are in no list any more
        self.waits: list[Wait] = []

    def on_failed(self, choice: Choice, error: MeshmaxError, now: float) -> None:
        """An attempt has failed."""
        self._again_s = None
        self._alone_s = now
        self.tried[choice.peer] += not isinstance(error, PeerGone | ConnectError | CapabilityMissing)
        if isinstance(error, Busy) and choice.ours:
            self._own_busy_s = now + error.retry_after_s

    def on_news(self, now: float) -> None:
        """Who may be asked is not what it was: those asked in vain are left alone no longer than they rest."""
        if self._again_s is not None:
            self._again_s = min(self._again_s, now)

    def on_progress(self) -> None:
        """The client got something new."""
        self._stuck_s = self._again_s = None
        self._pauses = 0
        self._own_busy_s = -math.inf
        self.lost = ()
        self.tried.clear()

    def from_s(self, choice: Choice, asked: bool) -> float:
        """When ``choice`` may be asked; infinite where only its status can tell. ``asked``: it was, since there was progress."""
        from_s = choice.from_s
        if choice.rests in ("full", "gone"):
            from_s = -math.inf if choice.ours else math.inf
        if choice.ours:
            from_s = max(from_s, self._own_busy_s)
        if asked:
            from_s = max(from_s, math.inf if self._again_s is None else self._again_s)
        return from_s

    def resting(self, choices: Sequence[Choice], now: float) -> list[Choice]:
        """Those that rest, with the time that we know best."""
        found = []
        for choice in choices:
            if choice.ours and self._own_busy_s > now:
                found.append(msgspec.structs.replace(choice, rests="busy", from_s=self._own_busy_s))
            elif choice.rests:
                found.append(choice)
        return found

    def until(
        self,
        choices: Sequence[Choice],
        asked: set[PeerId],
        errors: Sequence[MeshmaxError],
        now: float,
        *,
        middle: bool,
    ) -> float | None:
        """When to look again, after ``now``; None: there is nothing to wait for. ``choices``: who could be asked some time."""
        if self._stuck_s is None:
            self._stuck_s = now
        if self._again_s is None:
            self._pauses += 1
            self._again_s = now + backoff_s(self._pauses, FIRST_PAUSE_S, MOST_PAUSE_S, self._random)
        times = [self.from_s(choice, choice.peer in asked) for choice in choices]
        next_s = min((at for at in times if at > now), default=math.inf)
        there = [choice for choice in choices if choice.rests != "gone"]
        self.lost = [choice for choice in choices if choice.rests == "gone"] or self.lost
        if middle:
            end_s = self._stuck_s + MIDDLE_S
            if self.resting(there, now):
                self._alone_s = now
            else:
                end_s = min(end_s, max(self._alone_s, self._stuck_s) + STUCK_S)
            return min(next_s, end_s) if now < end_s else None
        others = [error for error in errors if not isinstance(error, Busy)]
        full = [choice for choice in self.resting(there, now) if choice.rests in ("busy", "full")]
        if not others and len(full) == len(there) and (full or not choices):
            return None
        end_s = self._stuck_s + PATIENCE_S
        probed = (choice.from_s for choice in choices if choice.rests == "probed")
        end_s = min(max(end_s, min(probed, default=0.0)), self._ends_s)
        if next_s <= end_s:
            return next_s
        back = len(there) < len(choices) or (not choices and any(map(passes, others)))
        return end_s if back and now < end_s else None

    # --- what is told ------------------------------------------------------------------------------------------------

    def on_wait(self, model: str, choices: Sequence[Choice], now: float) -> None:
        """It waits from now on, if it does not already."""
        if self.waits and (self.waits[-1].took_s is None or len(self.waits) >= MAX_WAITS):
            return
        why = why_nobody(model, choices) if choices else "nobody was there who has it and takes prompts"
        self.waits.append(Wait(now - self._began_s, None, why))

    def on_waited(self, now: float) -> None:
        """Somebody is asked, or it is over."""
        if self.waits and self.waits[-1].took_s is None:
            last = self.waits[-1]
            self.waits[-1] = msgspec.structs.replace(last, took_s=now - self._began_s - last.at_s)
