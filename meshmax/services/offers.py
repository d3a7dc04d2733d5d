"""What we have promised of every blob that we serve: one core.offer.Offer a blob, for tasks and for threads of lanes.

`ask` comes before a chunk is sent, `sent` after it. The table is bounded: the blob served longest ago is forgotten, which
costs at most a few second copies. Not here: the rule (core.offer), sending.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from meshmax.base.ids import PeerId, Sha256
from meshmax.core.offer import Offer

MAX_OFFERS: Final = 256  # blobs; there are 128 sessions and 64 lanes


class Offers:
    """Every method is thread-safe and takes microseconds. ``clock``: seconds, callable in every thread that asks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._offers: OrderedDict[Sha256, Offer] = OrderedDict()

    def ask(self, digest: Sha256, peer: PeerId, index: int) -> float:
        """We are about to send a chunk to ``peer``: 0.0 to do so, else answer with Busy and these seconds."""
        with self._lock:
            return self._offer(digest).ask(peer, index, self._clock())

    def sent(self, digest: Sha256, took_s: float) -> None:
        """A chunk was sent, ``took_s`` after `ask`, waiting for our bandwidth included."""
        with self._lock:
            self._offer(digest).sent(took_s, self._clock())

    def lost(self, digest: Sha256, peer: PeerId, index: int) -> None:
        """What `ask` allowed was not sent: cancelled, or not readable."""
        with self._lock:
            self._offer(digest).lost(peer, index)

    def gone(self, digest: Sha256, peer: PeerId) -> None:
        """``peer`` was lost in the middle: what it got is nobody's."""
        with self._lock:
            self._offer(digest).gone(peer)

    def _offer(self, digest: Sha256) -> Offer:
        offer = self._offers.get(digest)
        if offer is None:
            while len(self._offers) >= MAX_OFFERS:
                self._offers.popitem(last=False)
            offer = self._offers[digest] = Offer()
        self._offers.move_to_end(digest)
        return offer
