"""Data channels over UDP: ICE, DTLS and SCTP by aiortc; satisfies ports.Channels.

Each channel has a task and an asyncio loop of its own in the nursery of `open_channels`; its end, by whatever, ends everything
in it: sockets, checks, timers. Candidates: our interfaces' addresses (never loopback or link-local) and how the first STUN
server that answers sees them; or, with TURN servers, only what these relay. The DTLS certificate is made for one channel, and
its fingerprint travels in the SDP: whoever vouches for the SDP vouches for the channel. A channel carries bytes in messages of
16 KiB, in order, and waits for slow readers; a closed one sends what it was given first, for LINGER_S at most. A lost one is
noticed after half a minute (RFC 7675); who needs it sooner asks for signs of life. Not here: which of the other end's candidates
are believed (core.candidates), signalling, what the parts do (net.ice_parts).
"""

from __future__ import annotations

import ipaddress
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from meshmax.base.errors import ConnectError
from meshmax.base.foreign import words_of
from meshmax.base.traversal import TurnServer
from meshmax.base.units import KIB, MIB
from meshmax.net.asyncio_bridge import Loop, open_loop
from meshmax.ports import ChannelEnd, Channels
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire.sdp import Description, decode, encode

if TYPE_CHECKING:
    from types import ModuleType

    from meshmax.net.ice_parts import Parts

GATHER_S: Final = 1.0  # for STUN; a server that is there answers in a round trip, and networks that block UDP never do
GRACE_S: Final = 0.1  # for the other interfaces once one has its answer: some lead nowhere
GATHER_TURN_S: Final = 3.0  # TCP, TLS and two questions to the server take five round trips
MAX_STUN: Final = 2  # servers that are asked
MAX_TURN: Final = 2
MAX_HOSTS: Final = 8  # of our addresses; a check for each with each of theirs
MAX_CHANNELS: Final = 64  # at once, attempts included; each has some sockets, and 1 MiB at worst
SEND_BYTES: Final = 256 * KIB  # that wait to be sent: at 4 MB/s a sixteenth of a second
RECEIVE_BYTES: Final = 1 * MIB  # that came and were not read; above, they have to be sent again
LINGER_S: Final = 1.0  # for what was sent before a close
STOP_S: Final = 2.0  # to end in order; the rest is cut
PIECE_BYTES: Final = 16 * KIB  # ice_parts.MESSAGE_BYTES, which is not imported here

_log = get_logger("ice")


class IceStream:
    """An open channel; satisfies ports.ByteStream."""

    def __init__(self, channel: _Channel, remote: tuple[str, int]) -> None:
        self.remote = remote
        self._channel = channel

    async def send_all(self, data: bytes) -> None:
        """Returns when all but SEND_BYTES of what was given is on its way."""
        await self._channel.send_all(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        """What came, or b"" when the other end closed."""
        return await self._channel.receive_some(max_bytes)

    def close(self) -> None:
        """Nothing is read or written any more; what was sent before still goes, for a moment."""
        self._channel.close()


class _Channel:
    """One end, from gathering to its end; satisfies ports.ChannelEnd."""

    def __init__(
        self, addresses: Callable[[], Sequence[str]], stun: Sequence[tuple[str, int]], turn: Sequence[TurnServer]
    ):
        self._addresses = addresses
        self._stun, self._turn = stun[:MAX_STUN], turn[:MAX_TURN]
        self._offers = False
        self._taken = False
        self._theirs: Description | None = None
        self.ready = trio.Event()  # parts are there
        self._given = trio.Event()  # their SDP
        self._settled = trio.Event()  # open, or failed for ``_why``
        self._ended = trio.Event()
        self._why: str | None = None  # it ended; "": in order
        self._closed = False
        self._remote: tuple[str, int] | None = None
        self._loop: Loop
        self._parts: Parts
        self._queued_bytes = 0
        self._low = trio.Event()
        self._received: deque[bytes] = deque()
        self._received_bytes = 0
        self._came = trio.Event()

    # --- its life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it ended, by whatever; in the nursery of the channels."""
        try:
            module = await _import_parts()
        except ImportError as error:
            self._end(f"aiortc cannot be loaded here: {error}")
            self.ready.set()
            return
        async with open_loop(self._foreign_error) as loop:
            self._loop = loop
            self._parts = await loop.make(module.Parts, self._room, self._message, self._wake_sender, self._end)
            self.ready.set()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._connect_once_given)
                    await self._ended.wait()
                    await self._linger()
                    nursery.cancel_scope.cancel()
            finally:
                self._end("it was closed")
                with trio.CancelScope(deadline=trio.current_time() + STOP_S, shield=True):
                    await isolate("ice", partial(loop.call, self._parts.stop))
                loop.soon(self._parts.cut)

    async def _connect_once_given(self) -> None:
        await self._given.wait()
        assert self._theirs is not None
        # Whatever the libraries make of what a remote sends ends this channel alone.
        if not await isolate("ice", partial(self._connect, self._theirs), self._failed):
            self._end("it failed")

    def _failed(self, error: Exception) -> None:
        self._end(words_of(error))

    async def _connect(self, theirs: Description) -> None:
        opened = trio.Event()
        remote = await self._loop.call(lambda: self._parts.connect(theirs, offers=self._offers))
        await self._loop.call(self._parts.open, opened.set)
        await opened.wait()
        self._remote = remote
        self._settled.set()

    async def _linger(self) -> None:
        """What was given before our own close still goes."""
        with trio.move_on_after(LINGER_S):
            while self._closed and not self._lost and (self._queued_bytes or self._parts.unsent):  # noqa: ASYNC110  aiortc tells nobody
                await trio.sleep(0.01)

    @property
    def _lost(self) -> bool:
        return self._why not in (None, "")

    def _end(self, why: str) -> None:
        if self._why is None:
            self._why = why
        self._settled.set()
        self._ended.set()
        self._low.set()
        self._came.set()

    def _foreign_error(self, what: str) -> None:
        _log.debug("a task of a data channel failed", what=what)

    # --- ports.ChannelEnd -------------------------------------------------------------------------------------------

    async def offer(self) -> str:
        """Our SDP, with all candidates that were gathered."""
        self._offers = True
        return await self._describe()

    async def answer(self, offer: str) -> str:
        """Our SDP for the other's; checks begin. Raises RemoteProtocolError."""
        theirs = decode(offer)
        text = await self._describe()
        self._begin(theirs)
        return text

    async def accept(self, answer: str) -> None:
        """The other's SDP for ours; checks begin. Raises RemoteProtocolError."""
        self._begin(decode(answer))
        await trio.lowlevel.checkpoint()

    async def connected(self) -> IceStream:
        """The open channel, which lives on after the block. Raises ConnectError. Deadlines are the caller's."""
        await self._settled.wait()
        if self._remote is None or self._why is not None:
            raise ConnectError("no data channel was opened", [("udp", "ice", self._why or "it was closed")])
        self._taken = True
        return IceStream(self, self._remote)

    def leave(self) -> None:
        """The block ended: so does this, unless its stream was taken."""
        if not self._taken:
            self._end("it was closed")

    def _begin(self, theirs: Description) -> None:
        self._theirs = theirs
        self._given.set()

    async def _describe(self) -> str:
        try:
            if self._why is not None:
                raise trio.ClosedResourceError
            await self._gather()
            description = await self._loop.make(lambda: self._parts.described(offers=self._offers))
        except trio.ClosedResourceError:
            raise ConnectError("no data channel was opened", [("udp", "ice", self._why or "it was closed")]) from None
        return encode(description, random.getrandbits(62))

    # --- gathering --------------------------------------------------------------------------------------------------

    async def _gather(self) -> None:
        if self._turn:
            with trio.move_on_after(GATHER_TURN_S):
                async with trio.open_nursery() as nursery:
                    for relay in self._turn:
                        nursery.start_soon(self._gather_relayed, relay)
            return
        ips = _offered(self._addresses())
        with trio.CancelScope(shield=True):  # it waits for nothing, and half a list of sockets would be left open
            protocols = await self._loop.call(self._parts.gather_hosts, ips)
        with trio.move_on_after(GATHER_S) as scope:
            async with trio.open_nursery() as nursery:
                for protocol in protocols:
                    for server in self._stun:
                        if (":" in protocol.local_candidate.host) == (":" in server[0]):
                            nursery.start_soon(self._gather_reflexive, protocol, server, scope)

    async def _gather_reflexive(self, protocol: object, server: tuple[str, int], scope: trio.CancelScope) -> None:
        if await self._loop.call(self._parts.gather_reflexive, protocol, server):
            scope.deadline = min(scope.deadline, trio.current_time() + GRACE_S)

    async def _gather_relayed(self, server: TurnServer) -> None:
        try:
            await self._loop.call(self._parts.gather_relayed, server)
        except ConnectError as error:
            _log.info("a TURN server gave us no address", server=server.url, error=error.message)

    # --- bytes ------------------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes) -> None:
        """See `IceStream`."""
        await trio.lowlevel.checkpoint()
        for start in range(0, len(data), PIECE_BYTES):
            self._check_sender()
            while self._queued_bytes + self._parts.buffered_bytes >= SEND_BYTES:
                self._low = trio.Event()
                await self._low.wait()
                self._check_sender()
            piece = bytes(data[start : start + PIECE_BYTES])
            self._queued_bytes += len(piece)
            self._loop.soon(self._send_piece, piece)

    def _send_piece(self, piece: bytes) -> None:
        self._queued_bytes -= len(piece)
        self._parts.send(piece, SEND_BYTES // 2)

    def _check_sender(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the channel was closed")
        if self._why is not None:
            raise trio.BrokenResourceError(self._why or "the other end closed the channel")

    def _wake_sender(self) -> None:
        self._low.set()

    async def receive_some(self, max_bytes: int) -> bytes:
        """See `IceStream`."""
        await trio.lowlevel.checkpoint()
        while not self._received or self._closed:
            if self._closed:
                raise trio.ClosedResourceError("the channel was closed")
            if self._why == "":
                return b""
            if self._why is not None:
                raise trio.BrokenResourceError(self._why)
            self._came = trio.Event()
            await self._came.wait()
        data = self._received.popleft()
        if len(data) > max_bytes:
            self._received.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self._received_bytes -= len(data)
        return data

    def close(self) -> None:
        """See `IceStream`."""
        self._closed = True
        self._received.clear()
        self._end("")

    def _room(self) -> bool:
        return self._received_bytes < RECEIVE_BYTES

    def _message(self, data: bytes) -> None:
        if data and not self._closed:
            self._received.append(data)
            self._received_bytes += len(data)
            self._came.set()


class IceChannels:
    """Satisfies ports.Channels. Made by `open_channels`."""

    def __init__(self, nursery: trio.Nursery, addresses: Callable[[], Sequence[str]]) -> None:
        self._nursery, self._addresses = nursery, addresses
        self.count = 0  # channels that live, attempts included

    @asynccontextmanager
    async def open_channel(
        self, stun: Sequence[tuple[str, int]], turn: Sequence[TurnServer] = ()
    ) -> AsyncIterator[ChannelEnd]:
        """One end; see ports.Channels. Raises ConnectError where there are MAX_CHANNELS already."""
        if self.count >= MAX_CHANNELS:
            raise ConnectError(f"there are {MAX_CHANNELS} data channels already, as many as may be at once")
        channel = _Channel(self._addresses, stun, turn)
        self._nursery.start_soon(self._run, channel)
        try:
            await channel.ready.wait()
            yield channel
        finally:
            channel.leave()

    async def _run(self, channel: _Channel) -> None:
        self.count += 1
        try:
            await channel.run()
        finally:
            self.count -= 1


@asynccontextmanager
async def open_channels(addresses: Callable[[], Sequence[str]]) -> AsyncIterator[Channels]:
    """Data channels, until the block ends. ``addresses``: IP addresses of our running interfaces."""
    async with trio.open_nursery() as nursery:
        try:
            yield IceChannels(nursery, addresses)
        finally:
            nursery.cancel_scope.cancel()


def _offered(addresses: Sequence[str]) -> list[str]:
    """Those that mean something to another machine."""
    found = dict.fromkeys(addresses)
    return [ip for ip in found if _meaningful(ip)][:MAX_HOSTS]


def _meaningful(text: str) -> bool:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast)


async def _import_parts() -> ModuleType:
    """In a thread: it takes a second the first time."""

    def imported() -> ModuleType:
        from meshmax.net import ice_parts

        return ice_parts

    return await trio.to_thread.run_sync(imported)
