"""How connections end that a better one has made superfluous: in peace, when no stream of either side is on them any more.

Rules: the best link of a peer is ended here only if it is dead. A peer that makes a worse one may have lost it, as when it
moved to another network: so it is asked about, and cut when nothing at all comes on it within LINK_PROBE_S. Any other link
that has had no stream for LINK_IDLE_S is asked about at its other end; it is cut when nothing is open there either (a reader
may be slower than we, and what we wrote last may still be on its way) and it is not the best one there, which it may be where
two links have the same path. Who does not answer within LINK_ASK_TIMEOUT_S is gone from that link, which is cut, too; who does
not know the question keeps it. Shared by the real swarm and the one in memory. Not here: which link is the best (net.links),
how a stream is opened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Generic, Protocol, TypeVar

import trio

from meshmax.base.errors import Busy, MeshmaxError, VersionMismatch
from meshmax.base.ids import PeerId
from meshmax.net import limits
from meshmax.net.links import LinkTable

_SOON_S: Final = 0.001  # less is no wait; the difference of two readings of a clock may be too small to be slept


class HasStreams(Protocol):
    """A connection with streams on it."""

    streams: int  # open now, of either side, also those being opened or closed; not those that only ask about the link
    idle_since: float  # monotonic seconds; when the last one was closed

    @property
    def heard_s(self) -> float:
        """Monotonic seconds; when anything came on it last."""
        ...

    def cut(self) -> None:
        """End it now."""
        ...


L = TypeVar("L", bound=HasStreams)


class Draining(Generic[L]):
    """Ends the links of ``table`` that are superfluous; each has a task in ``nursery`` until it has ended or is needed again."""

    def __init__(self, nursery: trio.Nursery, table: LinkTable[L], ask: Callable[[L], Awaitable[bool]]) -> None:
        """``ask`` has the other end say what `may_end` says there. It raises MeshmaxError."""
        self._nursery, self._table, self._ask = nursery, table, ask
        self._draining: set[L] = set()
        self._known: dict[PeerId, frozenset[L]] = {}

    def look(self, peer_id: PeerId) -> None:
        """The peer's links are others than before."""
        links, known = self._table.of(peer_id), self._known.pop(peer_id, frozenset())
        if links:
            self._known[peer_id] = frozenset(links)
            if links[-1] in known and set(links) - known:
                self._nursery.start_soon(self._probe, links[-1])
        for link in links[:-1]:
            if link not in self._draining:
                self._draining.add(link)
                self._nursery.start_soon(self._drain, link)

    def may_end(self, link: L) -> bool:
        """Whether nothing of ours is on the link, and we would not put anything there."""
        return not link.streams and self._table.is_spare(link)

    async def _probe(self, link: L) -> None:
        """Cut the link if it is dead."""
        began = trio.current_time()
        until = max(began + limits.LINK_ANSWER_S, link.heard_s + limits.LINK_PROBE_S)
        with trio.move_on_at(until) as scope, suppress(MeshmaxError):  # an error is an answer
            await self._ask(link)
        if scope.cancelled_caught and link.heard_s <= began:
            link.cut()

    async def _drain(self, link: L) -> None:
        try:
            while self._table.is_spare(link):
                wait_s = self._wait_s(link)
                if wait_s <= _SOON_S:
                    await self._try_end(link)
                    wait_s = limits.LINK_IDLE_S
                await trio.sleep(wait_s)
        except VersionMismatch:
            pass
        finally:
            self._draining.discard(link)

    def _wait_s(self, link: L) -> float:
        return limits.LINK_IDLE_S - (0.0 if link.streams else trio.current_time() - link.idle_since)

    async def _try_end(self, link: L) -> None:
        """Cut the link unless the other end needs it. Raises VersionMismatch."""
        over = True
        try:
            with trio.fail_after(limits.LINK_ASK_TIMEOUT_S):
                over = await self._ask(link)
        except VersionMismatch:
            raise
        except Busy:
            over = False
        except (MeshmaxError, trio.TooSlowError):
            pass  # nobody is there
        if over and self.may_end(link):
            link.cut()
