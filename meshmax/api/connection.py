"""One connection of the API: hypercorn's HTTP/1.1, bounded, with few writes, and with no task or turn for what need not wait.

Rules: a client that takes nothing for SEND_TIMEOUT_S is given up, and one without a request for IDLE_S; what leaves at once
after something else leaves with it, since each write is a call into the system, which costs more than what hypercorn does with
a short reply: the head of a short reply with its body, that of a stream with its first lines where they are there
(BODY_FOLLOWS), the last of a body with its end. A head that nothing follows yet leaves alone. What a client still sends after its
reply has LINGER_S to come. Not here: which connections there are (server).
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import h11
import trio
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import EndBody, Request, Response, StreamClosed
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from meshmax.api.bodies import BODY_IS_HERE
from meshmax.api.guard import DRAIN_S
from meshmax.api.heads import HeadBuffer, InvalidHead, needs_look, settled
from meshmax.api.lines import BODY_FOLLOWS
from meshmax.base.units import KIB

IDLE_S: Final = 60.0  # a connection without a request, or with one whose headers do not end
SEND_TIMEOUT_S: Final = 60.0  # a client that reads nothing for so long is gone
SHORT_BYTES: Final = 256 * KIB  # of a body; larger ones are of blobs, which come piece by piece
GRACE_S: Final = 1.0  # for requests under way when the node ends
# How long the rest of a request may go on arriving after its reply: to close before would break it off, and the reply with it.
LINGER_S: Final = DRAIN_S  # of which the guard reads it meanwhile

_ANSWERED: Final = (h11.DONE, h11.MUST_CLOSE)
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection"})  # what h11 must know of a head
_PLAIN: Final = re.compile(rb"(?:[a-z0-9-]+: [!-~\x80-\xff](?:[ -~\x80-\xff]*[!-~\x80-\xff])?\r\n)*")  # nobody's trick


class Connection(TCPServer):  # type: ignore[misc]  # hypercorn is read without its types
    """hypercorn's connection, which ends when its client has gone, not when the idle time is over as well."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.idle_task = IdleTimer(self.context.terminated, self._initiate_server_close)

    async def run(self) -> None:
        """Until either side has closed it."""
        try:
            socket = self.stream.socket
            client, here = (
                parse_socket_addr(socket.family, name()) for name in (socket.getpeername, socket.getsockname)
            )
            async with Tasks() as tasks:
                self._task_group = tasks
                state = ConnectionState(self.state)
                self.protocol = _Http(
                    self.app, self.config, self.context, tasks, state, False, client, here, self.protocol_send
                )
                await self.idle_task.restart(tasks, self._initiate_server_close)
                await self._read_data()
        except OSError:
            pass
        finally:
            with trio.CancelScope(deadline=trio.current_time() + GRACE_S, shield=True):
                await self._close()
            self.__dict__.clear()  # its parts know it, and many clients make a connection for each request

    async def _read_data(self) -> None:
        # A client that only shuts its writing side down sends what one sends that has gone, and nothing tells them apart before
        # we write. It is taken to have gone, as Go's and hypercorn's servers take it: its prompt frees its slot at once, where
        # otherwise an engine would work on for nobody. What answers without waiting reaches it all the same.
        data = b"-"
        while data:
            try:
                data = bytes(await self.stream.receive_some(MAX_RECV))
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())
        self.idle_task.end()

    async def protocol_send(self, event: Any) -> None:
        """See hypercorn's."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        data = event.data
        try:
            if not self.send_lock.locked():
                data = data[self.stream.send_some(data) :]
            if data:  # a slow client
                await self._send_rest(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())

    async def _send_rest(self, data: bytes) -> None:
        try:
            self.send_lock.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope(shield=True):  # SEND_TIMEOUT_S at most
                await self.send_lock.acquire()
        try:
            await self.stream.send_all(data)
        finally:
            self.send_lock.release()

    async def _close(self) -> None:
        # The end of a reply tells its own task that the client is gone, which may cancel it before. Nothing here blocks.
        with trio.CancelScope(shield=True):
            await super()._close()


class _Http(H11Protocol):  # type: ignore[misc]
    """hypercorn's HTTP/1.1 of one connection, which writes what belongs together at once."""

    _held = b""  # leaves with what follows

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connection._receive_buffer = HeadBuffer()

    async def _check_protocol(self, _request: Any) -> None:
        """Stay with HTTP/1: HTTP/2 would get around the bounds, a hundred requests a connection, and windows that never open."""

    async def _create_stream(self, request: Any) -> None:
        headers = [(name.lower(), value) for name, value in request.headers.raw_items()]
        names, target = {name for name, _ in headers}, request.target
        version, method = request.http_version.decode(), request.method.decode().upper()
        if needs_look(target, names):
            try:
                target, headers = settled(target, headers, version)
            except InvalidHead:
                await self._send_error_response(400)
                await self.send(Closed())
                return
        if b"upgrade" in names:
            await super()._create_stream(request)
            return
        self.stream = _Stream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(Request(STREAM_ID, headers, version, method, target, self.connection_state))
        self.keep_alive_requests += 1

    async def stream_send(self, event: Any) -> None:
        if not isinstance(event, Response) or event.status_code < 200:
            await super().stream_send(event)
            return
        headers = [*event.headers, *self.config.response_headers("h11")]
        if self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        lines = b"".join([b"%b: %b\r\n" % header for header in headers if header[0] not in _FRAMING])
        if _PLAIN.fullmatch(lines):  # h11 would look at each header four times
            headers = [header for header in headers if header[0] in _FRAMING]
        else:
            lines = b""
        await self._send_h11_event(h11.Response(headers=headers, status_code=event.status_code), lines)

    async def _maybe_recycle(self) -> None:
        is_early = self.connection.their_state is h11.SEND_BODY and self.connection.our_state in _ANSWERED
        if is_early and isinstance(self.stream, _Stream) and not self.context.terminated.is_set():
            with trio.move_on_after(LINGER_S):
                await self.stream.wait_asked()
        await super()._maybe_recycle()

    async def _send_h11_event(self, event: Any, lines: bytes = b"") -> None:
        # Not later: h11 would hold what was never sent for sent, and a reply that says why could not follow any more.
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return
        if lines:
            data = data.removesuffix(b"\r\n") + lines + b"\r\n"
        self._held += data
        if self._held and not self._is_followed(event):
            held, self._held = self._held, b""
            await self.send(RawData(data=held))

    def _is_followed(self, event: Any) -> bool:
        """Whether more of the same reply follows at once."""
        if isinstance(event, h11.Response) and _is_short(event):
            return True
        followed = isinstance(self.stream, _Stream) and self.stream.is_followed
        return followed and isinstance(event, h11.Response | h11.Data)


class _Stream(HTTPStream):  # type: ignore[misc]
    """hypercorn's request and reply, which knows what of the reply is followed by more of it at once."""

    is_followed = False
    _asked: trio.Event | None = None  # while it is waited for

    async def handle(self, event: Any) -> None:
        """See hypercorn's."""
        if self._asked is not None and isinstance(event, EndBody | StreamClosed):
            self._asked.set()
        await super().handle(event)

    async def wait_asked(self) -> None:
        """Until the whole request is here, or its client has gone."""
        self._asked = trio.Event()
        await self._asked.wait()

    async def app_send(self, message: Any) -> None:
        """See hypercorn's."""
        if message is not None:
            start = message["type"] == "http.response.start"
            self.is_followed = message.get(BODY_FOLLOWS, False) if start else not message.get("more_body", False)
        await super().app_send(message)


def _is_short(response: h11.Response) -> bool:
    """Whether its body is made whole before it is sent. A blob of megabytes may be on its way from far: its head goes first."""
    return any(name == b"content-length" and int(value) <= SHORT_BYTES for name, value in response.headers)


class IdleTimer:
    """Closes a connection that is idle for IDLE_S, or when the API ends: one task for all its requests.

    In place of hypercorn's, which starts a task and ends it with each of them.
    """

    def __init__(self, terminated: Any, close: Callable[[], Awaitable[None]]) -> None:
        self._terminated, self._close = terminated, close
        self._due_s = math.inf  # while a request is under way
        self._scope: trio.CancelScope | None = None
        self._ended = False

    async def restart(self, tasks: TaskGroup, _action: object) -> None:
        """The connection is idle from now on."""
        self._due_s = trio.current_time() + IDLE_S
        if self._scope is None and not self._ended:
            self._scope = trio.CancelScope(deadline=self._due_s)
            tasks.spawn(self._run)
        elif self._scope is not None and self._scope.deadline > self._due_s:  # an earlier one is moved when it comes
            self._scope.deadline = self._due_s

    async def stop(self) -> None:
        """A request came."""
        self._due_s = math.inf

    def end(self) -> None:
        """The client has gone."""
        self._due_s, self._ended = math.inf, True
        if self._scope is not None:
            self._scope.cancel()

    async def _run(self) -> None:
        while not (self._ended or self._terminated.is_set()):
            with trio.CancelScope(deadline=self._due_s) as self._scope:
                await self._terminated.wait()
            if trio.current_time() >= self._due_s:
                break
        if not self._ended and self._due_s < math.inf:  # one with a request under way closes after its reply
            with trio.CancelScope(shield=True):
                await self._close()


class Tasks(TaskGroup):  # type: ignore[misc]
    """hypercorn's task group, whose requests and connections hand each other what is there without taking turns."""

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        """See hypercorn's."""
        inbox = _Inbox(config.max_app_queue_size)
        scope[BODY_IS_HERE] = inbox.has_end

        async def run() -> None:
            try:
                await _handle(app, config, scope, inbox.get, send, trio.to_thread.run_sync, trio.from_thread.run)
            finally:
                inbox.close()

        self.spawn(run)
        return inbox.put


class _Inbox:
    """What a client sends on its way to the application: at most so many pieces of a body, and always that it has gone.

    Where an application leaves a body unread, neither the end of its reply nor the connection waits for room, as they would for
    that of a channel, which hypercorn has here.
    """

    def __init__(self, pieces: int) -> None:
        self._pieces = pieces
        self._waiting: deque[Any] = deque()
        self._readers, self._writers = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._closed = False

    async def put(self, message: Any) -> None:
        """Hand ``message`` over; waits while as many as there may be wait already. Dropped once it is closed."""
        gone = message["type"] == "http.disconnect"
        while len(self._waiting) >= self._pieces and not (gone or self._closed):
            await self._writers.park()
        if not self._closed:
            self._waiting.append(message)
            self._readers.unpark()

    async def get(self) -> Any:
        """The next message."""
        while not self._waiting:
            await self._readers.park()
        self._writers.unpark()
        return self._waiting.popleft()

    def has_end(self) -> bool:
        """Whether all that is still to come is here."""
        return bool(self._waiting) and not self._waiting[-1].get("more_body", False)

    def close(self) -> None:
        """Nobody reads any more."""
        self._closed = True
        self._waiting.clear()
        self._writers.unpark_all()


class PatientStream:
    """A client's stream as hypercorn uses it, which gives a client up that does not read."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket

    async def send_all(self, data: bytes) -> None:
        """Shielded, since half a chunk would spoil what follows it. Raises BrokenResourceError after SEND_TIMEOUT_S.

        For one task at a time.
        """
        with trio.CancelScope(deadline=trio.current_time() + SEND_TIMEOUT_S, shield=True) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")

    def send_some(self, data: bytes) -> int:
        """Send what the client has room for now, and tell how much: mostly all of it, which takes no deadline and no turn of
        the loop. Not while `send_all` is under way. Raises BrokenResourceError.
        """
        if os.name != "posix":  # sockets are no files there
            return 0
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from None

    async def receive_some(self, max_bytes: int) -> bytes:
        """As trio's."""
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """As trio's."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As trio's."""
        await self._stream.aclose()
