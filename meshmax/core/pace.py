"""How long a peer that is answering may be silent, learnt from its own speed.

Two signs tell of a peer that has stopped. No frame at all, though a KeepAlive is due: the peer or the way to it is frozen
(`frame_silence_s`). Frames but no token: its engine hangs (`Gaps.deadline_s`, from the gaps between its tokens so far: several
times the usual one and more than the longest seen lately, as RFC 6298 does for retransmissions). Both raise a suspicion only:
another peer is asked beside, and whoever speaks first goes on, so that a false alarm costs work and nothing else. Time is
passed in. Not here: what a suspicion leads to (core.delivery), who sends KeepAlives (services.infer_server).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Device

KEEP_ALIVE_S: Final = 0.5  # silence after which a serving peer says that it is still at it; 100 bytes each
CALM_AFTER_S: Final = 10.0  # of silence; a long load or queue need not be told of as often
CALM_KEEP_ALIVE_S: Final = 2.0  # from then on: five hundred waiting requests cost a peer 250 frames a second, not 1000
FRAME_SILENCE_S: Final = (
    1.25  # two KeepAlives missed, and a half: the scheduler of a busy machine takes part of a second
)
CALM_FRAME_SILENCE_S: Final = 5.0  # the same of the calm ones

FIRST_GAP_S: Final = (
    5.0  # between tokens of a peer of which nothing is known: a large model on a small CPU takes a second
)
FLOOR_S: Final = 1.0  # another prompt read beside ours, or a busy machine, holds tokens up for most of a second
CEILING_S: Final = 20.0  # slower than a token in ten seconds nobody reads
MIN_GAPS: Final = 3  # fewer say nothing
DEVIATIONS: Final = 6.0  # RFC 6298 takes 4 for what it may lose; an alarm here costs a prompt read again
OF_LONGEST: Final = 2.0  # of the longest gap seen lately
LONGEST_HALF_LIFE_S: Final = 60.0  # in which the longest gap is forgotten by half
MAX_PACES: Final = 4096  # (peer, model, device) entries of about 300 bytes


def keep_alive_s(silent_s: float) -> float:
    """How long a serving peer that has had nothing to tell for ``silent_s`` waits before the next KeepAlive."""
    return KEEP_ALIVE_S if silent_s < CALM_AFTER_S else CALM_KEEP_ALIVE_S


def frame_silence_s(silent_s: float) -> float:
    """After how long without any frame a peer is suspected, that had told nothing for ``silent_s`` at the last one."""
    return FRAME_SILENCE_S if silent_s + KEEP_ALIVE_S < CALM_AFTER_S else CALM_FRAME_SILENCE_S


class Gaps:
    """The gaps between one peer's words (tokens that come together are one word), over all its answers."""

    __slots__ = ("_at_s", "_count", "_deviation_s", "_longest_s", "_mean_s")

    def __init__(self) -> None:
        self._count = 0
        self._mean_s = self._deviation_s = self._longest_s = 0.0
        self._at_s = -math.inf

    def add(self, gap_s: float, now: float) -> None:
        """The next word came ``gap_s`` after the one before, none of it spent waiting for whoever reads."""
        error_s = gap_s - self._mean_s
        if self._count:
            self._mean_s += error_s / 8
            self._deviation_s += (abs(error_s) - self._deviation_s) / 4
        else:
            self._mean_s, self._deviation_s = gap_s, gap_s / 2
        self._count += 1
        if gap_s * 4 > self._longest_s:  # the rest cannot be the longest, whatever time has passed in an answer
            past_s = self._longest_s * 0.5 ** (max(0.0, now - self._at_s) / LONGEST_HALF_LIFE_S)
            self._longest_s, self._at_s = max(gap_s, past_s), now

    def deadline_s(self) -> float:
        """A longer silence than this is none of its usual ones: FLOOR_S to CEILING_S."""
        if self._count < MIN_GAPS:
            return FIRST_GAP_S
        usual_s = self._mean_s + DEVIATIONS * self._deviation_s
        return min(max(usual_s, OF_LONGEST * self._longest_s, FLOOR_S), CEILING_S)


class Paces:
    """The bounded table of Gaps, by peer, model and device; those not used for longest go first."""

    __slots__ = ("_gaps",)

    def __init__(self) -> None:
        self._gaps: OrderedDict[tuple[PeerId, Sha256, Device], Gaps] = OrderedDict()

    def of(self, peer: PeerId, digest: Sha256, device: Device) -> Gaps:
        """The gaps of ``peer`` with this model on this device; new ones where there are none yet."""
        key = (peer, digest, device)
        gaps = self._gaps.setdefault(key, Gaps())
        self._gaps.move_to_end(key)
        if len(self._gaps) > MAX_PACES:
            self._gaps.popitem(last=False)
        return gaps
