"""How often whom we look back at: each peer LOOKS at once and one more every REFILL_S, PLACES questions at a time in all.

So that nobody makes us knock at doors without end. The table of peers is bounded: beyond MAX_PEERS the one that asked longest ago
is forgotten, which lets a crowd of that size ask more often, each at its own address only. Not here: the asking.
"""

from __future__ import annotations

from typing import Final

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId

LOOKS: Final = 4  # a person who runs the doctor again and again meets no limit
REFILL_S: Final = 3.0  # as long as a visit takes at least
PLACES: Final = 8  # each has up to two sockets open for two seconds
MAX_PEERS: Final = 512


class LookGate:
    """See the module. Times are monotonic seconds."""

    __slots__ = ("_inside", "_room")

    def __init__(self) -> None:
        self._room: dict[PeerId, tuple[float, float]] = {}
        self._inside = 0

    def enter(self, peer_id: PeerId, now: float) -> None:
        """Let a question of this peer in; `leave` when it is answered. Raises Busy with the time to wait."""
        room, at = self._room.pop(peer_id, (float(LOOKS), now))
        room = min(room + (now - at) / REFILL_S, float(LOOKS))
        self._room[peer_id] = (room, now)
        if room < 1.0:
            raise Busy("you asked often just now", (1.0 - room) * REFILL_S)
        if self._inside >= PLACES:
            raise Busy("many ask at this moment", 1.0)
        self._room[peer_id] = (room - 1.0, now)
        self._inside += 1
        while len(self._room) > MAX_PEERS:
            del self._room[next(iter(self._room))]

    def leave(self) -> None:
        """A question was answered, or its asker left."""
        self._inside -= 1
