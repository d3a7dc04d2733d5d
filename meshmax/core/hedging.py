"""When a second peer is asked beside the first, and how much of that we may do.

Rules. What counts is how much longer than expected first tokens take: the ratio of the time until the first event to the
estimate of it (round trip, queue, load, prompt), whose 95th percentile over the last answers is kept per peer and over all
(J. Dean and L. Barroso, "The Tail at Scale": hedged requests after the 95th percentile). A load or a queue that was expected
is thus no reason. At most SHARE of all requests are hedged, by a bucket that each request fills a little; the later a first
token, the more of it may be used, since one request in twenty is a little late in any case. Time is passed in.
Not here: whom to ask (core.routing), what becomes of the two (core.delivery).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from meshmax.base.ids import PeerId

QUANTILE: Final = 0.95
SHARE: Final = 0.05  # of requests that may be sent twice
MAX_CREDIT: Final = 5.0  # hedges that may be saved up: a hundred requests without one
WINDOW: Final = 64  # of one peer's answers; three of them are above the 95th percentile
ALL_WINDOW: Final = 256  # of everybody's
MIN_SAMPLES: Final = 20  # fewer have no 95th percentile
USUAL_RATIO: Final = 3.0  # until there are enough: estimates from advertised figures are that far off
MIN_RATIO: Final = 1.2  # however well estimates hold: a little late is not late
MAX_RATIO: Final = 20.0
FLOOR_S: Final = 0.1  # a sooner hedge would be asked when the first token is on its way
MIN_EXPECTED_S: Final = 0.01  # of a ratio; below that it is a matter of the scheduler
MAX_PEERS: Final = 1024
LEFT_OVER: Final = (1.0, 0.0, -1.0)  # credit that stays after a hedge of something just late, later, and very late


class FirstTokens:
    """How late first tokens came, against what was expected; bounded by MAX_PEERS windows."""

    __slots__ = ("_all", "_cached", "_peers")

    def __init__(self) -> None:
        self._all: deque[float] = deque(maxlen=ALL_WINDOW)
        self._peers: OrderedDict[PeerId, deque[float]] = OrderedDict()
        self._cached: dict[PeerId | None, float] = {}

    def add(self, peer: PeerId, expected_s: float, waited_s: float) -> None:
        """``peer`` was expected to speak after ``expected_s`` and did after ``waited_s``, or was given up then for another."""
        ratio = min(waited_s / max(expected_s, MIN_EXPECTED_S), MAX_RATIO)
        window = self._peers.setdefault(peer, deque(maxlen=WINDOW))
        self._peers.move_to_end(peer)
        window.append(ratio)
        self._all.append(ratio)
        self._cached.pop(peer, None)
        self._cached.pop(None, None)
        if len(self._peers) > MAX_PEERS:
            self._cached.pop(self._peers.popitem(last=False)[0], None)

    def late_s(self, peer: PeerId, expected_s: float) -> float:
        """After how long without a word ``peer`` is late that was expected to speak after ``expected_s``."""
        window = self._peers.get(peer, ())
        if len(window) >= MIN_SAMPLES:
            ratio = self._quantile(peer, window)
        elif len(self._all) >= MIN_SAMPLES:
            ratio = self._quantile(None, self._all)
        else:
            ratio = USUAL_RATIO
        return max(max(ratio, MIN_RATIO) * max(expected_s, MIN_EXPECTED_S), FLOOR_S)

    def _quantile(self, key: PeerId | None, samples: deque[float] | tuple[float, ...]) -> float:
        if key not in self._cached:
            ordered = sorted(samples)
            self._cached[key] = ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)]
        return self._cached[key]


class Budget:
    """At most SHARE extra requests, over any stretch but for MAX_CREDIT saved up and one borrowed."""

    __slots__ = ("_credit",)

    def __init__(self) -> None:
        self._credit = 1.0

    def on_request(self) -> None:
        """A request came in."""
        self._credit = min(self._credit + SHARE, MAX_CREDIT)

    def try_spend(self, lateness: int) -> bool:
        """Whether one more may be sent twice; if so it counts as sent. ``lateness``: 0 for just late, 1 twice that, 2 more.

        What is just late is common, so it gets what is left over; what is very late may borrow.
        """
        if self._credit - 1.0 < LEFT_OVER[min(lateness, len(LEFT_OVER) - 1)] - 1e-9:
            return False
        self._credit -= 1.0
        return True
