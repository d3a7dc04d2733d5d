"""How long a peer that is answering may be silent, learnt from its own speed.

Two signs tell of a peer that has stopped. No frame at all, though a KeepAlive is due: the peer or the way to it is frozen
(`frame_silence_s`). Frames but no token: its engine hangs (`Gaps.deadline_s`, from the gaps between its tokens so far: several
times the usual one and more than the longest seen lately, as RFC 6298 does for retransmissions). Both raise a suspicion only:
another peer is asked beside, and whoever speaks first goes on, so that a false alarm costs work and nothing else. On a machine
that is too busy all peers fall silent at once, and asking others makes it worse: so the usual gaps between frames are learnt,
too, and each false alarm makes us more patient with everybody for a while (`Alarms`). Time is passed in. Not here: what a
suspicion leads to (core.delivery), who sends KeepAlives (services.infer_server).
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
FRAME_CEILING_S: Final = 4.0  # however slow frames are: a client should not wait for more than five seconds
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
ALARM_HALF_LIFE_S: Final = 60.0  # in which false alarms are forgotten by half
FALSE_ALARM: Final = 1.25  # times the patience after each: six of them, and we wait as long as we ever do
TRUE_ALARM: Final = 0.9
MAX_PATIENCE: Final = 4.0  # times any deadline, after false alarms of this peer and of others
MAX_PACES: Final = 4096  # (peer, model, device) entries of about 300 bytes


def keep_alive_s(silent_s: float) -> float:
    """How long a serving peer that has had nothing to tell for ``silent_s`` waits before the next KeepAlive."""
    return KEEP_ALIVE_S if silent_s < CALM_AFTER_S else CALM_KEEP_ALIVE_S


def frame_silence_s(silent_s: float) -> float:
    """After how long without any frame a peer is suspected, that had told nothing for ``silent_s`` at the last one."""
    return FRAME_SILENCE_S if silent_s + KEEP_ALIVE_S < CALM_AFTER_S else CALM_FRAME_SILENCE_S


class Gaps:
    """The gaps between one peer's words (tokens that come together are one word), over all its answers."""

    __slots__ = ("_at_s", "_ceiling_s", "_count", "_deviation_s", "_first_s", "_floor_s", "_longest_s", "_mean_s")

    def __init__(self, first_s: float = FIRST_GAP_S, floor_s: float = FLOOR_S, ceiling_s: float = CEILING_S) -> None:
        """``first_s``: the deadline as long as too few gaps were seen."""
        self._first_s, self._floor_s, self._ceiling_s = first_s, floor_s, ceiling_s
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
        if gap_s > self._longest_s or now - self._at_s > LONGEST_HALF_LIFE_S / 8:  # tokens are many, so not each time
            past_s = self._longest_s * 0.5 ** (max(0.0, now - self._at_s) / LONGEST_HALF_LIFE_S)
            self._longest_s, self._at_s = max(gap_s, past_s), now

    def deadline_s(self) -> float:
        """A longer silence than this is none of its usual ones."""
        if self._count < MIN_GAPS:
            return self._first_s
        usual_s = self._mean_s + DEVIATIONS * self._deviation_s
        return min(max(usual_s, OF_LONGEST * self._longest_s, self._floor_s), self._ceiling_s)


def frame_gaps() -> Gaps:
    """The gaps between one peer's frames of any kind, KeepAlives too."""
    return Gaps(FRAME_SILENCE_S, FRAME_SILENCE_S, FRAME_CEILING_S)


class Alarms:
    """How many suspicions were false lately, as a factor for all deadlines: 1 (none) to MAX_PATIENCE."""

    __slots__ = ("_at_s", "_factor")

    def __init__(self) -> None:
        self._factor, self._at_s = 1.0, -math.inf

    def factor(self, now: float) -> float:
        """By how much deadlines are longer now."""
        if self._factor == 1.0:
            return 1.0
        past: float = 0.5 ** (max(0.0, now - self._at_s) / ALARM_HALF_LIFE_S)
        return 1.0 + (self._factor - 1.0) * past

    def on_alarm(self, now: float, *, false: bool) -> None:
        """A peer that was suspected spoke again (``false``), or another one went on in its place."""
        factor = self.factor(now) * (FALSE_ALARM if false else TRUE_ALARM)
        self._factor, self._at_s = min(max(factor, 1.0), MAX_PATIENCE), now


class Paces:
    """The bounded tables of Gaps, by peer, model and device, and by peer; those not used for longest go first."""

    __slots__ = ("_frames", "_gaps", "alarms")

    def __init__(self) -> None:
        self.alarms = Alarms()
        self._frames: OrderedDict[PeerId, Gaps] = OrderedDict()
        self._gaps: OrderedDict[tuple[PeerId, Sha256, Device], Gaps] = OrderedDict()

    def of(self, peer: PeerId, digest: Sha256, device: Device) -> Gaps:
        """The gaps of ``peer`` with this model on this device; new ones where there are none yet."""
        key = (peer, digest, device)
        gaps = self._gaps.setdefault(key, Gaps())
        self._gaps.move_to_end(key)
        if len(self._gaps) > MAX_PACES:
            self._gaps.popitem(last=False)
        return gaps

    def frames(self, peer: PeerId) -> Gaps:
        """The gaps between frames of ``peer``; new ones where there are none yet."""
        gaps = self._frames.get(peer)
        if gaps is None:
            gaps = self._frames[peer] = frame_gaps()
        self._frames.move_to_end(peer)
        if len(self._frames) > MAX_PACES:
            self._frames.popitem(last=False)
        return gaps
