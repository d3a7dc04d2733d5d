"""How long a newcomer would wait for a slot here, as this peer tells others: only it knows what its answers have left. Sans-IO.

Rules. What an answer has left follows from what was said of it, its limit, the mean length of the model's answers here, and its
own speed; lengths of answers are spread so widely that one which is longer than the mean is expected to have nearly as much left
as a new one, LEFT of it at least. Of several that run the first to end counts, so the ends are taken as they come with
rates that add up (as if each could end at any moment), and whoever waits takes a mean turn. Bounded by the asks that
run and MAX_MODELS. Time is seconds of any monotonic clock. Not here: who is next (core.fair_queue), what others make of the
word (core.told_wait).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from meshmax.base.ids import Sha256
from meshmax.base.status import MAX_WAIT_S
from meshmax.core.ewma import Ewma

MAX_MODELS: Final = 256  # whose answers' means are remembered; the one used longest ago is forgotten first
LEFT: Final = 0.8  # of the mean, at least: answers' lengths and times are spread about like that
USUAL_TOKENS: Final = 256  # of an answer, until some were seen
USUAL_S: Final = 8.0  # of a slot's use, likewise
MIN_SAID: Final = 8  # tokens; fewer tell nothing of an answer's speed
MIN_LEFT_S: Final = 0.05  # the end of an answer takes that long to be seen
STEPS: Final = 64  # of those that wait, counted one by one; after that each takes a mean turn


class _Means:
    __slots__ = ("first_s", "token_s", "tokens", "turn_s")

    def __init__(self) -> None:
        self.turn_s, self.first_s, self.token_s, self.tokens = Ewma(), Ewma(), Ewma(), Ewma()


class _Running:
    __slots__ = ("began_s", "digest", "first_s", "limit", "said")

    def __init__(self, digest: Sha256, began_s: float, limit: int | None) -> None:
        self.digest, self.began_s, self.limit = digest, began_s, limit
        self.first_s: float | None = None  # when the first token came
        self.said = 0


class SlotWaits:
    """What runs in the slots of one peer, and how long such answers take there."""

    __slots__ = ("_means", "_running")

    def __init__(self) -> None:
        self._running: dict[int, _Running] = {}
        self._means: OrderedDict[Sha256, _Means] = OrderedDict()

    def on_start(self, ask: int, digest: Sha256, now: float, limit: int | None = None) -> None:
        """An ask takes a slot. ``limit``: tokens that its answer has at most."""
        self._running[ask] = _Running(digest, now, limit)

    def on_said(self, ask: int, tokens: int, now: float) -> None:
        """So many tokens of its answer were said by now, in all."""
        running = self._running.get(ask)
        if running is None or tokens <= running.said:
            return
        if running.first_s is None:
            running.first_s = now
            self._of(running.digest).first_s.add(now - running.began_s, now)
        running.said = tokens

    def on_end(self, ask: int, now: float, *, whole: bool = True) -> None:
        """It gives its slot back. ``whole``: its answer came to an end of its own. Idempotent."""
        running = self._running.pop(ask, None)
        if running is None:
            return
        means = self._of(running.digest)
        means.turn_s.add(now - running.began_s, now)
        if running.first_s is not None and running.said >= MIN_SAID:
            means.token_s.add((now - running.first_s) / running.said, now)
        if whole and running.said:
            means.tokens.add(running.said, now)

    def running(self, digest: Sha256 | None = None) -> int:
        """Asks that have a slot of this model (None: of any)."""
        return sum(digest is None or each.digest == digest for each in self._running.values())

    def wait_s(self, slots: int, waiting: int, now: float, digest: Sha256 | None = None) -> float:
        """Seconds that one who comes now would wait, at most MAX_WAIT_S; 0 where one of ``slots`` is free.

        ``waiting``: how many go before it. ``digest``: slots are this model's; None: all models share them.
        """
        ends = [
            1 / max(self._left_s(each, now), MIN_LEFT_S)
            for each in self._running.values()
            if digest is None or each.digest == digest
        ]
        if not ends or len(ends) < slots:
            return 0.0
        turns = [1 / max(self._turn_s(each.digest), MIN_LEFT_S) for each in self._running.values()]
        next_turn = sum(turns) / len(turns)
        waited_s = 0.0
        for _ in range(min(waiting, STEPS) + 1):
            rate = sum(ends)
            waited_s += 1 / rate
            ends = [each + each / rate * (next_turn - each) for each in ends]
        waited_s += max(waiting - STEPS, 0) / sum(ends)
        return min(waited_s, MAX_WAIT_S)

    def _left_s(self, running: _Running, now: float) -> float:
        means, ran_s = self._of(running.digest), now - running.began_s
        if running.first_s is None and means.token_s.value is None:
            turn_s = self._turn_s(running.digest)
            return max(turn_s - ran_s, LEFT * turn_s)
        usual = means.tokens.value or USUAL_TOKENS
        tokens = max(usual - running.said, LEFT * usual)
        if running.limit is not None:
            tokens = min(tokens, max(running.limit - running.said, 0))
        token_s = means.token_s.value
        if running.first_s is not None and (running.said >= MIN_SAID or token_s is None):
            token_s = (now - running.first_s) / running.said
        first_s = 0.0
        if running.first_s is None:
            usual_s = means.first_s.value or 0.0
            first_s = max(usual_s - ran_s, LEFT * usual_s)
        return first_s + tokens * (token_s or 0.0)

    def _turn_s(self, digest: Sha256) -> float:
        turn_s = self._of(digest).turn_s.value
        return USUAL_S if turn_s is None else turn_s

    def _of(self, digest: Sha256) -> _Means:
        means = self._means.get(digest)
        if means is None:
            means = self._means[digest] = _Means()
        self._means.move_to_end(digest)
        if len(self._means) > MAX_MODELS:
            self._means.popitem(last=False)
        return means
