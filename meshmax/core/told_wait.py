"""What a peer's word on its waits is worth: aged, and corrected by how long we really waited there. Sans-IO.

Rules. A word goes down with the time since it was told, to KEPT of it: what has not ended yet may take as long again, and a peer
tells when something ended. One older than OLD_S counts for nothing. Each wait of ours that followed a word corrects the next ones
by what we waited over what was told, with a second on both sides (`CALM_S`), so that one that tells 0 and lets us wait is
found out as well as one that exaggerates; both within bounds. What we sent since the word was told comes on top
(core.estimate). Bounded by MAX_PEERS. Not here: what a peer tells (core.slot_wait).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import MAX_WAIT_S, Load
from meshmax.core.contender import ToldWait

MAX_PEERS: Final = 1024  # four times the peers a node knows at once by default
KEPT: Final = 0.5  # of a word, however old it is: answers that last have about as much left
OLD_S: Final = 30.0  # twice the time after which a neighbour tells its load in any case
CALM_S: Final = 1.0  # a short wait that was told as none is no lie
WEIGHT: Final = 0.1  # of the newest wait: each is one of many that a word stands for
LEAST: Final = 0.5  # a peer that exaggerates is believed half of it; it loses prompts by that, nobody else does
MOST: Final = 60.0  # times CALM_S: one that says 0 is taken to let us wait that long, if it did


class _Word:
    __slots__ = ("at_s", "real_s", "sequence", "told_s")

    def __init__(self) -> None:
        self.sequence: int | None = None  # of the newest word
        self.at_s = -math.inf  # when we first saw it
        self.told_s = self.real_s = CALM_S


class ToldWaits:
    """The words of all peers, for one node."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: OrderedDict[PeerId, _Word] = OrderedDict()

    def of(
        self, peer: PeerId, digest: Sha256, sequence: int | None, load: Load, sent: int, now: float
    ) -> ToldWait | None:
        """What ``peer`` told of this model in its status ``sequence`` (None: just now); None where it tells nothing that counts.

        ``sent``: how many more requests of ours are there than it could know, or fewer (negative).
        """
        wait = next((each for each in load.waits if each.digest == digest), None)
        if wait is None or not 0.0 <= wait.wait_s <= MAX_WAIT_S:
            return None
        word = self._word(peer)
        if sequence is None or sequence != word.sequence:
            word.sequence, word.at_s = sequence, now
        age_s = max(0.0, now - word.at_s)
        if age_s > OLD_S:
            return None
        told_s = max(wait.wait_s - age_s, KEPT * wait.wait_s)
        factor = min(max(word.real_s / word.told_s, LEAST), MOST)
        wait_s = min(max((told_s + CALM_S) * factor - CALM_S, 0.0), MAX_WAIT_S)
        return ToldWait(wait_s, told_s, min(max(wait.free, 0), max(load.capacity, 1)), max(wait.queued, 0), sent)

    def on_waited(self, peer: PeerId, told: ToldWait | None, waited_s: float) -> None:
        """We asked when ``told`` was the word, and waited so long for a slot; what we had sent meanwhile is not its fault."""
        if told is None or told.sent > 0 or not math.isfinite(waited_s):
            return
        word = self._word(peer)
        word.told_s += WEIGHT * (min(told.told_s, MAX_WAIT_S) + CALM_S - word.told_s)
        word.real_s += WEIGHT * (min(max(waited_s, 0.0), MAX_WAIT_S) + CALM_S - word.real_s)

    def _word(self, peer: PeerId) -> _Word:
        word = self._words.setdefault(peer, _Word())
        self._words.move_to_end(peer)
        if len(self._words) > MAX_PEERS:
            self._words.popitem(last=False)
        return word
