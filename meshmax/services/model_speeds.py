"""How fast models answered and loaded on this node since it started: an EWMA for each, fed by what loads and answers took.

Not here: the EWMA (core.speed), how fast other peers are (core.measurements).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import msgspec
import trio

from meshmax.base.ids import Sha256
from meshmax.base.inference import Finish
from meshmax.base.status import Speed
from meshmax.core.speed import speed_after_answer, speed_after_load

MAX_MEASURED: Final = 256  # models whose rates are remembered; the one measured longest ago is forgotten first


class ModelSpeeds:
    """See the module."""

    def __init__(self) -> None:
        self._speeds: OrderedDict[Sha256, Speed] = OrderedDict()

    def speed(self, digest: Sha256) -> Speed:
        """What was measured of a model, loaded now or not."""
        return self._speeds.get(digest, Speed())

    def on_load(self, digest: Sha256, took_s: float) -> None:
        """It was loaded."""
        self._remember(digest, speed_after_load(self.speed(digest), took_s))

    def measured(self, digest: Sha256, finish: Finish, begun: float, load_s: float) -> Finish:
        """The end of an answer counts: ``finish`` with the ``load_s`` that it waited and all the time since ``begun``."""
        self._remember(digest, speed_after_answer(self.speed(digest), finish))
        # An engine that brings its models along loads them by itself, and tells how long that took.
        total_s = trio.current_time() - begun
        return msgspec.structs.replace(finish, load_s=load_s + finish.load_s, total_s=total_s)

    def _remember(self, digest: Sha256, speed: Speed) -> None:
        self._speeds[digest] = speed
        self._speeds.move_to_end(digest)
        if len(self._speeds) > MAX_MEASURED:
            self._speeds.popitem(last=False)
