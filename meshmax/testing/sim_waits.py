"""What a simulated peer tells of its waits: the real core (core.slot_wait), shown what happened there up to then and no more.

It sees when its prompts came, began and ended, how many tokens of those that we asked for were said, and that others' prompts
hold a slot (of these neither tokens nor lengths). It speaks every TOLD_EVERY_S, as a real peer does at most; who asks for its
word at a moment gets the last one before. After a restart it has learnt nothing. Not here: how late a word comes (sim_routing).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Final

import msgspec

from meshmax.base.ids import Sha256
from meshmax.core.slot_wait import SlotWaits

TOLD_EVERY_S: Final = 0.25
KEPT_WORDS: Final = 16  # the newest; words arrive half a round trip late at most, or not at all
OTHERS: Final = Sha256("f" * 64)  # whatever model others' prompts are for


class SimAnswer(msgspec.Struct):
    """An answer in the making, in virtual time. ``said_from_s``: when its first token comes; ``tokens``: of the whole."""

    ask: int
    digest: Sha256
    came_s: float
    start_s: float
    said_from_s: float
    end_s: float
    tokens: int
    started: bool = False

    def said(self, now: float) -> int:
        """Tokens until ``now``."""
        span_s = self.end_s - self.said_from_s
        if not self.tokens or now < self.said_from_s:
            return 0
        if now >= self.end_s or span_s <= 0:
            return self.tokens
        return int(self.tokens * (now - self.said_from_s) / span_s + 1e-6)  # whole numbers stay whole


class SimWord(msgspec.Struct, frozen=True):
    """What was told at a moment."""

    at_s: float
    wait_s: float
    free: int
    queued: int


class SimWaits:
    """One peer's. Words are made in the order of time."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._core = SlotWaits()
        self._answers: list[SimAnswer] = []
        self._asks = 0
        self._words: deque[SimWord] = deque(maxlen=KEPT_WORDS)
        self._tick = -1

    def on_taken(self, answer: SimAnswer) -> None:
        """A prompt comes, whose times are fixed: they are looked at when they have come."""
        self._asks += 1
        answer.ask = self._asks
        self._answers.append(answer)

    def on_restart(self, up_s: float) -> None:
        """All that ran is lost, and all that was learnt."""
        self._core, self._answers = SlotWaits(), [each for each in self._answers if each.came_s >= up_s]
        self._words.clear()

    def word(self, at_s: float) -> SimWord | None:
        """The newest word of ``at_s`` or before."""
        tick = int(at_s / TOLD_EVERY_S)
        if tick > self._tick:
            self._tick = tick
            self._words.append(self._tell(tick * TOLD_EVERY_S))
        index = bisect_right(self._words, at_s, key=lambda word: word.at_s)
        return self._words[index - 1] if index else None

    def _tell(self, now: float) -> SimWord:
        answers = sorted(self._answers, key=lambda each: each.end_s)
        waiting = 0
        for each in answers:
            if each.start_s <= now and not each.started:
                each.started = True
                self._core.on_start(each.ask, each.digest, each.start_s)
            if each.started:
                if (said := each.said(now)) > 0:
                    self._core.on_said(each.ask, 1, each.said_from_s)
                    self._core.on_said(each.ask, said, now)
                if each.end_s <= now:
                    self._core.on_end(each.ask, each.end_s)
            elif each.came_s <= now:
                waiting += 1
        self._answers = [each for each in answers if each.end_s > now]
        running = self._core.running()
        wait_s = self._core.wait_s(self._slots, waiting, now)
        return SimWord(now, wait_s, max(self._slots - running, 0), waiting)
