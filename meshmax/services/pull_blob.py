"""Fetching one blob from all its sources at once: runs core.fetch over sessions.

One task owns the core: it takes what has happened in all sessions from one inbox, all of it at a time, marks the chunks that
were written, and performs the core's actions. New sources are looked for all the time; those that fail are tried again after a
pause, or as soon as they are connected over another connection than the one that failed. It ends when the blob is whole, the
store fails, or nobody has had what is missing for long; by then every session has ended, and every thread of its lanes. Not
here: which peers have the model (services.pull_world), what to ask of whom (core.fetch), how much over relays
(core.relay_quota), how chunks come (services.blob_client) and are written (services.landing).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random as Quick
from typing import Final

import trio

from meshmax.base.errors import MeshmaxError, NoProviders, VersionMismatch
from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES
from meshmax.core import fetch as core
from meshmax.core.backoff import Random, backoff_s
from meshmax.core.relay_quota import RELAY_BLOB_BYTES, RELAY_BLOB_BYTES_PER_S, RelayQuota
from meshmax.ports import ChunkSource, ConnectionView, Partial, Swarm, Throttle
from meshmax.services.blob_client import Session
from meshmax.services.fetch_events import (
    Bad,
    Gone,
    Inbox,
    Lacking,
    Offered,
    Paused,
    SourceEvent,
    Stored,
    Unwritten,
    Withdrawn,
)
from meshmax.services.landing import Landing
from meshmax.services.lane_client import OpensLanes
from meshmax.services.local_source import LocalSession, name_of
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import BYTES, CHUNKS

SEEK_INTERVAL_S: Final = 0.5  # how often new sources are looked for
SOURCE_WAIT_S: Final = 30.0  # how long nobody may have what is missing before the pull is given up
STALL_WAIT_S: Final = 180.0  # how long sources may offer chunks and bring none
KEPT: Final = "what was fetched is kept, and pulling again goes on from there"
RELAY_REFUSAL_S: Final = (
    30.0  # a source over a relay that is busy for longer has used up its share; disks are free sooner
)
MAX_NAMED: Final = 3  # sources named in a reason, the rest would make it no clearer
RENEWAL_S: Final = 20.0  # after a share began anew until its source is asked: a session may have to be begun for it
MAX_NAME: Final = 100  # characters
OVER_RELAY: Final = (
    f"over a relay, {RELAY_BLOB_BYTES_PER_S >> 10} KiB/s and at most {RELAY_BLOB_BYTES >> 20} MiB an hour"
)
RETRY_FIRST_S: Final = 1.0  # pause before a source that failed is tried again; doubles
RETRY_MOST_S: Final = 15.0
RETRY_VERSION_S: Final = 600.0  # a peer of another version stays one until it is restarted

Sources = Callable[[], Mapping[PeerId, tuple[str, ...]]]  # peers that may have some of it -> their addresses

_log = get_logger("pull")
_bytes_in = BYTES.labels(direction="in")
_chunks_ok = CHUNKS.labels(direction="in", outcome="ok")


class BlobFetch:
    """One blob, into ``partial``. ``changed`` is called after each chunk."""

    def __init__(
        self,
        swarm: Swarm,
        partial: Partial,
        sources: Sources,
        random: Random,
        changed: Callable[[], None],
        patience_s: Callable[[], float] = lambda: SOURCE_WAIT_S,
        *,
        opener: OpensLanes | None = None,
        throttle: Throttle | None = None,
        local: Sequence[ChunkSource] = (),
        quota: RelayQuota | None = None,
        peer_name: Callable[[PeerId], str] = str,
    ) -> None:
        """``patience_s``: how long nobody may have what is missing; asked anew each time, infinity is an answer.

        ``opener`` None: no lanes, chunks ride the control connections. ``local``: sources on this
        machine, looked at again and again. ``quota``: what has come over relays, shared by all fetches.
        ``peer_name``: what people call a peer.
        """
        self.map = partial.chunk_map
        self._swarm = swarm
        self._partial = partial
        self._sources = sources
        self._random = random
        self._changed = changed
        self._patience_s = patience_s
        self._stuck_since_s: float | None = None
        # A generator of its own: it is asked for every chunk, and the system's is a call into the kernel each time.
        self._core = core.Fetch(partial.haves, Quick(random.random()))
        self._inbox = Inbox()
        self._taken: deque[SourceEvent] = deque()  # out of the inbox, in work
        self._landing = Landing(partial, self._inbox, self._core.needs, throttle)
        self._opener = opener
        self._local = local
        self._quota = quota or RelayQuota()
        self._peer_name = peer_name
        self._sessions: dict[PeerId, Session | LocalSession] = {}
        self._failures: dict[PeerId, int] = {}  # in a row; both are bounded by the peers that presence knows
        self._retry_at_s: dict[PeerId, float] = {}
        self._began_over: dict[PeerId, ConnectionView | None] = {}  # the last session of each; None: not connected then
        self._renewed_s: dict[PeerId, float] = {}  # when the share of each that is or was used up begins anew
        self._done = False
        self._done_bytes = sum(self.map.span(i)[1] for i in range(self.map.count) if i in partial.haves)

    @property
    def done_bytes(self) -> int:
        """Bytes that are verified and in place."""
        return self._done_bytes

    @property
    def stuck_since_s(self) -> float | None:
        """Since when no source has had any of what is missing (trio's time); None while one has."""
        return self._stuck_since_s

    def view(self) -> core.FetchView:
        """Who gave what."""
        return self._core.snapshot()

    def lanes(self, peer: PeerId) -> int:
        """Lanes that are open to ``peer`` now; 0: its chunks, if any, ride the control connection."""
        session = self._sessions.get(peer)
        return session.lanes if session else 0

    async def run(self) -> None:
        """Until every chunk is in place. Raises NoProviders, StoreFull, StoreError; what came is kept."""
        failure: MeshmaxError | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._fetch(nursery)
                except MeshmaxError as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self._keep_the_rest()
            self._sessions.clear()  # they know this fetch
        try:
            if failure:
                raise failure
        finally:
            del failure  # it comes to know this frame

    def _keep_the_rest(self) -> None:
        """Mark the chunks that were written while the fetch came to its end, by an error or a cancellation."""
        for event in (*self._taken, *self._inbox.rest()):
            if isinstance(event, Stored) and self._core.needs(event.index):
                self._stored(event, trio.current_time())

    async def _fetch(self, nursery: trio.Nursery) -> None:
        began_s = hopeful_s = patient_s = seek_at_s = trio.current_time()
        progress_bytes = self._done_bytes
        self._perform(self._core.start(began_s))
        while not self._done:
            now = trio.current_time()
            if now >= seek_at_s:
                self._seek(nursery, now)
                self._follow_paths(now)
                seek_at_s = now + SEEK_INTERVAL_S
            if not self._core.stuck:
                hopeful_s = now
            self._stuck_since_s = hopeful_s if self._core.stuck else None
            if self._done_bytes > progress_bytes:
                progress_bytes, began_s = self._done_bytes, now
            patience_s = self._patience_s()
            if math.isinf(patience_s):
                began_s = patient_s = now
            if now - max(hopeful_s, patient_s) >= patience_s or now - began_s >= max(STALL_WAIT_S, patience_s):
                raise NoProviders(f"{self.lacking()}; {KEPT}")
            await self._step(min(seek_at_s, self._core.deadline() or seek_at_s))

    async def _step(self, until_s: float) -> None:
        with trio.move_on_at(until_s) as scope:
            events = await self._inbox.take()
        if not scope.cancelled_caught:
            self._taken.extend(events)
            while self._taken:
                self._perform(self._take(self._taken.popleft()))
            self._flush()
        now = trio.current_time()
        for peer, session in self._sessions.items():
            if session.alive():
                self._core.on_part(peer, now)
        due_s = self._core.deadline()
        if due_s is not None and now >= due_s:  # a steady stream of events must not hide a silent source
            self._perform(self._core.tick(now))
            self._flush()

    def _flush(self) -> None:
        for session in self._sessions.values():
            session.flush()

    def _take(self, event: SourceEvent) -> list[core.Action]:
        now = trio.current_time()
        match event:
            case Offered(peer=peer):
                self._failures.pop(peer, None)
                haves = self._sessions[peer].offer_taken()
                return self._core.on_source(peer, haves, now, self._allowance(peer, now))
            case Stored():
                return self._stored(event, now)
            case Bad(peer=peer, index=index, size=size):
                self._count_relayed(peer, size, now)
                _bytes_in.inc(size)
                CHUNKS.labels(direction="in", outcome="bad").inc()
                _log.warning("bad chunk", peer=peer, blob=self.map.sha256[:12], index=index)
                return self._core.on_chunk_bad(peer, index, size, now)
            case Unwritten(error=error):
                raise error
            case Lacking(peer=peer, index=index):
                return self._core.on_not_have(peer, index, now)
            case Paused(peer=peer, index=index, retry_after_s=retry_after_s):
                if retry_after_s > RELAY_REFUSAL_S and self._is_relayed(peer):
                    self._quota.refused(peer, retry_after_s, now)
                return self._core.on_busy(peer, index, retry_after_s, now)
            case Withdrawn(peer=peer, index=index, wasted=wasted):
                return self._core.on_cancelled(peer, index, wasted, now)
            case Gone(peer=peer, error=error):
                self._gone(peer, error, now)
                return self._core.on_source_gone(peer, now)

    def _stored(self, event: Stored, now: float) -> list[core.Action]:
        peer, index, size = event.peer, event.index, event.size
        _bytes_in.inc(size)
        self._count_relayed(peer, size, now)
        if not self._core.needs(index):
            CHUNKS.labels(direction="in", outcome="double").inc()
            return self._core.on_chunk_double(peer, index, size, now)
        self._partial.written(index)
        _chunks_ok.inc()
        self._done_bytes += size
        actions = self._core.on_chunk_ok(peer, index, size, now)
        self._changed()
        return actions

    def _perform(self, actions: list[core.Action]) -> None:
        for action in actions:
            match action:
                case core.Request(peer=peer, index=index):
                    self._sessions[peer].want(index)
                case core.Cancel(peer=peer, index=index):
                    self._sessions[peer].withdraw(index)
                case core.Ban(peer=peer, reason=reason) | core.Drop(peer=peer, reason=reason):
                    _log.info("source given up", peer=peer, blob=self.map.sha256[:12], reason=reason)
                    self._sessions[peer].end()
                case core.Done():
                    self._done = True
                case core.Demote() | core.Stuck():
                    pass  # seen in `view` and `stuck`

    def _seek(self, nursery: trio.Nursery, now: float) -> None:
        connections = self._swarm.connections()
        for peer, addresses in self._sources().items():
            known = peer in self._sessions or self._core.banned(peer)
            view = connections.get(peer)
            early = now < self._retry_at_s.get(peer, 0.0) and view in (None, self._began_over.get(peer))
            if known or len(self._sessions) >= core.MAX_SOURCES or early:
                continue
            self._began_over[peer] = view
            if view is not None and view.path == "relay":
                left = self._quota.left_bytes(peer, now)
                _log.info("source over a relay", peer=peer, blob=self.map.sha256[:12], quota_left_bytes=left)
            session = Session(peer, self._landing, partial(self._heard, peer), self._opener, self._lane_goal)
            self._sessions[peer] = session
            nursery.start_soon(session.run, self._swarm, addresses)
        for source in self._local:
            peer = name_of(source)
            if peer not in self._sessions and not self._core.banned(peer) and now >= self._retry_at_s.get(peer, 0.0):
                local = self._sessions[peer] = LocalSession(source, self._landing)
                nursery.start_soon(local.run)

    def _is_relayed(self, peer: PeerId) -> bool:
        """Whether its chunks come over a relay: the session began there, and there is no lane."""
        session = self._sessions.get(peer)
        return isinstance(session, Session) and session.relayed and not session.lanes

    def _allowance(self, peer: PeerId, now: float) -> int | None:
        return self._quota.left_bytes(peer, now) // CHUNK_BYTES if self._is_relayed(peer) else None

    def _follow_paths(self, now: float) -> None:
        connections = self._swarm.connections()
        for peer, session in self._sessions.items():
            view = connections.get(peer)
            if view is not None and view.path != "relay" and self._is_relayed(peer):
                session.end()  # the next one begins on the better path
            self._perform(self._core.on_path(peer, self._allowance(peer, now), now))
        self._flush()

    def _count_relayed(self, peer: PeerId, size: int, now: float) -> None:
        if self._is_relayed(peer):
            self._quota.note(peer, size, now)

    def _heard(self, peer: PeerId) -> None:
        self._core.on_part(peer, trio.current_time())

    def _lane_goal(self) -> int:
        """A source that is the only one gets every lane that a peer may have, one of several gets one."""
        return self._opener.per_peer if self._opener and len(self._sessions) == 1 else 1

    def _gone(self, peer: PeerId, error: MeshmaxError | None, now: float) -> None:
        self._sessions.pop(peer, None)
        failures = self._failures[peer] = self._failures.get(peer, 0) + 1
        pause_s = backoff_s(failures, RETRY_FIRST_S, RETRY_MOST_S, self._random)
        self._retry_at_s[peer] = now + (RETRY_VERSION_S if isinstance(error, VersionMismatch) else pause_s)
        if error:
            _log.info("source lost", peer=peer, blob=self.map.sha256[:12], code=error.code, error=error.message)

    @property
    def waits_for_quota(self) -> bool:
        """Whether nothing comes because of what was fetched over relays in this hour."""
        return self._core.stuck and bool(self._quota_waits())

    def relay_left_bytes(self) -> int | None:
        """What may still come in this hour while there are sources over relays alone; None: there are others, or none."""
        if not self._sessions or not all(map(self._is_relayed, self._sessions)):
            return None
        now = trio.current_time()
        return sum(self._quota.left_bytes(peer, now) for peer in self._sessions)

    def _quota_waits(self) -> dict[PeerId, float]:
        """Seconds until each source that only a relay leads to gives more, those that have used up their share."""
        now, connections = trio.current_time(), self._swarm.connections()
        waits = {}
        for peer in self._sources():
            session, view = self._sessions.get(peer), connections.get(peer)
            # A session without work is ended by the other side, and begun anew: it waits for its quota meanwhile, too.
            relayed = self._is_relayed(peer) if session else view is not None and view.path == "relay"
            wait_s = self._quota.wait_s(peer, CHUNK_BYTES, now)
            if relayed and (wait_s > 0 or now < self._renewed_s.get(peer, -math.inf) + RENEWAL_S):
                waits[peer] = wait_s
            if wait_s > 0:
                self._renewed_s[peer] = now + wait_s
        return waits

    def lacking(self) -> str:
        """What is missing that nobody has, in words."""
        waits = self._quota_waits()
        if waits:
            names = ", ".join(sorted(self._peer_name(peer)[:MAX_NAME] for peer in waits)[:MAX_NAMED])
            return (
                f"only a relay leads to {names}: {RELAY_BLOB_BYTES >> 20} MiB of this hour are used, more in "
                f"{max(1, math.ceil(min(waits.values()) / 60))} min, or at once when a direct path is found (meshmax doctor)"
            )
        view = self._core.snapshot()
        return (
            f"no peer that can be reached has the missing {view.missing} of {view.count} chunks of blob "
            f"{self.map.sha256[:12]}"
        )
