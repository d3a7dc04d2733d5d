"""How long a peer that has just started may not have met the others yet: until then what nobody has may still turn up.

Rules. A rung of discovery counts while it is climbed and has somebody to ask: mDNS, given addresses, bootstrap nodes; also where
it fails for the moment, since it is climbed again and may find some all the same (mDNS without a network those on this
machine). One that only remembers (peers of former days, the DHT) counts as soon as it has named anybody. Where none counts
BEGIN_S after the start there is nobody to be met, and after FIRST_S whoever was not met is not near. Pure. Not here: who waits
(services.first_moments), the rungs themselves (services.ladder).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from meshmax.base.discovery import RungReport

FIRST_S: Final = 3.0  # of two that see each other one lets the other dial for a second; then come a dial and a status
BEGIN_S: Final = 0.2  # by then every rung is climbed, and has named whom it remembers
_REMEMBERS: Final = frozenset({"cached", "dht"})


def first_left_s(began_s: float, rungs: Iterable[RungReport], now: float) -> float:
    """The seconds to wait for others before this is asked again; 0.0: whoever is near is known. Times are monotonic."""
    left_s = began_s + FIRST_S - now
    if left_s <= 0.0:
        return 0.0
    return left_s if any(map(_counts, rungs)) else max(0.0, began_s + BEGIN_S - now)


def _counts(rung: RungReport) -> bool:
    return rung.state != "off" and (rung.found > 0 or rung.name not in _REMEMBERS)
