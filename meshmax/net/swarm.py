"""Authenticated connections to peers over py-libp2p: TCP, Noise and Yamux, Ed25519 identities; satisfies ports.Swarm.

What is decided here: when a peer counts as gone (its last connection ended, or `disconnect`), how many streams are open.
Which connection of a peer is used is net.links' matter, how the others end net.draining's; dialling is net.dialler's, accepting
net.door's, authenticating net.upgrader's, who is a member net.admission's, one stream net.stream's, the library's traps
net.library's. A frozen peer is not noticed here: nothing on a member's connection times out by itself; heartbeats and
`disconnect` do that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshmax.base.errors import Busy, ConfigError, ConnectError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.status import Path
from meshmax.net import library, limits
from meshmax.net.addresses import allow_any, concrete_addresses, multiaddr_of
from meshmax.net.admission import Answer, Gate, nothing_more
from meshmax.net.announce import Announcer
from meshmax.net.dialler import Dialler
from meshmax.net.door import Door, listen_near
from meshmax.net.draining import Draining
from meshmax.net.links import Change, LinkTable
from meshmax.net.negotiation import EagerStream, negotiate
from meshmax.net.promises import Promises
from meshmax.net.stream import LibraryStream
from meshmax.net.tcp import TcpTransport
from meshmax.net.upgrader import Link, Upgrader, reason
from meshmax.net.wire import Listener, Transport
from meshmax.ports import Admission, ByteStream, ConnectionView, Stream, SwarmEvent
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import CONNECTIONS
from meshmax.wire.protocols import IDLE, MEMBER

_log = get_logger("swarm")
_YES, _NO = b"\1", b"\0"
_NO_ANSWER = f"the peer did not answer within {limits.NEW_STREAM_TIMEOUT_S:g} s"


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
        self._links = LinkTable[Link](attrgetter("view"))  # of members
        self._draining = Draining(nursery, self._links, self._ask_idle)
        self._ended = False
        self._answers: dict[str, Callable[[_Comer], Awaitable[None]]] = {}
        self._promises = Promises()
        self._opened: Counter[PeerId] = Counter()
        self._served: Counter[PeerId] = Counter()
        self._upgrader = Upgrader(self._network, nursery, self._welcome, self._lost, self._take)
        self._dialler = Dialler(transport, allow, self._upgrader.outbound)
        self.door = Door(nursery, allow, self._accept)
        self._network.set_stream_handler(self._answer_early)
        self._register(IDLE, self._answer_idle)
        if gate.checks:
            self.serve(MEMBER, nothing_more)
        for _, listener in listeners:
            self.door.open(listener)

    @property
    def addresses(self) -> tuple[str, ...]:
        """See ports.Swarm; looked up anew each time, since interfaces come and go."""
        return _advertised(self._listeners, self._transport, self.peer_id)

    # --- connections -------------------------------------------------------------------------------------------------

    async def dial(
        self,
        peer_id: PeerId,
        addresses: Sequence[str],
        *,
        guest: bool = False,
        delays_s: Sequence[float] = (),
        better: bool = False,
    ) -> None:
        """See ports.Swarm. Without an admission everybody is a member."""
        await trio.lowlevel.checkpoint()
        if peer_id == self.peer_id:
            raise ConnectError("that is our own PeerId")

        def connected() -> bool:
            if better:
                return any(link.view.path in ("direct", "mapped") for link in self._links.of(peer_id))
            return peer_id in self._links or (guest and bool(self._guest_links(peer_id)))

        await self._dialler.dial(peer_id, addresses, connected, partial(self._ask, guest=guest), delays_s)

    async def prove(self, peer_id: PeerId, address: str) -> None:
        """See ports.ProvesPeers."""
        await self._dialler.prove(peer_id, address)

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
        """See ports.Swarm."""
        try:
            await trio.lowlevel.checkpoint()
            if peer_id == self.peer_id:
                raise ConnectError("that is our own PeerId")
            upgrade = self._upgrader.outbound if direction == "out" else self._upgrader.inbound
            link = await upgrade(stream, peer_id, path, address)
        except library.failures() as error:
            stream.close()
            raise ConnectError(f"the handshake failed: {reason(error)}") from error
        except BaseException:
            stream.close()
            raise
        if direction == "out":
            await self._ask(link, guest=guest)
        else:
            self._gate.open(link.passage)
            await self._gate.wait_asked(link.passage, guest=guest)

    async def _ask(self, link: Link, *, guest: bool) -> None:
        if guest or not self._gate.checks:
            await link.wait_agreed()
        self._gate.open(link.passage, guest=guest)
        await self._gate.ask(link.passage, partial(self._open_eagerly, link, MEMBER))

    def _guest_links(self, peer_id: PeerId) -> list[Link]:
        links = self._upgrader.links.values()
        return [link for link in links if link.view.peer_id == peer_id and link.passage.state == "guest"]

    async def _accept(self, stream: ByteStream) -> None:
        try:
            link = await self._upgrader.inbound(stream)
        except ConnectError:
            if self._upgrader.closed:
                return  # we were leaving
            raise
        self._gate.open(link.passage)

    def _welcome(self, link: Link) -> None:
        peer_id = link.view.peer_id
        library.trust(link.connection)
        self._changed(peer_id, self._links.add(link))

    def _lost(self, link: Link) -> None:
        self._gate.over(link.passage)
        self._changed(link.view.peer_id, self._links.remove(link))

    def _changed(self, peer_id: PeerId, change: Change | None) -> None:
        CONNECTIONS.set(len(self._links))
        self._announcer.tell(peer_id, change)
        self._draining.look(peer_id)

    async def disconnect(self, peer_id: PeerId, last: ConnectionView | None = None) -> None:
        """See ports.Swarm."""
        if last is None:
            links = [link for link in self._upgrader.links.values() if link.view.peer_id == peer_id]
        else:
            links = self._links.up_to(last)
        # The library's own close would first wait to say good-bye behind the stalled writer that we want to be rid of.
        for link in links:
            link.wire.cut()
        await trio.lowlevel.checkpoint()

    def connections(self) -> Mapping[PeerId, ConnectionView]:
        """See ports.Swarm."""
        return self._links.views()

    def streams(self, peer_id: PeerId) -> int:
        """See ports.CountsStreams."""
        return self._opened[peer_id] + self._served[peer_id]

    def heard_s(self, peer_id: PeerId, over: ConnectionView | None = None) -> float | None:
        """See ports.HearsPeers."""
        links = self._links.of(peer_id)
        return max((link.heard_s for link in links if over is None or link.view == over), default=None)

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[SwarmEvent]]:
        """See ports.Swarm."""
        return self._announcer.subscribe()

    # --- streams we open ---------------------------------------------------------------------------------------------

    async def open_stream(self, peer_id: PeerId, protocol: str, *, eager: bool = False) -> Stream:
        """See ports.Swarm. Raises Busy where MAX_STREAMS_PER_PEER are open already."""
        await trio.lowlevel.checkpoint_if_cancelled()  # what the stream is for takes turns of the event loop
        link = self._links.best(peer_id) or next(reversed(self._guest_links(peer_id)), None)
        if link is None:
            raise PeerGone("not connected to the peer")
        if eager:
            return await self._open_eagerly(link, protocol)
        stream = self._open_on(link)
        with trio.move_on_after(limits.NEW_STREAM_TIMEOUT_S):
            await _agree(stream, protocol)
            return stream
        raise PeerGone(_NO_ANSWER)

    async def _open_eagerly(self, link: Link, protocol: str) -> Stream:
        return EagerStream(self._open_on(link), protocol)

    async def _ask_idle(self, link: Link) -> bool:
        stream = self._open_on(link, asks=True)
        await _agree(stream, IDLE)
        try:
            return await stream.receive_some(1) == _YES
        finally:
            stream.give_up()

    def _open_on(self, link: Link, *, asks: bool = False) -> LibraryStream:
        """A stream on which no protocol is agreed yet; ``asks``: only about the link. Raises Busy, PeerGone."""
        peer_id = link.view.peer_id
        if self._opened[peer_id] >= limits.MAX_STREAMS_PER_PEER:
            raise Busy(f"{limits.MAX_STREAMS_PER_PEER} streams to this peer are open already")
        self._opened[peer_id] += 1
        if not asks:
            link.opened()
        self._gate.using(link.passage, 1)
        try:
            muxed = link.connection.muxed_conn.open_now()
        except trio.WouldBlock:
            self._uncount(link, asks)
            raise Busy("the connection to this peer carries as many streams as it can") from None
        except library.failures() as error:
            self._uncount(link, asks)
            raise PeerGone(f"the connection was lost ({reason(error)})") from None
        stream = LibraryStream(peer_id, muxed, self._say_farewell, partial(self._closed_ours, link))
        stream.asks = asks
        return stream

    # --- streams that peers open -------------------------------------------------------------------------------------

    def serve(
        self,
        protocol: str,
        answer: Callable[[Stream], Awaitable[None]],
        *,
        to: Literal["members", "anyone"] = "members",
    ) -> None:
        """See ports.Swarm."""
        self._register(protocol, partial(self._serve_one, protocol, to, answer))
        self._promises.keep(protocol)

    def promise(self, protocols: Iterable[str]) -> None:
        """See ports.PromisesProtocols."""
        for protocol in protocols:
            if protocol not in self._answers:
                self._promises.add(protocol)
                self._register(protocol, partial(self._serve_soon, protocol))

    def promised_all(self) -> tuple[str, ...]:
        """See ports.PromisesProtocols."""
        left = self._promises.end()
        for protocol in left:
            del self._answers[protocol]
            self._host.remove_stream_handler(protocol)
        return left

    def _register(self, protocol: str, answer: Callable[[_Comer], Awaitable[None]]) -> None:
        self._answers[protocol] = answer
        self._host.set_stream_handler(protocol, partial(_answered, answer))

    async def _serve_soon(self, protocol: str, comer: _Comer) -> None:
        await self._promises.wait(protocol)
        if protocol in self._answers and protocol not in self._promises:
            await self._answers[protocol](comer)
        else:
            await comer.stream.reset()

    def _take(self, link: Link, muxed: Any) -> None:
        self._nursery.start_soon(self._answer, link, muxed)

    async def _answer_early(self, net_stream: Any) -> None:
        """A stream that came before its connection was ours; the library's swarm has a task for it."""
        link = self._upgrader.links.get(net_stream.muxed_conn)
        if link is None:
            await net_stream.reset()
        else:
            await self._answer(link, net_stream.muxed_stream)

    async def _answer(self, link: Link, muxed: Any) -> None:
        """Every inbound stream, before its protocol is known."""
        peer_id = link.view.peer_id
        stream = LibraryStream(peer_id, muxed, self._say_farewell, partial(self._closed_theirs, link))
        link.opened()
        crowded = self._served[peer_id] >= limits.MAX_STREAMS_PER_PEER or self._served.total() >= limits.MAX_STREAMS
        self._served[peer_id] += 1
        if crowded:
            await stream.reset()
            return
        welcome = self._gate.stream_opened(link.passage)
        try:
            if welcome and await isolate(
                "stream", partial(self._negotiate_and_answer, _Comer(stream, link)), peer=peer_id
            ):
                await stream.aclose()
        finally:
            self._gate.stream_closed(link.passage)
            stream.give_up()

    async def _negotiate_and_answer(self, comer: _Comer) -> None:
        stream = comer.stream
        try:
            # Who sent its first message along waits for ours, so the consent can go with that; the library sends two frames.
            if protocol := stream.try_agree(self._answers):
                if not stream.has_more:
                    await stream.send_all(b"")
                await self._answers[protocol](comer)
            else:
                await self._host._swarm_stream_handler(library.net_stream(stream.muxed, comer))
        except library.failures() as error:
            raise RemoteProtocolError(f"the stream failed: {reason(error)}") from error

    async def _serve_one(self, protocol: str, to: Literal["members", "anyone"], answer: Answer, comer: _Comer) -> None:
        stream = comer.stream
        serve = partial(self._gate.serve, comer.link.passage, stream, protocol, to, answer)
        if not await isolate("answer", serve, peer=stream.peer, protocol=protocol):
            await stream.reset()

    async def _answer_idle(self, comer: _Comer) -> None:
        if comer.link.passage.state != "member":
            await comer.stream.reset()
            return
        comer.stream.asks = True
        comer.link.discount()
        with suppress(PeerGone):  # then the question is void
            await comer.stream.send_all(_YES if self._draining.may_end(comer.link) else _NO)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _closed(self, counter: Counter[PeerId], peer_id: PeerId) -> None:
        counter[peer_id] -= 1
        if counter[peer_id] <= 0:
            del counter[peer_id]

    def _closed_theirs(self, link: Link, stream: LibraryStream) -> None:
        self._closed(self._served, stream.peer)
        if not stream.asks:
            link.closed()

    def _closed_ours(self, link: Link, stream: LibraryStream) -> None:
        self._uncount(link, stream.asks)

    def _uncount(self, link: Link, asks: bool) -> None:
        self._closed(self._opened, link.view.peer_id)
        if not asks:
            link.closed()
        self._gate.using(link.passage, -1)

    def _say_farewell(self, farewell: Callable[[], Awaitable[None]]) -> None:
        if not self._ended:  # the library's tasks outlive ours by a moment; cut connections need no farewell
            self._nursery.start_soon(farewell)

    async def close(self) -> None:
        """Accept nothing more, let out what is queued for at most LAST_WORDS_S, cut every connection."""
        for _, listener in self._listeners:
            listener.close()
        self._upgrader.close()
        wires = [link.wire for link in self._upgrader.links.values()]
        with trio.CancelScope(deadline=trio.current_time() + limits.LAST_WORDS_S, shield=True):
            for wire in wires:
                await wire.flush()
        for wire in wires:
            wire.cut()
        self._ended = True


async def _agree(stream: LibraryStream, protocol: str) -> None:
    agreed = False
    try:
        await negotiate(stream, protocol)
        agreed = True
    finally:
        if not agreed:
            stream.give_up()


class _Comer(NamedTuple):
    """A stream that a peer opened, and where it came."""

    stream: LibraryStream
    link: Link


async def _answered(answer: Callable[[_Comer], Awaitable[None]], net_stream: Any) -> None:
    """``answer`` as the library calls it."""
    await answer(net_stream.meshmax_comer)


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
