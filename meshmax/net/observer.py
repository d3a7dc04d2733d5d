"""Tells whoever connects by TCP from which address and port they come: STUN over TCP (RFC 8489, 6.2.2) on a port of its own.

A connection may be kept open: it holds the asker's mapping at its NAT while a second socket punches through it. Rules: each
connection asks within FIRST_S and again within IDLE_S; there are at most MAX_CONNECTIONS, MAX_PER_SOURCE of one source, and
where there is no room the one that has been silent longest makes way. A message is at most wire.stun.MAX_MESSAGE_BYTES; what
is no binding request ends its connection, as does a reader that does not take its answer within SEND_S. Not here: what is
answered, and how often (the function given).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.errors import ConfigError, RemoteProtocolError
from meshmax.core.subnets import source_of
from meshmax.net.door import listen_near
from meshmax.net.tcp import TcpTransport
from meshmax.net.wire import Listener, Transport
from meshmax.ports import ByteStream
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire.stun import FIRST_BYTES, HEADER_BYTES, message_length

MAX_CONNECTIONS: Final = 1024  # open at once; each is a socket and a few KiB
MAX_PER_SOURCE: Final = 32  # of these; several peers behind one NAT, each with several attempts
FIRST_S: Final = 5.0  # until the first question is there
IDLE_S: Final = (
    150.0  # until the next one; NATs forget idle TCP mappings after some minutes, so who cares asks more often
)
SEND_S: Final = 5.0  # for 100 bytes
RETRY_ACCEPT_S: Final = 0.1  # pause after accept failed, as when the process has no file descriptor left

Answer = Callable[[bytes, tuple[str, int]], bytes | None]
_log = get_logger("observer")


class Observer:
    """See the module. Made by `open_observer`."""

    def __init__(self, listeners: Sequence[Listener], answer: Answer, nursery: trio.Nursery) -> None:
        self._listeners, self._answer, self._nursery = listeners, answer, nursery
        self._open: dict[ByteStream, str] = {}  # to the source; silent longest first

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Bound (ip, port)s."""
        return tuple(listener.local for listener in self._listeners)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    async def accept(self, listener: Listener) -> NoReturn:
        """Accept until cancelled."""
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                _log.warning("cannot accept connections for the moment", error=str(error))
                await trio.sleep(RETRY_ACCEPT_S)
                continue
            source = source_of(stream.remote[0])
            self._make_room(source)
            self._open[stream] = source
            self._nursery.start_soon(self._attend, stream)

    def _make_room(self, source: str) -> None:
        of_source = [stream for stream, of in self._open.items() if of == source]
        if len(of_source) >= MAX_PER_SOURCE:
            of_source[0].close()  # its task forgets it
            del self._open[of_source[0]]
        elif len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            oldest.close()
            del self._open[oldest]

    async def _attend(self, stream: ByteStream) -> None:
        try:
            await isolate("observer", partial(self._converse, stream), remote=stream.remote[0])
        finally:
            self._open.pop(stream, None)
            stream.close()

    async def _converse(self, stream: ByteStream) -> None:
        patience_s = FIRST_S
        try:
            while True:
                with trio.move_on_after(patience_s) as waiting:
                    message = await receive_message(stream)
                if waiting.cancelled_caught or not message:
                    return
                reply = self._answer(message, stream.remote)
                if reply is None:
                    return
                if stream in self._open:
                    self._open[stream] = self._open.pop(stream)  # the last to be silent now
                with trio.move_on_after(SEND_S) as sending:
                    await stream.send_all(reply)
                if sending.cancelled_caught:
                    return
                patience_s = IDLE_S
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError):
            return  # strangers come and go; none of them is a failure of ours


async def receive_message(stream: ByteStream) -> bytes:
    """The next whole message, b"" at the end. Raises RemoteProtocolError where it cannot be STUN."""
    data = b""
    wanted = HEADER_BYTES
    while len(data) < wanted:
        part = await stream.receive_some(wanted - len(data))
        if not part:
            return b""
        data += part
        if data[0] not in FIRST_BYTES:
            raise RemoteProtocolError("this is no STUN message")
        if len(data) == HEADER_BYTES:
            wanted = message_length(data)
    return data


@asynccontextmanager
async def open_observer(
    listen: Sequence[tuple[str, int]], answer: Answer, *, transport: Transport | None = None
) -> AsyncIterator[Observer]:
    """An observer at each (host, port) of ``listen``, or at the next free port (base.config.PORT_TRIES).

    ``answer(message, remote)`` is what is sent back; None ends the connection. A host that this machine lacks is left out
    as long as another works. Raises ConfigError when nothing can be listened on.
    """
    transport = transport or TcpTransport()
    listeners: list[Listener] = []
    failed: list[ConfigError] = []
    try:
        for host, port in listen:
            try:
                listeners.append(await listen_near(transport, host, listeners[0].local[1] if listeners else port))
            except ConfigError as error:
                failed.append(error)
        if not listeners:
            raise failed[0] if failed else ConfigError("no address to observe connections at")
        async with trio.open_nursery() as nursery:
            observer = Observer(listeners, answer, nursery)
            for listener in listeners:
                nursery.start_soon(observer.accept, listener)
            try:
                yield observer
            finally:
                nursery.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.close()
