"""Peers that failed and come back: a new connection, or a restart, is news to the circuit breakers.

Not here: what they make of it (core.breaker).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import trio

from meshmax.base.ids import PeerId
from meshmax.core.breaker import Breakers
from meshmax.ports import Presence

MAX_FAILED: Final = 64  # peers that are looked after; of more, those that failed last


class Comebacks:
    """The peers of one node that failed lately, as they were last seen."""

    def __init__(self, presence: Presence, breakers: Breakers) -> None:
        self._presence, self._breakers = presence, breakers
        self._failed: OrderedDict[PeerId, tuple[bool, str]] = OrderedDict()  # whether connected, its instance

    def on_failed(self, peer: PeerId) -> None:
        """``peer`` failed just now."""
        self._failed[peer] = self._seen(peer)
        self._failed.move_to_end(peer)
        if len(self._failed) > MAX_FAILED:
            self._failed.popitem(last=False)

    def look(self) -> None:
        """Tell the breakers who has come back since the last look; to call when a peer came, went or said something."""
        for peer, (was_there, was) in tuple(self._failed.items()):
            there, instance = seen = self._seen(peer)
            restarted = there and bool(was) and instance not in ("", was)
            if restarted or (there and not was_there):
                self._breakers.on_returned(peer, trio.current_time(), restarted=restarted)
            self._failed[peer] = seen if instance else (there, was)

    def _seen(self, peer: PeerId) -> tuple[bool, str]:
        view = self._presence.view(peer)
        if view is None:
            return False, ""
        return view.state != "offline", view.status.instance if view.status else ""
