"""Lanes to the sources of a blob: opened, kept, and chunks spread over them; the fetcher's end of ``/meshmax/lane/1.0.0``.

Rules: a lane is asked for on a stream of the control connection, which stays open as long as the lane does; its end is the
lane's end. A chunk is asked of the lane that owes least. What a lane owed when it ended is asked for anew: of another
lane, or on the blob's own stream. While no lane can be opened, the blob's stream is used; lanes are tried again every
RETRY_S, and after one was lost sooner; to a peer behind a relay less often (core.lane_ways). Why there is none is said once
of a peer and state. Not here: which chunks (core.fetch), sockets and threads (net.lane), what becomes of
a chunk (services.landing).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Final, Protocol

import trio

from meshmax.base.errors import ConnectError, MeshmaxError, NotOffered, PeerGone, without_frames
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.units import MIB
from meshmax.core.lane_ways import LanePeer, Way, WayMemory, ways_to
from meshmax.net.addresses import is_lan_address
from meshmax.ports import FetchLane, LaneDial, LaneEvent, Lanes, ServeLane, Stream, Swarm
from meshmax.services.fetch_events import Withdrawn
from meshmax.services.frames import FrameStream
from meshmax.services.landing import Landing, event_of
from meshmax.services.lane_dial import LaneDialling, OpenLaneStream
from meshmax.telemetry.log import get_logger
from meshmax.wire import lane as wire
from meshmax.wire.failure import Failure, error_of
from meshmax.wire.protocols import LANE

READY_TIMEOUT_S: Final = 1.0  # for the first lane; then the blob's own stream begins to bring chunks
OPEN_TIMEOUT_S: Final = 5.0  # for any; a machine that is busy with a swarm needs more than a moment
RETRY_S: Final = 30.0  # after a lane could not be opened, or was lost again and again
LOST_S: Final = (
    1.0  # after the first that was lost for a minute, doubled then; a NAT that forgot one lets the next through
)
LOOK_S: Final = 1.0  # how often it is looked whether more lanes are due, as when other sources left
MAX_SAID: Final = 256  # peers whose last failure is remembered; of a forgotten one it is said once more
MIN_BLOB_BYTES: Final = 4 * MIB  # smaller blobs are there before a lane would be

_log = get_logger("lanes")


class LaneOpener:
    """Opens lanes to peers. ``per_peer``: how many a source gets that is the only one; ``ip_of``: of a connection's address.

    ``signalled``: how a peer is met where its lane port cannot be reached; None: such peers have no lanes.
    """

    def __init__(
        self, swarm: Swarm, lanes: Lanes, per_peer: int, ip_of: Callable[[str], str | None] | None = None
    ) -> None:
        self.per_peer = per_peer
        self.signalled: OpenLaneStream | None = None
        self._ip_of = ip_of or try_ip
        self._swarm = swarm
        self._lanes = lanes
        self._memory = WayMemory()
        self._said: dict[PeerId, tuple[str, str]] = {}  # the code of the last failure, and the path that there was

    def opened(self, peer: PeerId) -> None:
        """There is a lane: what keeps the next one from being opened is news."""
        self._said.pop(peer, None)

    def failed(self, peer: PeerId, error: MeshmaxError) -> None:
        """There is none: say why, to people once as long as it is the same."""
        view = self._swarm.connections().get(peer)
        state = (error.code, view.path if view else "")
        log = _log.debug if self._said.get(peer) == state or isinstance(error, _Waits) else _log.info
        log("no lane", peer=peer, code=error.code, error=error.message)
        if not isinstance(error, _Waits):
            self._said.pop(peer, None)
            self._said[peer] = state
            if len(self._said) > MAX_SAID:
                del self._said[next(iter(self._said))]

    @asynccontextmanager
    async def open_lane(self, peer: PeerId) -> AsyncIterator[tuple[FetchLane, Stream]]:
        """A lane and its control stream, both ended at the end of the block. Raises NotOffered, PeerGone, ConnectError,
        VersionMismatch, RemoteProtocolError, Busy. Deadlines are the caller's."""
        async with AsyncExitStack() as stack:
            lane, stream = await self._opened(peer, stack)
            try:
                yield lane, stream
            finally:
                lane.close()

    async def _opened(self, peer: PeerId, stack: AsyncExitStack) -> tuple[FetchLane, Stream]:
        dialled: list[LaneDialling] = []
        try:
            return await self._agreed(peer, stack, dialled)
        except ConnectError:
            if not (dialled and dialled[0].refused()):
                raise
        return await self._agreed(peer, stack, dialled)  # by another way, once, with keys of its own

    async def _agreed(
        self, peer: PeerId, stack: AsyncExitStack, dialled: list[LaneDialling]
    ) -> tuple[FetchLane, Stream]:
        async with AsyncExitStack() as attempt:
            stream = await attempt.enter_async_context(self._control(peer))
            frames = FrameStream(stream)
            ask = self._lanes.ask()
            await frames.send(wire.FROM_FETCHER, ask)
            grant = await frames.receive(wire.FROM_SERVER)
            if isinstance(grant, Failure):
                raise error_of(grant)
            dialling = self._dialling(self._seen(peer), grant)
            dialled.append(dialling)
            lane = await self._lanes.connect(peer, dialling, ask, grant)
            await stack.enter_async_context(attempt.pop_all())
        return lane, stream

    @asynccontextmanager
    async def _control(self, peer: PeerId) -> AsyncIterator[Stream]:
        self._seen(peer)  # before the peer is bothered
        stream = await self._swarm.open_stream(peer, LANE)
        try:
            yield stream
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    def _dialling(self, peer: LanePeer, grant: wire.LaneGrant) -> LaneDialling:
        dials: dict[Way, LaneDial] = {}
        if peer.ip is not None:
            dials["direct"] = partial(self._lanes.dial, peer.ip, grant)
        if self.signalled is not None:
            dials["signalled"] = partial(self.signalled, peer.peer)
        ways = ways_to(peer, grant.external_port, self.signalled is not None)
        return LaneDialling(peer, ways, dials, self._memory)

    def _seen(self, peer: PeerId) -> LanePeer:
        view = self._swarm.connections().get(peer)
        if view is None:
            raise PeerGone("not connected to the peer")
        ip = self._ip_of(view.address)
        if ip is None and self.signalled is None:
            raise NotOffered("lanes need a direct connection to the peer")
        seen = LanePeer(peer, ip, ip is not None and is_lan_address(ip), view.direction, view.path)
        if pause_s := self._memory.pause_s(seen, trio.current_time()):
            raise _Waits(f"the peer is reached over a relay, and a lane is tried again in {pause_s:.0f} s")
        return seen


class _Waits(NotOffered):
    """No attempt is due."""


def try_ip(address: str) -> str | None:
    """The IP address of a multiaddr of a direct TCP connection, or None."""
    parts = address.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp" or "p2p-circuit" in parts:
        return None
    return parts[2]


class OpensLanes(Protocol):
    """LaneOpener, or whatever keeps lanes of it in stock."""

    @property
    def per_peer(self) -> int:
        """How many lanes a source gets that is the only one."""
        ...

    def open_lane(self, peer: PeerId) -> AbstractAsyncContextManager[tuple[FetchLane, Stream]]:
        """See LaneOpener."""
        ...

    def opened(self, peer: PeerId) -> None:
        """See LaneOpener."""
        ...

    def failed(self, peer: PeerId, error: MeshmaxError) -> None:
        """See LaneOpener."""
        ...


class SourceLanes:
    """The lanes to ``peer`` for one blob. ``goal``: how many there should be now; ``again``: ask for these chunks anew."""

    def __init__(
        self,
        opener: OpensLanes,
        peer: PeerId,
        landing: Landing,
        goal: Callable[[], int],
        again: Callable[[list[int]], None],
    ) -> None:
        self.ready = trio.Event()  # there is a lane, or there will be none soon
        self._opener, self._peer, self._landing = opener, peer, landing
        self._goal, self._again = goal, again
        self._digest: Sha256 = landing.chunk_map.sha256
        self._owed: dict[FetchLane, set[int]] = {}  # chunks whose last word has not come, by lane
        self._lane_of: dict[int, FetchLane] = {}
        self._unsaid: dict[FetchLane, list[int]] = {}  # asked for, not told to the lane yet
        self._withdrawn: set[int] = set()
        self._held: set[FetchLane] = set()  # those whose thread is at work or waits for our limits
        self._moved = False  # a piece of a chunk has come; threads set it, `alive` takes it back
        self._lost = trio.Event()
        self._lost_s, self._pause_s = float("-inf"), LOST_S  # when one was lost last, and how long is waited then

    @property
    def count(self) -> int:
        """Lanes that are open."""
        return len(self._owed)

    def alive(self) -> bool:
        """Whether a piece of a chunk has come since this was asked last, or one is kept waiting, by our limits or our disk."""
        moved, self._moved = self._moved, False
        return moved or bool(self._held)

    def want(self, index: int) -> bool:
        """Ask for a chunk at the next `flush`; False where no lane is open."""
        if not self._owed:
            return False
        lane = min(self._owed, key=lambda lane: len(self._owed[lane]))
        self._owed[lane].add(index)
        self._lane_of[index] = lane
        self._unsaid.setdefault(lane, []).append(index)
        return True

    def withdraw(self, index: int) -> bool:
        """Cancel a chunk; False if it was not asked of a lane."""
        lane = self._lane_of.get(index)
        if lane is None:
            return False
        self.flush()
        self._withdrawn.add(index)
        lane.cancel(self._digest, index)
        return True

    def flush(self) -> None:
        """Tell the lanes what is asked of them since the last time, in one message each."""
        while self._unsaid:
            lane, indexes = self._unsaid.popitem()
            try:
                lane.want(self._digest, indexes)
            except MeshmaxError:
                lane.close()  # what it owes is asked for anew when its `run` has ended

    async def run(self) -> None:
        """Open lanes and keep them, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                lacking = self._goal() - len(self._owed)
                whole = await self._open(nursery, lacking) if lacking > 0 else True
                self.ready.set()
                if whole and not self._lost.is_set():
                    with trio.move_on_after(LOOK_S):
                        await self._lost.wait()
                if not whole or self._lost.is_set():
                    await trio.sleep(self._loss_pause_s() if whole else RETRY_S)
                    self._lost = trio.Event()

    def _loss_pause_s(self) -> float:
        now = trio.current_time()
        self._pause_s = LOST_S if now - self._lost_s > 2 * RETRY_S else min(2 * self._pause_s, RETRY_S)
        self._lost_s = now
        return self._pause_s

    async def _open(self, nursery: trio.Nursery, count: int) -> bool:
        """Try to open ``count`` lanes at once; whether all are there."""
        tries = [trio.Event() for _ in range(count)]
        for tried in tries:
            nursery.start_soon(self._keep, tried)
        for tried in tries:
            await tried.wait()
        return len(self._owed) >= self._goal()

    async def _keep(self, tried: trio.Event) -> None:
        """One lane, from its opening to its end. ``tried`` is set when it is open or will not be."""
        try:
            async with AsyncExitStack() as stack:
                with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
                    lane, stream = await stack.enter_async_context(self._opener.open_lane(self._peer))
                if opening.cancelled_caught:
                    raise PeerGone(f"no lane within {OPEN_TIMEOUT_S:g} s")
                self._opener.opened(self._peer)
                self._owed[lane] = set()
                try:
                    self.ready.set()
                    tried.set()
                    await self._use(lane, stream)
                finally:
                    self._drop(lane)
        except MeshmaxError as error:
            self._opener.failed(self._peer, without_frames(error))  # else it and `_use` would hold each other
        finally:
            tried.set()

    async def _use(self, lane: FetchLane, stream: Stream) -> None:
        failure: MeshmaxError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_with, stream, lane)
            try:
                await lane.run(partial(self._sink, lane), partial(self._told, lane), partial(self._pace, lane))
            except MeshmaxError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure:
            raise failure

    def _sink(self, lane: FetchLane, digest: Sha256, index: int, data: memoryview) -> None:
        self._held.add(lane)
        try:
            self._landing.land_in_thread(index, data)
        finally:
            self._held.discard(lane)

    def _pace(self, lane: FetchLane, size: int) -> int:
        self._moved = True
        self._held.add(lane)
        try:
            return self._landing.admit_in_thread(lane, size)
        finally:
            self._held.discard(lane)

    def _told(self, lane: FetchLane, event: LaneEvent) -> None:
        index = event.index
        self._owed.get(lane, set()).discard(index)
        self._lane_of.pop(index, None)
        self._withdrawn.discard(index)
        self._landing.inbox.put(event_of(self._peer, event))

    def _drop(self, lane: FetchLane) -> None:
        orphans = sorted(self._owed.pop(lane))
        self._unsaid.pop(lane, None)
        self._held.discard(lane)
        self._lost.set()
        for index in orphans:
            del self._lane_of[index]
            if index in self._withdrawn:
                self._landing.inbox.put(Withdrawn(self._peer, index, 0))
        self._again([index for index in orphans if index not in self._withdrawn])
        self._withdrawn -= set(orphans)


async def end_with(stream: Stream, lane: FetchLane | ServeLane) -> None:
    """Close the lane as soon as anything comes on its stream, its end above all: there is nothing more to be said."""
    with suppress(PeerGone):
        await stream.receive_some(1)
    lane.close()
