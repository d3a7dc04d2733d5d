"""How much of models goes over relays: a little, since a relay's owner pays for it and prompts need the room.

Rules. Chunks that come or go over relayed connections are counted by peer: RELAY_BLOB_BYTES in an hour that begins with the first
of them. Who fetches asks for no more, who serves sends no more, whatever it is asked; where who serves has counted more, its
word ends the share of this hour. They are sent at RELAY_BLOB_BYTES_PER_S,
half of what a relay lets through, so that heartbeats and prompts are not held up. Manifests and chunk maps are not counted. Of
more than MAX_PEERS peers the one whose hour began first is forgotten. Time is passed in. Not here: what a relay itself allows
(core.relay).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.ids import PeerId
from meshmax.base.units import KIB, MIB
from meshmax.core.bucket import Bucket

RELAY_BLOB_BYTES: Final = 32 * MIB  # of one peer in RELAY_HOUR_S; a tokenizer or an adapter, not a model
RELAY_HOUR_S: Final = 3600.0
RELAY_BLOB_BYTES_PER_S: Final = 64 * KIB
RELAY_PIECE_BYTES: Final = 16 * KIB  # sent at once: a quarter of a second
MAX_PEERS: Final = 1024


class _Hour:
    """One peer's."""

    __slots__ = ("began_s", "bucket", "bytes")

    def __init__(self, began_s: float) -> None:
        self.began_s, self.bytes = began_s, 0
        self.bucket = Bucket(RELAY_BLOB_BYTES_PER_S)


class RelayQuota:
    """What of chunks has gone over relays, one way."""

    __slots__ = ("_hours",)

    def __init__(self) -> None:
        self._hours: dict[PeerId, _Hour] = {}  # the one that began first is first

    def left_bytes(self, peer: PeerId, now: float) -> int:
        """How much more may be moved in this hour."""
        hour = self._of(peer, now)
        return max(0, RELAY_BLOB_BYTES - hour.bytes) if hour else RELAY_BLOB_BYTES

    def wait_s(self, peer: PeerId, size_bytes: int, now: float) -> float:
        """Seconds until so much may be moved; 0.0: now."""
        hour = self._of(peer, now)
        if hour is None or hour.bytes + size_bytes <= RELAY_BLOB_BYTES:
            return 0.0
        return hour.began_s + RELAY_HOUR_S - now

    def note(self, peer: PeerId, size_bytes: int, now: float) -> None:
        """So much was moved, or is about to be."""
        hour = self._of(peer, now)
        if hour is None:
            hour = self._hours[peer] = _Hour(now)
            if len(self._hours) > MAX_PEERS:
                del self._hours[next(iter(self._hours))]
        hour.bytes += size_bytes

    def refused(self, peer: PeerId, retry_after_s: float, now: float) -> None:
        """It gives no more for ``retry_after_s``, RELAY_HOUR_S at most: by its count the share is used up."""
        self._hours.pop(peer, None)
        self.note(peer, RELAY_BLOB_BYTES, now - RELAY_HOUR_S + min(max(retry_after_s, 0.0), RELAY_HOUR_S))

    def pace_s(self, peer: PeerId, size_bytes: int, now: float) -> float:
        """Seconds to wait before these bytes, which were noted, may go out; they count from now on."""
        hour = self._of(peer, now)
        return hour.bucket.reserve(size_bytes, now) if hour else 0.0

    def _of(self, peer: PeerId, now: float) -> _Hour | None:
        hour = self._hours.get(peer)
        if hour is not None and now >= hour.began_s + RELAY_HOUR_S:
            del self._hours[peer]
            return None
        return hour
