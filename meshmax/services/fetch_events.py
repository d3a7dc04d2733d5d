"""What the sources of one blob tell the owner of its fetch, and the inbox in which it finds it.

Everything belongs to trio's thread. The inbox is bounded by what is asked: a want has one last word, a session one offer
that is not taken yet, and one Gone. The owner takes all that has come in one go, since lanes bring chunks by the dozen.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import trio

from meshmax.base.errors import MeshmaxError, StoreError
from meshmax.base.ids import PeerId


class Offered(msgspec.Struct, frozen=True):
    """The source has said (anew) what it has: `Session.offer_taken`."""

    peer: PeerId


class Stored(msgspec.Struct, frozen=True):
    """A chunk of ``size`` bytes came and is in its place, perhaps not yet marked; or it is not needed any more."""

    peer: PeerId
    index: int
    size: int


class Bad(msgspec.Struct, frozen=True):
    """What came is not the chunk."""

    peer: PeerId
    index: int
    size: int


class Lacking(msgspec.Struct, frozen=True):
    """The source does not have the chunk."""

    peer: PeerId
    index: int


class Paused(msgspec.Struct, frozen=True):
    """The source is busy."""

    peer: PeerId
    index: int
    retry_after_s: float


class Withdrawn(msgspec.Struct, frozen=True):
    """The source sends no more of a cancelled chunk, of which ``wasted`` bytes had come."""

    peer: PeerId
    index: int
    wasted: int


class Unwritten(msgspec.Struct, frozen=True):
    """A chunk came and could not be written: the fetch cannot go on."""

    peer: PeerId
    error: StoreError


class Gone(msgspec.Struct, frozen=True):
    """The session is over. ``error`` None: the source ended it in order."""

    peer: PeerId
    error: MeshmaxError | None


SourceEvent: TypeAlias = Offered | Stored | Bad | Lacking | Paused | Withdrawn | Unwritten | Gone


class Inbox:
    """One reader, many writers, one thread."""

    def __init__(self) -> None:
        self._events: list[SourceEvent] = []
        self._some = trio.Event()

    def put(self, event: SourceEvent) -> None:
        """Tell the owner."""
        self._events.append(event)
        self._some.set()

    def rest(self) -> list[SourceEvent]:
        """What has not been taken, at the end of a fetch."""
        events, self._events = self._events, []
        return events

    async def take(self) -> list[SourceEvent]:
        """Wait until there is something, then all of it, in order."""
        await self._some.wait()
        self._some = trio.Event()
        events, self._events = self._events, []
        return events
