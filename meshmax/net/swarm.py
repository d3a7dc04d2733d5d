"""Authenticated connections to peers over py-libp2p: TCP, Noise and Yamux, Ed25519 identities; satisfies ports.Swarm.

What is decided here: which connection of a peer is used (the newest, since an older one may belong to a machine that
lost power), when a peer counts as gone (its last connection ended, or `disconnect`), how many streams are open. Dialling
is net.dialler's, accepting net.door's, who is a member net.admission's, one stream net.stream's, the library's traps
net.library's. A frozen peer is not noticed here: nothing on a member's connection times out by itself; heartbeats and
`disconnect` do that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Literal

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshmax.base.errors import Busy, ConfigError, ConnectError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId, parse_peer_id, peer_id_of
from meshmax.net import library, limits
from meshmax.net.addresses import allow_any, concrete_addresses, multiaddr_of
from meshmax.net.admission import Answer, Gate, Passage, nothing_more
from meshmax.net.announce import Announcer
from meshmax.net.dialler import Dialler
from meshmax.net.door import Door, listen_near
from meshmax.net.negotiation import EagerStream, negotiate, propose
from meshmax.net.stream import LibraryStream
from meshmax.net.tcp import TcpTransport
from meshmax.net.wire import Listener, Transport, Wire
from meshmax.ports import Admission, ByteStream, ConnectionView, Stream, SwarmEvent
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import CONNECTIONS
from meshmax.wire.protocols import MEMBER

_log = get_logger("swarm")
_NO_ANSWER = f"the peer did not answer within {limits.NEW_STREAM_TIMEOUT_S:g} s"


class _Link:
    """One authenticated connection. ``connection`` is the library's SwarmConn."""

    def __init__(self, view: ConnectionView, wire: Wire, connection: Any, welcome: Callable[[_Link], None]) -> None:
        self.view, self.wire, self.connection = view, wire, connection
        self.passage = Passage(view.peer_id, wire.remote[0], view.direction, partial(welcome, self), wire.cut)

    def cut(self) -> None:
        """End it now."""
        self.wire.cut()


class LibrarySwarm:
    """See the module. Made by `open_swarm`."""

    def __init__(
        self,
        peer_id: PeerId,
        host: Any,
        nursery: trio.Nursery,
        transport: Transport,
        allow: Callable[[str], bool],
        listeners: Sequence[tuple[str, Listener]],
        gate: Gate,
    ) -> None:
        self.peer_id = peer_id
        self._host, self._network, self._nursery = host, host.get_network(), nursery
        self._transport, self._listeners = transport, listeners
        self._announcer = Announcer(nursery)
        self._gate = gate
        self._all: dict[Any, _Link] = {}  # by the library's muxed connection
        self._links: dict[PeerId, list[_Link]] = {}  # of members
        self._ended = False
        self._opened: Counter[PeerId] = Counter()
        self._served: Counter[PeerId] = Counter()
        self._dialler = Dialler(transport, allow, self._secure_outbound)
        self.door = Door(nursery, allow, self._secure_inbound)
        self._network.set_stream_handler(self._answer)
        if gate.checks:
            self.serve(MEMBER, nothing_more)
        for _, listener in listeners:
            self.door.open(listener)

    @property
    def addresses(self) -> tuple[str, ...]:
        """See ports.Swarm; looked up anew each time, since interfaces come and go."""
        return _advertised(self._listeners, self._transport, self.peer_id)

    # --- connections -------------------------------------------------------------------------------------------------

    async def dial(self, peer_id: PeerId, addresses: Sequence[str], *, guest: bool = False) -> None:
        """See ports.Swarm. Without an admission everybody is a member."""
        await trio.lowlevel.checkpoint()
        if peer_id == self.peer_id:
            raise ConnectError("that is our own PeerId")

        def connected() -> bool:
            return peer_id in self._links or (guest and bool(self._guest_links(peer_id)))

        async def finish(link: _Link) -> None:
            self._gate.open(link.passage, guest=guest)
            await self._gate.ask(link.passage, partial(self._open_member, link))

        await self._dialler.dial(peer_id, addresses, connected, finish)

    async def _open_member(self, link: _Link) -> Stream:
        stream = await self._open_on(link)
        try:
            await propose(stream, MEMBER)
        except BaseException:
            stream.give_up()
            raise
        return EagerStream(stream, MEMBER)

    def _guest_links(self, peer_id: PeerId) -> list[_Link]:
        return [link for link in self._all.values() if link.view.peer_id == peer_id and link.passage.state == "guest"]

    async def _secure_outbound(self, stream: ByteStream, peer_id: PeerId) -> _Link:
        pending = _Pending()
        wire = Wire(stream, pending.end)
        self._nursery.start_soon(wire.pump)
        try:
            connection = await self._network.upgrade_outbound_raw_conn(
                library.make_raw_connection(wire, True), library.make_peer_id(peer_id)
            )
            return self._established(wire, connection, peer_id, "out", pending)
        except BaseException:
            wire.cut()
            raise

    async def _secure_inbound(self, stream: ByteStream) -> None:
        pending = _Pending()
        wire = Wire(stream, pending.end)
        self._nursery.start_soon(wire.pump)
        try:
            muxed = await self._network.upgrade_inbound_raw_conn(library.make_raw_connection(wire, False), None)
            peer_id = parse_peer_id(str(muxed.peer_id))
            found = [c for c in self._network.get_connections(muxed.peer_id) if c.muxed_conn is muxed]
            if not found:
                raise ConnectError("the connection was lost as soon as it was made")
            if sum(link.view.peer_id == peer_id for link in self._all.values()) >= limits.MAX_CONNECTIONS_PER_PEER:
                raise ConnectError("the peer has too many connections to us")
            self._gate.open(self._established(wire, found[0], peer_id, "in", pending).passage)
        except library.failures() as error:
            wire.cut()
            raise ConnectError(f"the handshake failed: {_reason(error)}") from error
        except BaseException:
            wire.cut()
            raise

    def _established(
        self, wire: Wire, connection: Any, peer_id: PeerId, direction: Literal["in", "out"], pending: _Pending
    ) -> _Link:
        if wire.cut_off or connection.is_closed:
            raise PeerGone("the connection was lost as soon as it was made")
        wire.authenticated()
        view = ConnectionView(peer_id, multiaddr_of(*wire.remote), direction, time.time())
        link = self._all[connection.muxed_conn] = _Link(view, wire, connection, self._welcome)
        pending.on_end = partial(self._lost, link)
        return link

    def _welcome(self, link: _Link) -> None:
        peer_id = link.view.peer_id
        library.trust(link.connection)
        self._links.setdefault(peer_id, []).append(link)
        CONNECTIONS.set(len(self._links))
        self._announcer.connected(peer_id)

    def _lost(self, link: _Link) -> None:
        peer_id = link.view.peer_id
        self._all.pop(link.connection.muxed_conn, None)
        self._gate.over(link.passage)
        links = self._links.get(peer_id, [])
        if link not in links:
            return
        links.remove(link)
        if not links:
            del self._links[peer_id]
            CONNECTIONS.set(len(self._links))
            self._announcer.disconnected(peer_id)

    async def disconnect(self, peer_id: PeerId, last: ConnectionView | None = None) -> None:
        """See ports.Swarm."""
        links = [link for link in self._all.values() if link.view.peer_id == peer_id]
        if last is not None:
            links = self._links.get(peer_id, [])
            views = [link.view for link in links]
            links = links[: views.index(last) + 1] if last in views else []
        # The library's own close would first wait to say good-bye behind the stalled writer that we want to be rid of.
        for link in links:
            link.wire.cut()
        await trio.lowlevel.checkpoint()

    def connections(self) -> Mapping[PeerId, ConnectionView]:
        """See ports.Swarm."""
        return {peer_id: links[-1].view for peer_id, links in self._links.items()}

    def streams(self, peer_id: PeerId) -> int:
        """See ports.CountsStreams."""
        return self._opened[peer_id] + self._served[peer_id]

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[SwarmEvent]]:
        """See ports.Swarm."""
        return self._announcer.subscribe()

    # --- streams we open ---------------------------------------------------------------------------------------------

    async def open_stream(self, peer_id: PeerId, protocol: str) -> Stream:
        """See ports.Swarm. Raises Busy where MAX_STREAMS_PER_PEER are open already."""
        await trio.lowlevel.checkpoint()
        links = self._links.get(peer_id) or self._guest_links(peer_id)
        if not links:
            raise PeerGone("not connected to the peer")
        stream = await self._open_on(links[-1])
        taken = False
        with trio.move_on_after(limits.NEW_STREAM_TIMEOUT_S):
            try:
                await negotiate(stream, protocol)
                taken = True
                return stream
            finally:
                if not taken:
                    stream.give_up()
        raise PeerGone(_NO_ANSWER)

    async def _open_on(self, link: _Link) -> LibraryStream:
        """A stream on which no protocol is agreed yet. Raises Busy, PeerGone."""
        peer_id = link.view.peer_id
        if self._opened[peer_id] >= limits.MAX_STREAMS_PER_PEER:
            raise Busy(f"{limits.MAX_STREAMS_PER_PEER} streams to this peer are open already")
        self._opened[peer_id] += 1
        self._gate.using(link.passage, 1)
        opening = _Opening()
        self._nursery.start_soon(self._open_raw, link, opening)
        with trio.move_on_after(limits.NEW_STREAM_TIMEOUT_S):
            try:
                await opening.done.wait()
                if opening.stream is not None:
                    opening.taken = True
                    return opening.stream
            finally:
                if not opening.taken:
                    opening.abandoned = True
                    if opening.stream is not None:
                        opening.stream.give_up()
        raise PeerGone(opening.why or _NO_ANSWER)

    async def _open_raw(self, link: _Link, opening: _Opening) -> None:
        # In a task of its own: the library loses one of a connection's 256 slots each time this is cancelled.
        peer_id = link.view.peer_id
        try:
            net_stream = await link.connection.new_stream()
        except library.failures() as error:
            opening.why = f"the connection was lost ({_reason(error)})"
            self._closed_ours(link)
        else:
            stream = LibraryStream(peer_id, net_stream, self._say_farewell, partial(self._closed_ours, link))
            if opening.abandoned:
                await stream.reset()
            opening.stream = stream
        opening.done.set()

    # --- streams that peers open -------------------------------------------------------------------------------------

    def serve(
        self,
        protocol: str,
        answer: Callable[[Stream], Awaitable[None]],
        *,
        to: Literal["members", "anyone"] = "members",
    ) -> None:
        """See ports.Swarm."""
        self._host.set_stream_handler(protocol, partial(self._serve_one, protocol, to, answer))

    async def _answer(self, net_stream: Any) -> None:
        """Every inbound stream, before its protocol is known."""
        peer_id = PeerId(str(net_stream.muxed_conn.peer_id))
        stream = LibraryStream(peer_id, net_stream, self._say_farewell, partial(self._closed, self._served, peer_id))
        link = self._all.get(net_stream.muxed_conn)
        crowded = self._served[peer_id] >= limits.MAX_STREAMS_PER_PEER or self._served.total() >= limits.MAX_STREAMS
        self._served[peer_id] += 1
        if crowded or link is None:
            await stream.reset()
            return
        net_stream.meshmax_stream = stream, link.passage
        welcome = self._gate.stream_opened(link.passage)
        try:
            if welcome and await isolate("stream", partial(self._negotiate_and_answer, net_stream), peer=peer_id):
                await stream.aclose()
        finally:
            self._gate.stream_closed(link.passage)
            stream.give_up()

    async def _negotiate_and_answer(self, net_stream: Any) -> None:
        try:
            await self._host._swarm_stream_handler(net_stream)
        except library.failures() as error:
            raise RemoteProtocolError(f"the stream failed: {_reason(error)}") from error

    async def _serve_one(
        self, protocol: str, to: Literal["members", "anyone"], answer: Answer, net_stream: Any
    ) -> None:
        stream, passage = net_stream.meshmax_stream
        serve = partial(self._gate.serve, passage, stream, protocol, to, answer)
        if not await isolate("answer", serve, peer=stream.peer, protocol=protocol):
            await stream.reset()

    # --- ends --------------------------------------------------------------------------------------------------------

    def _closed(self, counter: Counter[PeerId], peer_id: PeerId) -> None:
        counter[peer_id] -= 1
        if counter[peer_id] <= 0:
            del counter[peer_id]

    def _closed_ours(self, link: _Link) -> None:
        self._closed(self._opened, link.view.peer_id)
        self._gate.using(link.passage, -1)

    def _say_farewell(self, farewell: Callable[[], Awaitable[None]]) -> None:
        if not self._ended:  # the library's tasks outlive ours by a moment; cut connections need no farewell
            self._nursery.start_soon(farewell)

    async def close(self) -> None:
        """Accept nothing more, let out what is queued for at most LAST_WORDS_S, cut every connection."""
        for _, listener in self._listeners:
            listener.close()
        wires = [link.wire for link in self._all.values()]
        with trio.CancelScope(deadline=trio.current_time() + limits.LAST_WORDS_S, shield=True):
            for wire in wires:
                await wire.flush()
        for wire in wires:
            wire.cut()
        self._ended = True


class _Pending:
    """What to do when a wire ends: nothing while its handshake goes on (that fails by itself), then `on_end`."""

    def __init__(self) -> None:
        self.on_end: Callable[[], None] | None = None

    def end(self) -> None:
        if self.on_end is not None:
            self.on_end()


class _Opening:
    """A stream on its way from the task that makes it to the one that wants it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.stream: LibraryStream | None = None
        self.abandoned = self.taken = False
        self.why = ""


def _reason(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None and str(cause.__cause__):
        cause = cause.__cause__
    return f"{type(cause).__name__}: {cause}"[:200]


def _advertised(listeners: Sequence[tuple[str, Listener]], transport: Transport, peer_id: PeerId) -> tuple[str, ...]:
    interfaces = transport.interface_addresses()
    found = {
        multiaddr_of(ip, listener.local[1], peer_id): interfaces.index(ip) if ip in interfaces else 0
        for host, listener in listeners
        for ip in concrete_addresses(host, interfaces)
    }
    return tuple(sorted(found, key=lambda address: found[address]))


@asynccontextmanager
async def open_swarm(
    private_bytes: bytes,
    listen: Sequence[tuple[str, int]],
    *,
    allow: Callable[[str], bool] = allow_any,
    transport: Transport | None = None,
    admission: Admission | None = None,
    max_guests: int = limits.MAX_GUESTS,
) -> AsyncIterator[LibrarySwarm]:
    """A swarm with the Ed25519 identity ``private_bytes`` (32 bytes), listening on each (host, port) of ``listen``.

    A port that is taken means the next free one (base.config.PORT_TRIES); port 0 any. A host of a family that this
    machine lacks is left out as long as one other works. ``allow`` says of an IP address whether it may connect to us, or
    be dialled. ``transport`` is TCP by default. ``admission`` says who is a member (None: everybody); ``max_guests`` is how
    many connections of others are kept. Raises ConfigError when nothing can be listened on.
    """
    transport = transport or TcpTransport()
    peer_id = peer_id_of(Ed25519PrivateKey.from_private_bytes(private_bytes).public_key().public_bytes_raw())
    listeners = await _listen(transport, listen)
    try:
        host = library.make_host(private_bytes, partial(_advertised, listeners, transport, peer_id))
        async with trio.open_nursery() as nursery:
            try:
                # The nursery is cancelled only after the host has stopped: its last tasks still say farewell there, and
                # Cancelled raised by its stopping would take the place of the error that ended the block.
                async with host.run(listen_addrs=[]):
                    gate = Gate(nursery, admission, max_guests)
                    swarm = LibrarySwarm(peer_id, host, nursery, transport, allow, listeners, gate)
                    try:
                        yield swarm
                    finally:
                        with trio.CancelScope(deadline=trio.current_time() + 2 * limits.LAST_WORDS_S, shield=True):
                            await swarm.close()
            finally:
                nursery.cancel_scope.cancel()
    finally:
        for _, listener in listeners:
            listener.close()


async def _listen(transport: Transport, listen: Sequence[tuple[str, int]]) -> list[tuple[str, Listener]]:
    listeners: list[tuple[str, Listener]] = []
    failed: list[ConfigError] = []
    for host, port in listen:
        try:
            listeners.append((host, await listen_near(transport, host, port)))
        except ConfigError as error:
            failed.append(error)
    if failed and not listeners:
        raise failed[0]
    for failure in failed:
        _log.warning("not listening there", error=failure.message)
    return listeners
