"""Overlays of meshes that a bootstrap node serves without being in them: how many, and which one gives way.

A node serves them as hints: it cannot judge who is a member, the members do. Each has small bounds of its own. A new one
takes the place of the one that was used longest ago, by somebody who had proven his address: what spoofed datagrams bring is used
by nobody and goes first. One that is in use gives way only if it has few nodes; one source may bring few.
Not here: datagrams, rules of an overlay (dht_protocol).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from meshmax.net.dht_endpoint import Endpoint
from meshmax.net.dht_protocol import DhtProtocol

OTHER_RECORDS: Final = 2048  # of one such overlay
IN_USE_S: Final = 7200.0  # an overlay was used so lately: it has nodes that renew themselves in that time
MAX_FROM_SOURCE: Final = 8  # overlays that one subnet may have brought
MAX_OTHERS: Final = 256  # at 2,048 records each 400 MB at the very worst, some 10 MB in practice


class Overlays:
    """``make(tag, max_records)`` makes the protocol of an overlay."""

    def __init__(self, endpoint: Endpoint, most: int, make: Callable[[bytes, int], DhtProtocol]) -> None:
        self._endpoint, self._most, self._make = endpoint, min(most, MAX_OTHERS), make
        self._others: dict[bytes, tuple[DhtProtocol, str]] = {}
        endpoint.adopt_with(self._adopt)

    def __len__(self) -> int:
        return len(self._others)

    @property
    def protocols(self) -> list[DhtProtocol]:
        """Of all that are served."""
        return [protocol for protocol, _ in self._others.values()]

    def _adopt(self, tag: bytes, source: str) -> DhtProtocol | None:
        """Serve the overlay ``tag``, of which ``source`` asked; None if there is no room."""
        brought = Counter(origin for _, origin in self._others.values())
        if not self._most or brought[source] >= MAX_FROM_SOURCE or not self._make_room():
            return None
        protocol = self._make(tag, OTHER_RECORDS)
        self._others[tag] = protocol, source
        self._endpoint.attach(tag, protocol)
        return protocol

    def _make_room(self) -> bool:
        if len(self._others) < self._most:
            return True
        oldest = min(self._others, key=lambda tag: self._others[tag][0].touched_s)
        protocol, _ = self._others[oldest]
        if protocol.touched_s > trio.current_time() - IN_USE_S and len(protocol.router) > 1:
            return False
        del self._others[oldest]
        self._endpoint.detach(oldest)
        return True
