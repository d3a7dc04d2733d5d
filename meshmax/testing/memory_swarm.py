"""A network of swarms in memory: satisfies ports.Swarm, in trio's time, without sockets, threads or cryptography.

`MemoryNetwork` holds the peers and what goes wrong between them: ``latency_s`` one way, `partition` and `heal` (nothing
passes between two peers, and nobody is told), `freeze` and `thaw` (nothing passes to or from a peer), `kill` (every
connection of a peer ends at once, and the others see it), `move` (a peer is at another address). Limits and errors are
those of the real swarm. Connections carry the dialler's and the listener's PeerIds as they are; nothing is proved. Not here:
real libp2p hosts over a simulated wire (sim_network), streams (memory_stream), adopting byte streams (memory_adoption).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Literal, Protocol

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshmax.base.errors import Busy, ConnectError, PeerGone, VersionMismatch
from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.status import Path
from meshmax.net import limits
from meshmax.net.admission import Answer, Gate, Passage, nothing_more
from meshmax.net.announce import Announcer
from meshmax.net.draining import Draining
from meshmax.net.links import Change, LinkTable
from meshmax.net.promises import Promises
from meshmax.ports import Admission, ByteStream, ConnectionView, Stream, SwarmEvent
from meshmax.telemetry.isolate import isolate
from meshmax.testing.memory_adoption import STREAM_FAILURES, Meeting, Meetings
from meshmax.testing.memory_stream import MemoryStream, Pipe
from meshmax.wire.protocols import MEMBER


class SeededSigner:
    """An identity for tests: a real Ed25519 key made from a small number; satisfies ports.Signer."""

    def __init__(self, seed: int) -> None:
        self.private_bytes = seed.to_bytes(32, "big")
        self._key = Ed25519PrivateKey.from_private_bytes(self.private_bytes)
        self.peer_id = peer_id_of(self._key.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of ``data``."""
        return self._key.sign(data)


class HasPeerId(Protocol):
    """Whatever knows its PeerId; a Signer does."""

    peer_id: PeerId


class MemoryNetwork:
    """The wire between MemorySwarms, and its faults. ``latency_s``: one way."""

    def __init__(self, latency_s: float = 0.001) -> None:
        self.latency_s = latency_s
        self._swarms: dict[str, MemorySwarm] = {}
        self._blocked: set[frozenset[PeerId]] = set()
        self._frozen: set[PeerId] = set()
        self._healed = trio.Event()
        self.meetings: Meetings[_Connection] = Meetings()

    @asynccontextmanager
    async def open_swarm(
        self, signer: HasPeerId, admission: Admission | None = None, max_guests: int = limits.MAX_GUESTS
    ) -> AsyncIterator[MemorySwarm]:
        """A new peer, listening. Leaving the block ends its connections and tasks. ``admission``: see net.swarm."""
        async with trio.open_nursery() as nursery:
            gate = Gate(nursery, admission, max_guests)
            swarm = MemorySwarm(self, signer.peer_id, f"/memory/{len(self._swarms) + 1}", nursery, gate)
            self._swarms[swarm.addresses[0]] = swarm
            try:
                yield swarm
            finally:
                swarm.close()
                nursery.cancel_scope.cancel()

    def partition(self, a: PeerId, b: PeerId) -> None:
        """From now on nothing passes between ``a`` and ``b``; connections stay and stall, dials time out."""
        self._blocked.add(frozenset((a, b)))

    def heal(self, a: PeerId, b: PeerId) -> None:
        """Take a `partition` back; what was sent meanwhile arrives."""
        self._blocked.discard(frozenset((a, b)))
        self._wake()

    def freeze(self, peer: PeerId) -> None:
        """From now on nothing passes to or from ``peer``, as when its process is stopped; nobody is told."""
        self._frozen.add(peer)

    def thaw(self, peer: PeerId) -> None:
        """Take a `freeze` back."""
        self._frozen.discard(peer)
        self._wake()

    def kill(self, peer: PeerId) -> None:
        """End every connection of ``peer`` at once and refuse new ones, as when its process dies. Its swarm is useless."""
        for swarm in self._swarms.values():
            if swarm.peer_id == peer:
                swarm.close()

    def move(self, swarm: MemorySwarm, address: str) -> None:
        """From now on ``swarm`` listens at ``address`` alone (a multiaddr without /p2p); its connections are lost."""
        self._swarms = {at: other for at, other in self._swarms.items() if other is not swarm}
        swarm.addresses = (f"{address}/p2p/{swarm.peer_id}",)
        self._swarms[swarm.addresses[0]] = swarm
        swarm.cut()

    def passes(self, a: PeerId, b: PeerId) -> bool:
        """Whether bytes pass between ``a`` and ``b`` now."""
        return not (a in self._frozen or b in self._frozen or frozenset((a, b)) in self._blocked)

    async def travel(self, a: PeerId, b: PeerId) -> None:
        """Wait until a packet sent now would have arrived; as long as nothing passes, that is for ever."""
        await trio.sleep(self.latency_s)
        await self.wait_passable(a, b)

    async def wait_passable(self, a: PeerId, b: PeerId) -> None:
        """Wait until bytes pass between ``a`` and ``b``."""
        while not self.passes(a, b):
            await self._healed.wait()

    def at(self, address: str) -> MemorySwarm | None:
        """The swarm that listens at ``address`` (with or without /p2p), or None."""
        base = address.partition("/p2p/")[0]
        found = (swarm for key, swarm in self._swarms.items() if key.partition("/p2p/")[0] == base)
        return next((swarm for swarm in found if not swarm.closed), None)

    def of(self, peer_id: PeerId) -> MemorySwarm | None:
        """The swarm of that peer, or None."""
        found = (swarm for swarm in self._swarms.values() if swarm.peer_id == peer_id and not swarm.closed)
        return next(found, None)

    def _wake(self) -> None:
        self._healed.set()
        self._healed = trio.Event()


class _Connection:
    """A connection between two swarms: its streams, and how it ends."""

    def __init__(
        self, dialler: MemorySwarm, listener: MemorySwarm, address: str, own_address: str, path: Path = "direct"
    ) -> None:
        """``address``: where the dialler finds the listener; ``own_address``: where the listener sees the dialler."""
        self.ends = {dialler.peer_id: dialler, listener.peer_id: listener}
        self.carriers: list[ByteStream] = []  # that it was made of, and which end with it
        now_s = time.time()
        self.views = {
            dialler.peer_id: ConnectionView(listener.peer_id, address, "out", now_s, path),
            listener.peer_id: ConnectionView(dialler.peer_id, own_address, "in", now_s, path),
        }
        self.passages = {peer: self._passage(swarm, self.views[peer]) for peer, swarm in self.ends.items()}
        self.pipes: dict[Pipe, None] = {}
        self.opened: Counter[PeerId] = Counter()
        self.streams = 0
        self.idle_since = self.heard_s = trio.current_time()  # nothing queues here, so answers alone show life
        self.arrived_s = dict.fromkeys(self.ends, self.heard_s)  # when anything came at each end last

    def _passage(self, swarm: MemorySwarm, view: ConnectionView) -> Passage:
        welcome = partial(swarm.gained, view.peer_id, self)
        return Passage(view.peer_id, view.address, view.direction, welcome, self.close)

    def using(self, streams: int) -> None:
        """A stream was opened (1) or is over (-1)."""
        self.streams += streams
        self.idle_since = trio.current_time()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """In this block there is one stream more, whatever else."""
        self.using(1)
        try:
            yield
        finally:
            self.using(-1)

    def on_arrival(self, sink: PeerId) -> None:
        """Something came at that end."""
        self.arrived_s[sink] = trio.current_time()

    def cut(self) -> None:
        """End it now."""
        self.close()

    def other(self, peer_id: PeerId) -> MemorySwarm:
        return next(swarm for peer, swarm in self.ends.items() if peer != peer_id)

    def close(self) -> None:
        for pipe in tuple(self.pipes):
            pipe.change(broken=True)
        self.pipes.clear()
        for stream in self.carriers:
            stream.close()
        first, second = self.ends.values()
        first.lost(second.peer_id, self)
        second.lost(first.peer_id, self)


class MemorySwarm:
    """One peer on a MemoryNetwork; satisfies ports.Swarm."""

    def __init__(
        self, network: MemoryNetwork, peer_id: PeerId, address: str, nursery: trio.Nursery, gate: Gate
    ) -> None:
        self.peer_id = peer_id
        self.addresses: tuple[str, ...] = (f"{address}/p2p/{peer_id}",)
        self.closed = False
        self.gate = gate
        self._network, self._nursery = network, nursery
        self._announcer = Announcer(nursery)
        self._all: dict[_Connection, PeerId] = {}
        self._connections = LinkTable[_Connection](lambda connection: connection.views[peer_id])  # of members
        self._draining = Draining(nursery, self._connections, self._ask_idle)
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._answers: dict[str, tuple[Literal["members", "anyone"], Answer]] = {}
        self._promises = Promises()
        if gate.checks:
            self.serve(MEMBER, nothing_more)
        self._serving: Counter[PeerId] = Counter()

    async def dial(
        self,
        peer_id: PeerId,
        addresses: Sequence[str],
        *,
        guest: bool = False,
        delays_s: Sequence[float] = (),
        better: bool = False,
    ) -> None:
        """See ports.Swarm. Without an admission everybody is a member. Addresses are tried one by one, none too early."""
        await trio.lowlevel.checkpoint()
        if peer_id == self.peer_id:
            raise ConnectError("that is our own PeerId")
        async with self._dialling.setdefault(peer_id, trio.Lock()):
            there = self._connections.best(peer_id)
            enough = there and (not better or there.views[self.peer_id].path in ("direct", "mapped"))
            if enough or (guest and self._guests(peer_id)):
                return
            if not addresses:
                raise ConnectError("no address of the peer is known")
            attempts: list[tuple[str, str, str]] = []
            began = trio.current_time()
            for number, address in enumerate(addresses[: limits.MAX_DIAL_ADDRESSES]):
                await trio.sleep_until(began + (delays_s[number] if number < len(delays_s) else 0.0))
                failure = await self._try_dial(peer_id, address, guest, better)
                if failure is None:
                    return
                attempts.append((address, *failure))
        raise ConnectError(attempts=attempts)

    async def _try_dial(self, peer_id: PeerId, address: str, guest: bool, better: bool) -> tuple[str, str] | None:
        target = self._network.at(address)
        if target is None or target is self or self.closed:
            return "connect", "connection refused"
        with trio.move_on_after(limits.DIAL_ADDRESS_TIMEOUT_S) as scope:
            await self._network.travel(self.peer_id, target.peer_id)
            await self._network.travel(target.peer_id, self.peer_id)
        if scope.cancelled_caught:
            return "connect", f"no answer within {limits.DIAL_ADDRESS_TIMEOUT_S:g} s"
        if target.closed:
            return "connect", "connection refused"
        if target.peer_id != peer_id:
            return "authenticate", f"the peer there is {target.peer_id}"
        if better or peer_id not in self._connections:  # both may dial at once
            base, own_base = (each.partition("/p2p/")[0] for each in (address, self.addresses[0]))
            connection = _Connection(self, target, base, own_base)
            self.connected(connection, peer_id, guest)
            target.connected(connection, self.peer_id, guest=False)
            open_member = partial(self._open_on, connection, peer_id, MEMBER)
            await self.gate.ask(connection.passages[self.peer_id], open_member)
        return None

    async def adopt(
        self,
        stream: ByteStream,
        peer_id: PeerId,
        direction: Literal["in", "out"],
        path: Path,
        address: str,
        *,
        guest: bool = False,
    ) -> None:
        """See ports.Swarm. Both ends are swarms of one network. Bytes do not go over ``stream``, but the end of it is theirs."""
        try:
            await trio.lowlevel.checkpoint()
            if peer_id == self.peer_id:
                raise ConnectError("that is our own PeerId")
            meetings = self._network.meetings
            if direction == "out":
                connect = partial(self._connect_adopted, stream, peer_id, path, address, guest)
                connection = await meetings.lead(stream, self.peer_id, peer_id, connect)
            else:
                connection = await meetings.follow(stream, self.peer_id, peer_id, address)
                self._tie(stream, connection)
        except BaseException:
            stream.close()
            raise
        passage = connection.passages[self.peer_id]
        if direction == "out":
            await self.gate.ask(passage, partial(self._open_on, connection, peer_id, MEMBER))
        else:
            await self.gate.wait_asked(passage, guest=guest)

    def _connect_adopted(
        self,
        stream: ByteStream,
        peer_id: PeerId,
        path: Path,
        address: str,
        guest: bool,
        meeting: Meeting[_Connection],
    ) -> _Connection:
        target = self._network.of(peer_id)
        if target is None:
            raise ConnectError("the peer is gone")
        connection = _Connection(self, target, address, meeting.address, path)
        self._tie(stream, connection)
        self.connected(connection, peer_id, guest)
        target.connected(connection, self.peer_id, guest=False)
        return connection

    def _tie(self, stream: ByteStream, connection: _Connection) -> None:
        """From now on each ends with the other."""
        connection.carriers.append(stream)
        self._nursery.start_soon(self._follow, stream, connection)

    async def _follow(self, stream: ByteStream, connection: _Connection) -> None:
        try:
            while await stream.receive_some(1024):
                pass
        except STREAM_FAILURES:
            pass
        finally:
            connection.close()

    def _guests(self, peer_id: PeerId) -> list[_Connection]:
        of_peer = (connection for connection, peer in self._all.items() if peer == peer_id)
        return [connection for connection in of_peer if connection.passages[self.peer_id].state == "guest"]

    def connected(self, connection: _Connection, peer_id: PeerId, guest: bool) -> None:
        """A connection was made; who it is of is still to be seen."""
        self._all[connection] = peer_id
        self.gate.open(connection.passages[self.peer_id], guest=guest)

    async def open_stream(self, peer_id: PeerId, protocol: str, *, eager: bool = False) -> Stream:
        """See ports.Swarm. Here the peer consents first in any case."""
        connection = self._connections.best(peer_id) or next(reversed(self._guests(peer_id)), None)
        if connection is None:
            await trio.lowlevel.checkpoint()
            raise PeerGone("not connected to the peer")
        return await self._open_on(connection, peer_id, protocol)

    async def _open_on(self, connection: _Connection, peer_id: PeerId, protocol: str) -> Stream:
        if connection.opened[self.peer_id] >= limits.MAX_STREAMS_PER_PEER:
            raise Busy(f"{limits.MAX_STREAMS_PER_PEER} streams to this peer are open already")
        with connection.in_use():
            await self._go_and_come(connection, peer_id)
        there = Pipe(self._network, self.peer_id, peer_id, connection.on_arrival)
        back = Pipe(self._network, peer_id, self.peer_id, connection.on_arrival)
        other = connection.other(self.peer_id)
        if protocol in other._promises:
            with connection.in_use():
                await other._promises.wait(protocol)
        if protocol not in other._answers:
            raise VersionMismatch(f"the peer does not speak {protocol}")
        connection.pipes |= {there: None, back: None}
        connection.opened[self.peer_id] += 1
        connection.using(1)
        self.gate.using(connection.passages[self.peer_id], 1)
        forget = partial(self._closed_stream, connection, there, back)
        stream = MemoryStream(peer_id, back, there, forget, connection.views[self.peer_id].address)
        answering = MemoryStream(self.peer_id, there, back, lambda: None, connection.views[peer_id].address)
        other.answer(protocol, answering, connection.passages[peer_id])
        return stream

    async def _go_and_come(self, connection: _Connection, peer_id: PeerId) -> None:
        with trio.move_on_after(limits.NEW_STREAM_TIMEOUT_S) as scope:
            await self._network.travel(self.peer_id, peer_id)
            await self._network.travel(peer_id, self.peer_id)
        if scope.cancelled_caught or connection not in self._all:
            raise PeerGone("the peer did not answer")

    async def _ask_idle(self, connection: _Connection) -> bool:
        await self._go_and_come(connection, connection.views[self.peer_id].peer_id)
        return connection.other(self.peer_id)._draining.may_end(connection)

    def _closed_stream(self, connection: _Connection, there: Pipe, back: Pipe) -> None:
        connection.opened[self.peer_id] -= 1
        connection.using(-1)
        self.gate.using(connection.passages[self.peer_id], -1)
        connection.pipes.pop(there, None)
        connection.pipes.pop(back, None)

    def answer(self, protocol: str, stream: MemoryStream, passage: Passage) -> None:
        """A peer opened ``stream``: serve it, or reset it if too many are open."""
        peer = stream.peer
        if self._serving[peer] >= limits.MAX_STREAMS_PER_PEER or self._serving.total() >= limits.MAX_STREAMS:
            stream.break_off()
            return
        self._serving[peer] += 1
        self._nursery.start_soon(self._serve_one, protocol, stream, passage)

    async def _serve_one(self, protocol: str, stream: MemoryStream, passage: Passage) -> None:
        serve = partial(self.gate.serve, passage, stream, protocol, *self._answers[protocol])
        welcome = self.gate.stream_opened(passage)
        try:
            if welcome and await isolate("stream", serve, peer=stream.peer, protocol=protocol):
                await stream.aclose()
        finally:
            self.gate.stream_closed(passage)
            stream.break_off()
            self._serving[stream.peer] -= 1

    def serve(
        self,
        protocol: str,
        answer: Callable[[Stream], Awaitable[None]],
        *,
        to: Literal["members", "anyone"] = "members",
    ) -> None:
        """See ports.Swarm."""
        self._answers[protocol] = (to, answer)
        self._promises.keep(protocol)

    def promise(self, protocols: Iterable[str]) -> None:
        """See ports.PromisesProtocols."""
        for protocol in protocols:
            if protocol not in self._answers:
                self._promises.add(protocol)

    def promised_all(self) -> tuple[str, ...]:
        """See ports.PromisesProtocols."""
        return self._promises.end()

    async def disconnect(self, peer_id: PeerId, last: ConnectionView | None = None) -> None:
        """See ports.Swarm."""
        if last is None:
            connections = [connection for connection, peer in self._all.items() if peer == peer_id]
        else:
            connections = self._connections.up_to(last)
        for connection in connections:
            connection.close()
        await trio.lowlevel.checkpoint()

    def connections(self) -> Mapping[PeerId, ConnectionView]:
        """See ports.Swarm."""
        return self._connections.views()

    def heard_s(self, peer_id: PeerId, over: ConnectionView | None = None) -> float | None:
        """See ports.HearsPeers."""
        connections = self._connections.of(peer_id)
        heard = (c.arrived_s[self.peer_id] for c in connections if over is None or c.views[self.peer_id] == over)
        return max(heard, default=None)

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[SwarmEvent]]:
        """See ports.Swarm."""
        return self._announcer.subscribe()

    def gained(self, peer_id: PeerId, connection: _Connection) -> None:
        """A connection is a member's."""
        self._changed(peer_id, self._connections.add(connection))

    def lost(self, peer_id: PeerId, connection: _Connection) -> None:
        """A connection ended."""
        self._all.pop(connection, None)
        self.gate.over(connection.passages[self.peer_id])
        self._changed(peer_id, self._connections.remove(connection))

    def _changed(self, peer_id: PeerId, change: Change | None) -> None:
        self._announcer.tell(peer_id, change)
        self._draining.look(peer_id)

    def close(self) -> None:
        """End every connection, for good; idempotent."""
        self.closed = True
        self.cut()

    def cut(self) -> None:
        """End every connection."""
        for connection in tuple(self._all):
            connection.close()
