"""One rung of the ladder of discovery as a record: whom it named, how often it failed, when it is climbed again.

Rules. A failed rung is climbed again after a pause that doubles with each failure in a row, from FIRST_PAUSE_S to
MOST_PAUSE_S; having run well for longer than the longest pause, or a change of the network, starts afresh. A rung that ends
by itself has nothing to do and is off. Whom it named is remembered for the doctor and for peers that look back, MOST_SEEN of
them, the longest unmentioned forgotten first. A look counts what was named since somebody asked for one. Not here: running
it (services.ladder), whom to dial (core.peers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshmax.base.discovery import RungReport, SeenBy
from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.core.backoff import Random, backoff_s

FIRST_PAUSE_S: Final = 1.0
MOST_PAUSE_S: Final = 30.0
MOST_SEEN: Final = 1024  # peers remembered of one rung; four times the largest usual table of peers
MAX_PROBLEM: Final = 300  # characters; it is a sentence, and may come from a library


class RungRecord:
    """See the module. Times are monotonic seconds."""

    __slots__ = (
        "_failures",
        "_first_found_s",
        "_forgotten",
        "_look",
        "_look_at",
        "_look_first_s",
        "_problem",
        "_restarts",
        "_running_since",
        "_seen",
        "_started_at",
        "_state",
        "name",
    )

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self._started_at = self._running_since = self._look_at = now
        self._state = "working"
        self._problem = ""
        self._failures = self._restarts = self._forgotten = 0
        self._first_found_s: float | None = None
        self._look_first_s: float | None = None
        self._look: set[PeerId] = set()
        self._seen: dict[PeerId, tuple[tuple[str, ...], float]] = {}

    # --- events ------------------------------------------------------------------------------------------------------

    def on_started(self, now: float) -> None:
        """It is climbed, for the first time or again."""
        self._running_since = now

    def on_found(self, peer_id: PeerId, addresses: Sequence[str], now: float) -> None:
        """It named a peer."""
        if self._first_found_s is None:
            self._first_found_s = now - self._started_at
        if self._look_first_s is None:
            self._look_first_s = now - self._look_at
        if len(self._look) < MOST_SEEN:
            self._look.add(peer_id)
        self._seen.pop(peer_id, None)
        self._seen[peer_id] = (tuple(addresses)[:MAX_ADDRESSES], now)
        if len(self._seen) > MOST_SEEN:
            del self._seen[next(iter(self._seen))]
            self._forgotten += 1
        self._state, self._problem, self._failures = "working", "", 0

    def on_failed(self, problem: str, now: float, random: Random) -> float:
        """It ended with an error; the seconds to wait before it is climbed again."""
        self._failures = 1 if now - self._running_since > MOST_PAUSE_S else self._failures + 1
        self._restarts += 1
        self._state, self._problem = "failing", problem[:MAX_PROBLEM]
        return backoff_s(self._failures, FIRST_PAUSE_S, MOST_PAUSE_S, random)

    def on_ended(self) -> None:
        """It has nothing to do."""
        self._state, self._problem = "off", ""

    def on_network_change(self) -> None:
        """What failed may work now: the pauses start afresh."""
        self._failures = 0

    def on_look(self, now: float) -> None:
        """Somebody wants to know what it finds from now on."""
        self._look_at, self._look_first_s = now, None
        self._look.clear()

    def on_mesh_change(self, now: float) -> None:
        """We are of another mesh: whom it named before was of the old one."""
        self._started_at, self._first_found_s, self._forgotten = now, None, 0
        self._seen.clear()
        self.on_look(now)

    # --- what is -----------------------------------------------------------------------------------------------------

    def report(self, problem: str = "", now: float | None = None) -> RungReport:
        """The rung now. ``problem``: what it complains of itself while it runs; it counts only then.

        A rung that failed, and has run again for longer than its longest pause by ``now``, works.
        """
        state, why = self._state, self._problem
        if state == "failing" and now is not None and now - self._running_since > MOST_PAUSE_S:
            state, why = "working", ""
        if state == "working" and problem:
            state, why = "failing", problem[:MAX_PROBLEM]
        found = len(self._seen) + self._forgotten
        return RungReport(self.name, state, why, found, self._first_found_s, self._restarts)  # type: ignore[arg-type]

    def looked(self) -> tuple[int, float | None]:
        """(peers named since the last `on_look`, seconds until the first of them)."""
        return len(self._look), self._look_first_s

    def seen(self, peer_id: PeerId, now: float) -> SeenBy | None:
        """When and where it last named a peer; None if it did not."""
        if (found := self._seen.get(peer_id)) is None:
            return None
        addresses, at = found
        return SeenBy(self.name, addresses, max(now - at, 0.0))
