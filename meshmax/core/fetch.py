"""Fetching one blob from many sources at once: which chunk is asked of whom, and what follows from what they do.

Rules. Rarest chunk first, random among equals (core.fetch_chunks); each source has a window (core.fetch_source). A source
is not asked for what others will have brought before it could: a slow one thus brings what only it has. A chunk is asked
of one source at a time, but for the end game: when every missing chunk is under way, those that a slow source has not
begun are moved to a quicker one, and an idle one is asked, too, for the last that the slowest is at; what this wastes is
bounded by DOUBLE_SHARE of the blob. A source that sends a bad chunk is never asked for that chunk again and gets one
chunk at a time; at BAN_STRIKES it is banned from this blob. A source that is silent loses what was asked of it to
others; after MAX_TIMEOUTS silences in a row it is dropped and may come back. All of this survives a source's leaving
and returning. A source that is reached over a relay is asked only for what no other one has, for no more than its allowance, and
never helps; one that has used up its allowance counts as if it had nothing until it has another one.

The owner calls an ``on_`` method for each thing that happens, `tick` at `deadline`, and performs the actions in order.
Chunks are verified and written by the owner before `on_chunk_ok`. Not here: streams, files, who the sources are.
"""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES, Haves
from meshmax.core.backoff import Random
from meshmax.core.fetch_chunks import Rarity, bits_of
from meshmax.core.fetch_source import BAN_STRIKES, MAX_TIMEOUTS, Source

MAX_SOURCES: Final = (
    64  # sources of one blob at once; more than fill any network card, each costs a stream or two lanes
)
MAX_AHEAD: Final = 256  # chunks under way in all; windows hold half a second of what the disk takes, so few have come
MAX_KNOWN: Final = 1024  # sources remembered, gone and banned ones too, so that a liar is no stranger when it returns
DOUBLE_SHARE: Final = 64  # a 64th of the chunks may be under way twice or have been wasted by the end game
MIN_DOUBLES: Final = 3  # or so many, of a small blob
UNTRIED_SILENCE_S: Final = 1.0  # of a source that has brought nothing yet, until one that was not tried is asked, too
DOUBLE_CHECK_S: Final = 0.25  # how often the end game looks for a source that has fallen behind


class Request(msgspec.Struct, frozen=True):
    """Ask ``peer`` for chunk ``index``."""

    peer: PeerId
    index: int


class Cancel(msgspec.Struct, frozen=True):
    """Chunk ``index`` is no longer wanted of ``peer``; it answers with that chunk or `on_cancelled`."""

    peer: PeerId
    index: int


class Demote(msgspec.Struct, frozen=True):
    """``peer`` sent a bad chunk; from now on it gets one chunk at a time."""

    peer: PeerId


class Ban(msgspec.Struct, frozen=True):
    """``peer`` is no source of this blob any more. Nothing is awaited of it."""

    peer: PeerId
    reason: str


class Drop(msgspec.Struct, frozen=True):
    """``peer`` is given up for now and may be offered again. Nothing is awaited of it."""

    peer: PeerId
    reason: str


class Done(msgspec.Struct, frozen=True):
    """Every chunk is there."""


class Stuck(msgspec.Struct, frozen=True):
    """No source has any of the missing chunks. It ends when one comes that has."""

    reason: str


Action: TypeAlias = Request | Cancel | Demote | Ban | Drop | Done | Stuck


class SourceView(msgspec.Struct, frozen=True):
    """What a source gave. ``strikes``: bad chunks; ``asked``: chunks under way; ``rate_bytes_per_s`` 0 when not a source now."""

    chunks: int
    bytes: int
    strikes: int
    asked: int
    window: int
    rate_bytes_per_s: float
    active: bool


class FetchView(msgspec.Struct, frozen=True):
    """The fetch as it is. ``bytes_wasted``: bad or double bytes received."""

    count: int
    missing: int
    bytes_wasted: int
    stuck: bool
    sources: dict[PeerId, SourceView]


class Fetch:
    """The fetch of one blob of ``haves.count`` chunks, of which ``haves`` are there already."""

    __slots__ = (
        "_active",
        "_ahead",
        "_checked_s",
        "_doubled",
        "_ended",
        "_filled_s",
        "_held_back",
        "_known",
        "_lost_bytes",
        "_may_lose_bytes",
        "_missing",
        "_open",
        "_rarity",
        "_stuck",
        "_wasted",
        "count",
    )

    def __init__(self, haves: Haves, random: Random) -> None:
        self.count = haves.count
        self._missing = ((1 << haves.count) - 1) & ~bits_of(haves)
        self._open = self._missing  # missing and under way from nobody
        self._rarity = Rarity(haves.count, random)
        self._active: dict[PeerId, Source] = {}
        self._known: dict[PeerId, Source] = {}
        self._ahead: dict[int, list[PeerId]] = {}  # chunk under way -> whom it was asked of
        self._doubled: set[int] = set()  # chunks asked of two, whose loser has not said its last word
        self._lost_bytes = 0  # came of chunks that were cancelled
        self._may_lose_bytes = max(MIN_DOUBLES, haves.count // DOUBLE_SHARE) * CHUNK_BYTES
        self._wasted = 0
        self._checked_s = 0.0
        self._filled_s = 0.0
        self._held_back = False  # a source with room waits, since others will be sooner; so it seems now
        self._ended = False
        self._stuck = False

    # --- what the owner asks -----------------------------------------------------------------------------------------

    def needs(self, index: int) -> bool:
        """Whether chunk ``index`` is still missing."""
        return 0 <= index < self.count and bool(self._missing >> index & 1)

    @property
    def stuck(self) -> bool:
        """Whether no source has any of the missing chunks."""
        return self._stuck

    def banned(self, peer: PeerId) -> bool:
        """Whether ``peer`` is banned from this blob."""
        known = self._known.get(peer)
        return known is not None and known.strikes >= BAN_STRIKES

    def deadline(self) -> float | None:
        """When `tick` is due, in the owner's time; None: not before the next event."""
        times = [ends for source in self._active.values() if (ends := source.silence_ends_s()) is not None]
        times += [wakes_s for s in self._active.values() if (wakes_s := s.wakes_s()) and s.useful & self._open]
        if self._ahead and not self._open and any(self._can_help(source) for source in self._active.values()):
            times.append(self._checked_s + DOUBLE_CHECK_S)
        elif self._held_back:
            times.append(self._filled_s + DOUBLE_CHECK_S)
        return min(times, default=None)

    def snapshot(self) -> FetchView:
        """The fetch as it is now."""
        views = {}
        for peer, source in self._known.items():
            active = peer in self._active
            value = source.chunk_s.value
            rate = source.bytes / source.chunks / value if active and value and source.chunks else 0.0
            views[peer] = SourceView(
                source.chunks, source.bytes, source.strikes, len(source.asked), source.window, rate, active
            )
        return FetchView(self.count, self._missing.bit_count(), self._wasted, self._stuck, views)

    # --- what happens ------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Nothing happened yet: Done if every chunk is there, else Stuck until a source comes."""
        return self._next(now, [])

    def on_source(self, peer: PeerId, haves: Haves, now: float, allowance: int | None = None) -> list[Action]:
        """``peer`` offers chunks, or says anew what it has. A banned one is answered with Ban, one too many with Drop.

        ``allowance``: see `on_path`.
        """
        if self.banned(peer):
            return [Ban(peer, "it sent bad chunks")]
        source = self._active.get(peer)
        if source is None:
            full = len(self._active) >= MAX_SOURCES or (peer not in self._known and len(self._known) >= MAX_KNOWN)
            if full:
                return [Drop(peer, "there are sources enough")]
            source = self._known.setdefault(peer, Source(peer))
            source.begin()
            self._active[peer] = source
        chunks = bits_of(haves) & ((1 << self.count) - 1)
        self._rarity.remove(source.haves & ~chunks)
        self._rarity.add(chunks & ~source.haves)
        source.haves, source.allowance = chunks, allowance
        return self._next(now, [])

    on_have = on_source  # a source that has more now, or less

    def on_source_gone(self, peer: PeerId, now: float) -> list[Action]:
        """``peer`` went away; what was asked of it is asked of others."""
        self._forget(peer)
        return self._next(now, [])

    def on_part(self, peer: PeerId, now: float) -> None:
        """Some of a chunk came: the source is alive."""
        if source := self._active.get(peer):
            source.heard_s = now

    def on_path(self, peer: PeerId, allowance: int | None, now: float) -> list[Action]:
        """``peer`` is reached over a relay, and may have ``allowance`` chunks under way; None: it is reached without one."""
        source = self._active.get(peer)
        if source is None or source.allowance == allowance:
            return []
        source.allowance = allowance
        return self._next(now, [])

    def on_chunk_ok(self, peer: PeerId, index: int, size: int, now: float) -> list[Action]:
        """Chunk ``index`` came from ``peer``, was verified and is in its place. Twice the same counts as wasted."""
        actions: list[Action] = []
        if not self.needs(index):
            return self.on_chunk_double(peer, index, size, now)
        if source := self._active.get(peer):
            source.delivered(index, size, now)
        for other in self._ahead.pop(index, []):
            if other != peer:
                self._active[other].leave(index)
                actions.append(Cancel(other, index))
        if not actions:
            self._doubled.discard(index)
        self._missing &= ~(1 << index)
        self._open &= ~(1 << index)
        return self._next(now, actions)

    def on_chunk_double(self, peer: PeerId, index: int, size: int, now: float) -> list[Action]:
        """Chunk ``index`` came from ``peer`` when it was there already."""
        return self.on_cancelled(peer, index, size, now)

    def on_chunk_bad(self, peer: PeerId, index: int, size: int, now: float) -> list[Action]:
        """What ``peer`` sent as chunk ``index`` is not that chunk: demoted, then banned."""
        self._wasted += size
        source = self._active.get(peer)
        if source is None:
            return self._next(now, [])
        source.settled(index, now)
        self._release(peer, index)
        source.struck(index)
        if source.strikes < BAN_STRIKES:
            return self._next(now, [Demote(peer)])
        self._forget(peer)
        return self._next(now, [Ban(peer, f"it sent {source.strikes} bad chunks")])

    def on_not_have(self, peer: PeerId, index: int, now: float) -> list[Action]:
        """``peer`` does not have chunk ``index`` after all."""
        if source := self._active.get(peer):
            source.settled(index, now)
            self._release(peer, index)
            lost = source.haves & (1 << index) if 0 <= index < self.count else 0
            self._rarity.remove(lost)
            source.haves &= ~lost
        return self._next(now, [])

    def on_cancelled(self, peer: PeerId, index: int, wasted: int, now: float) -> list[Action]:
        """``peer`` will not send chunk ``index``, as we asked; ``wasted`` bytes of it had come."""
        self._wasted += wasted
        if source := self._active.get(peer):
            source.settled(index, now)
        self._release(peer, index)
        self._lost_bytes += wasted
        if index not in self._ahead:
            self._doubled.discard(index)
        return self._next(now, [])

    def on_busy(self, peer: PeerId, index: int, retry_after_s: float, now: float) -> list[Action]:
        """``peer`` will not send chunk ``index`` for ``retry_after_s``: others may have it, or it other chunks, meanwhile."""
        if source := self._active.get(peer):
            source.settled(index, now)
            self._release(peer, index)
            source.deferred(index, retry_after_s, now)
        return self._next(now, [])

    def tick(self, now: float) -> list[Action]:
        """Time passed: silent sources lose what was asked of them, paused ones are asked again."""
        actions: list[Action] = []
        for peer, source in tuple(self._active.items()):
            ends_s = source.silence_ends_s()
            if ends_s is None or now < ends_s:
                continue
            source.silent(now)
            if source.timeouts >= MAX_TIMEOUTS:
                self._forget(peer)
                actions.append(Drop(peer, "it sends nothing"))
                continue
            for index in tuple(source.asked):
                source.leave(index)
                self._release(peer, index)
                actions.append(Cancel(peer, index))
        return self._next(now, actions)

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _next(self, now: float, actions: list[Action]) -> list[Action]:
        if not self._missing:
            if not self._ended:
                self._ended = True
                actions.append(Done())
            return actions
        for source in self._active.values():
            source.wake(now)
        self._fill(now, actions)
        self._end_game(now, actions)
        stuck = not self._ahead and not any(s.useful & self._missing and not s.spent for s in self._active.values())
        if stuck and not self._stuck:
            actions.append(Stuck(f"no source has any of the {self._missing.bit_count()} missing chunks"))
        self._stuck = stuck
        return actions

    def _fill(self, now: float, actions: list[Action]) -> None:
        self._held_back, self._filled_s = False, now
        ready = [source for source in self._active.values() if source.room(now) > 0] if self._open else []
        ready.sort(key=lambda source: (source.strikes, source.pace_s()))
        rate_per_s = sum(1 / source.waits_s(now) for source in self._active.values()) if ready else 0.0
        unrelayed = self._unrelayed() if any(source.allowance is not None for source in ready) else 0
        while self._open and ready:
            still = []
            for source in ready:  # one chunk each in turn, the quickest first
                if source.room(now) <= 0:
                    continue
                if len(self._ahead) >= MAX_AHEAD:
                    return
                barred = unrelayed if source.allowance is not None else 0
                index = self._rarity.choose(source.askable & self._open & ~barred)
                if index is None:
                    continue
                if self._is_sooner_elsewhere(source, index, rate_per_s, now):
                    self._held_back = True
                    continue
                self._ask(source, index, now, actions)
                still.append(source)
            ready = still

    def _unrelayed(self) -> int:
        """The chunks that a source which is not reached over a relay can bring, as a set in an integer."""
        chunks = 0
        for source in self._active.values():
            chunks |= source.useful if source.allowance is None else 0
        return chunks

    def _is_sooner_elsewhere(self, source: Source, index: int, rate_per_s: float, now: float) -> bool:
        """Whether the others that have chunk ``index`` will have brought all that is open before ``source`` brings this one.

        Never so for the one of them that is soonest. ``rate_per_s``: of all sources together, at least.
        """
        if source.chunk_s.value is None:
            return False
        own_s = source.due_s(now)
        ahead = self._open.bit_count()
        if own_s * rate_per_s <= ahead:  # not even all sources together
            return False
        others_per_s, soonest_s = 0.0, own_s
        for other in self._active.values():
            if other is source or other.strikes or now < other.paused_until_s or not other.askable >> index & 1:
                continue
            others_per_s += 1 / other.waits_s(now)
            soonest_s = min(soonest_s, other.due_s(now))
            ahead += len(other.asked)
        return soonest_s < own_s and own_s * others_per_s > ahead

    def _end_game(self, now: float, actions: list[Action]) -> None:
        """Every missing chunk is under way: give the quick ones what the slow ones will not bring soon."""
        if self._open or not self._ahead:
            return
        self._checked_s = now
        for helper in sorted(self._active.values(), key=Source.pace_s):
            if helper.allowance is not None:
                continue
            while helper.room(now) > 0 and not helper.strikes and self._lost_bytes < self._may_lose_bytes:
                slow = self._slowest_for(helper, now)
                if slow is None or self._is_sooner_elsewhere(helper, slow[1], math.inf, now):
                    break
                source, index = slow
                if index != next(iter(source.asked)):
                    self._move(source, helper, index, now, actions)  # not begun, so nothing is wasted
                elif not helper.asked and self._may_double():
                    self._doubled.add(index)
                    self._ask(helper, index, now, actions)
                else:
                    break

    def _slowest_for(self, helper: Source, now: float) -> tuple[Source, int] | None:
        """The source that needs longest and what was asked of it last, where ``helper`` is sure to bring it sooner."""
        worst: tuple[float, Source, int] | None = None
        missing = helper.askable & self._missing
        for source in self._active.values():
            remaining_s, enough_s = source.remaining_s(now), 2 * helper.due_s(now)
            if source.chunk_s.value is None and helper.chunk_s.value is None:
                # A blob of a chunk or two: nothing is measured, and a mute source must not hold it for its whole patience.
                remaining_s, enough_s = now - source.heard_s, UNTRIED_SILENCE_S
            if source is helper or (worst and worst[0] >= remaining_s) or remaining_s <= enough_s:
                continue
            for index in reversed(source.asked):
                if len(self._ahead[index]) == 1 and missing >> index & 1:
                    worst = (remaining_s, source, index)
                    break
        return worst and worst[1:]

    def _can_help(self, source: Source) -> bool:
        able = not source.asked and not source.strikes and source.allowance is None
        return able and bool(source.useful & self._missing)

    def _may_double(self) -> bool:
        return len(self._doubled) * CHUNK_BYTES + self._lost_bytes < self._may_lose_bytes

    def _move(self, source: Source, helper: Source, index: int, now: float, actions: list[Action]) -> None:
        source.leave(index)
        self._release(source.peer, index)
        actions.append(Cancel(source.peer, index))
        self._ask(helper, index, now, actions)

    def _ask(self, source: Source, index: int, now: float, actions: list[Action]) -> None:
        source.ask(index, now)
        self._ahead.setdefault(index, []).append(source.peer)
        self._open &= ~(1 << index)
        actions.append(Request(source.peer, index))

    def _release(self, peer: PeerId, index: int) -> None:
        """``peer`` is not going to bring chunk ``index``: it is open again unless somebody else is bringing it."""
        owners = self._ahead.get(index)
        if owners is None or peer not in owners:
            return
        owners.remove(peer)
        self._doubled.discard(index)
        if not owners:
            del self._ahead[index]
            self._open |= self._missing & (1 << index)

    def _forget(self, peer: PeerId) -> None:
        source = self._active.pop(peer, None)
        if source is None:
            return
        self._rarity.remove(source.haves)
        for index in (*source.asked, *source.leaving):
            if index in self._doubled and index not in self._ahead:
                self._doubled.discard(index)  # it lost, and how much of it had come is not known
                self._lost_bytes += CHUNK_BYTES
            self._release(peer, index)
        source.begin()
