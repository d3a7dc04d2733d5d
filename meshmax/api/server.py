"""The API on a socket: bound before anybody is told of it, served by hypercorn's HTTP protocol, ended in order.

Rules: an address that was asked for and is taken is an error, the default moves on to the next free port; a connection
that takes nothing for SEND_TIMEOUT_S is dropped, as is one above MAX_CONNECTIONS; when cancelled, nothing new is accepted,
requests under way get GRACE_S, then connections are closed by force, so that the whole ends within two seconds.
hypercorn's connection is used and its server is not, because the latter neither bounds connections nor slow readers (its
writes are shielded from cancellation) and handles signals itself.
"""

from __future__ import annotations

import ipaddress
import math
import socket as stdlib_socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol

import h11
import msgspec
import psutil
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from meshmax.api.app import make_app
from meshmax.api.node_view import ApiNode
from meshmax.base.config import DEFAULT_API_PORT, PORT_TRIES, Config, parse_host_port
from meshmax.base.errors import ConfigError
from meshmax.base.units import KIB
from meshmax.telemetry.isolate import isolate

DEFAULT_HOST: Final = "127.0.0.1"
BACKLOG: Final = 128
MAX_CONNECTIONS: Final = 1024  # at once; a browser opens six, a busy client pool a hundred
HEADER_BYTES: Final = 32 * KIB  # request line and headers
IDLE_S: Final = 60.0  # a connection without a request, or with one whose headers do not end
SEND_TIMEOUT_S: Final = 60.0  # a client that reads nothing for so long is gone
SHORT_BYTES: Final = 256 * KIB  # of a body; larger ones are of blobs, which come piece by piece
GRACE_S: Final = 1.0  # for requests under way when the node ends


class Bound(msgspec.Struct, frozen=True):
    """Where the API listens. ``url`` is what a client on this machine uses."""

    host: str
    port: int
    url: str
    loopback: bool

    def __str__(self) -> str:
        """The URL, as people are told it."""
        return self.url


class Started(Protocol):
    """trio's task status, as far as it is used here."""

    def started(self, value: Bound, /) -> None:
        """Tell whoever waits that the API listens."""
        ...


async def serve_api(node: ApiNode, *, task_status: Started = trio.TASK_STATUS_IGNORED) -> None:
    """Serve ``node``'s API until cancelled, then end within GRACE_S and a little. Started with the address.

    Raises ConfigError: the address is taken or not ours, or it is not on loopback and there is no token.
    """
    listening = await bind_api(node.config)
    with listening:
        bound = bound_address(listening)
        if not bound.loopback and not (node.config.token or node.token):
            raise ConfigError(
                f"the API would listen on {bound.host}, beyond this machine, without a token: "
                "set one (MESHMAX_TOKEN, or token in meshmax.yaml), or use --api 127.0.0.1:PORT"
            )
        app = make_app(node, loopback=bound.loopback, local_addresses=_local_addresses())
        task_status.started(bound)
        await _serve(app, trio.SocketListener(listening))


def _local_addresses() -> tuple[str, ...]:
    found = psutil.net_if_addrs().values()
    return tuple(each.address.partition("%")[0] for interface in found for each in interface)


async def bind_api(config: Config) -> trio.socket.SocketType:
    """A bound TCP socket for ``config.api``, or for the first free port from the default on. Raises ConfigError."""
    if config.api:
        host, port = parse_host_port(config.api)
        return await _bind(host, port)
    for port in range(DEFAULT_API_PORT, DEFAULT_API_PORT + PORT_TRIES):
        try:
            return await _bind(DEFAULT_HOST, port)
        except ConfigError:
            continue
    last = DEFAULT_API_PORT + PORT_TRIES - 1
    raise ConfigError(f"no port from {DEFAULT_API_PORT} to {last} is free for the API: choose one with --api HOST:PORT")


async def _bind(host: str, port: int) -> trio.socket.SocketType:
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = await trio.socket.getaddrinfo(
            host, port, type=stdlib_socket.SOCK_STREAM, flags=stdlib_socket.AI_PASSIVE
        )
        family, kind, proto, _, address = found[0]
        made = trio.socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"the API cannot listen on {shown}: {error}") from error
    try:
        made.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
        await made.bind(address)
        # Two sockets may bind one address with SO_REUSEADDR; only listening tells that another program has it.
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"the API cannot listen on {shown}: {error.strerror or error}. "
            "Choose another address with --api HOST:PORT, or leave --api out to use the next free port"
        ) from error
    return made


def bound_address(listening: trio.socket.SocketType) -> Bound:
    """Where ``listening`` can be reached from this machine."""
    host, port = listening.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    reach = host
    if address.is_unspecified:
        reach = "127.0.0.1" if address.version == 4 else "::1"
    url = f"http://[{reach}]:{port}" if ":" in reach else f"http://{reach}:{port}"
    return Bound(host, port, url, address.is_loopback)


async def _serve(app: Any, listener: trio.SocketListener) -> None:
    server = _Server(app)
    async with trio.open_nursery() as outer:
        ending = trio.Event()
        outer.start_soon(_tell_when_cancelled, ending)
        with trio.CancelScope(shield=True):  # the end is ours to order; it takes GRACE_S at most
            await server.run(listener, ending)


async def _tell_when_cancelled(ending: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        ending.set()


class _Server:
    """Accepts connections and runs hypercorn's protocol on each."""

    def __init__(self, app: Any) -> None:
        self._app = ASGIWrapper(app)
        self._end_answers = app.state.end_answers
        self._config = hypercorn_config()
        self._context = WorkerContext(None)
        self._open: set[trio.SocketStream] = set()
        self._none_open = trio.Event()  # of use once nothing is accepted any more

    async def run(self, listener: trio.SocketListener, ending: trio.Event) -> None:
        """Serve until ``ending``, then let connections end, then close them."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                serve = partial(trio.serve_listeners, self._connection, [listener], handler_nursery=connections)
                accepting.start_soon(serve)
                await ending.wait()
                accepting.cancel_scope.cancel()
            await self._context.terminated.set()  # idle connections close at once, busy ones after their reply
            connections.cancel_scope.deadline = trio.current_time() + GRACE_S
            connections.start_soon(self._close_all_at_the_end, connections.cancel_scope)

    async def _close_all_at_the_end(self, scope: trio.CancelScope) -> None:
        try:
            if self._open:
                with trio.move_on_after(GRACE_S / 2):
                    await self._none_open.wait()
                self._end_answers()  # with an error that says so, in the time that is left
                await self._none_open.wait()
            scope.cancel()
        finally:
            for stream in self._open:
                stream.socket.close()  # wakes writers that hypercorn shields from cancellation

    async def _connection(self, stream: trio.SocketStream) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            await stream.aclose()
            return
        self._open.add(stream)
        try:
            await isolate("http connection", lambda: self._protocol(stream))
        finally:
            self._open.discard(stream)
            if not self._open and self._context.terminated.is_set():
                self._none_open.set()

    async def _protocol(self, stream: trio.SocketStream) -> None:
        client = _PatientStream(stream)
        await _Connection(self._app, self._config, self._context, ConnectionState({}), client).run()


class _Connection(TCPServer):  # type: ignore[misc]  # hypercorn is read without its types
    """hypercorn's connection, which ends when its client has gone, not when the idle time is over as well.

    The head of a short reply leaves with the body, and what has no bytes is not written: each write is a
    call into the system, which costs more than what hypercorn does with a short reply. Nor does it start a task and
    take turns of the event loop where nothing has to be waited for.
    """

    _head = b""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.idle_task = _IdleTimer(self.context.terminated, self._initiate_server_close)

    async def run(self) -> None:
        """Until either side has closed it."""
        try:
            socket = self.stream.socket
            client, here = (
                parse_socket_addr(socket.family, name()) for name in (socket.getpeername, socket.getsockname)
            )
            async with _Tasks() as tasks:
                self._task_group = tasks
                state = ConnectionState(self.state)
                self.protocol = ProtocolWrapper(
                    self.app, self.config, self.context, tasks, state, False, client, here, self.protocol_send
                )
                await self.idle_task.restart(tasks, self._initiate_server_close)
                await self._read_data()
        except OSError:
            pass
        finally:
            with trio.CancelScope(deadline=trio.current_time() + GRACE_S, shield=True):
                await self._close()

    async def _read_data(self) -> None:
        http = self.protocol.protocol
        # HTTP/2 would get around the bounds above: a hundred requests a connection, and windows that never open.
        http._check_protocol = _stay_with_http1
        http._send_h11_event = partial(self._send_http, http)
        await super()._read_data()
        self.idle_task.end()

    async def _send_http(self, http: Any, event: Any) -> None:
        # Not later: h11 would hold what was never sent for sent, and a reply that says why could not follow any more.
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            data = http.connection.send(event)
        except h11.LocalProtocolError:
            if http.connection.their_state != h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response) and _is_short(event):
            self._head = data
        elif data or self._head:
            head, self._head = self._head, b""
            await self.protocol_send(RawData(data=head + data))

    async def protocol_send(self, event: Any) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        try:
            self.send_lock.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope(shield=True):  # SEND_TIMEOUT_S at most
                await self.send_lock.acquire()
        try:
            await self.stream.send_all(event.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())
        finally:
            self.send_lock.release()

    async def _close(self) -> None:
        # The end of a reply tells its own task that the client is gone, which may cancel it before. Nothing here blocks.
        with trio.CancelScope(shield=True):
            await super()._close()


class _IdleTimer:
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
        if self._scope is not None:
            self._scope.deadline = self._due_s
        elif not self._ended:
            self._scope = trio.CancelScope(deadline=self._due_s)
            tasks.spawn(self._run)

    async def stop(self) -> None:
        """A request came."""
        self._due_s = math.inf
        if self._scope is not None:
            self._scope.deadline = math.inf

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


class _Tasks(TaskGroup):  # type: ignore[misc]
    """hypercorn's task group, whose requests and connections hand each other what is there without taking turns."""

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        """See hypercorn's."""
        put, get = trio.open_memory_channel[Any](config.max_app_queue_size)

        async def receive() -> Any:
            try:
                return get.receive_nowait()
            except trio.WouldBlock:
                return await get.receive()

        async def hand_over(message: Any) -> None:
            try:
                put.send_nowait(message)
            except trio.WouldBlock:
                await put.send(message)

        self.spawn(_handle, app, config, scope, receive, send, trio.to_thread.run_sync, trio.from_thread.run)
        return hand_over


def _is_short(response: h11.Response) -> bool:
    """Whether its body is made whole before it is sent. A blob of megabytes may be on its way from far: its head goes first."""
    return any(name == b"content-length" and int(value) <= SHORT_BYTES for name, value in response.headers)


async def _stay_with_http1(_request: Any) -> None:
    pass


class _PatientStream:
    """A client's stream as hypercorn uses it, which gives a client up that does not read."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket

    async def send_all(self, data: bytes) -> None:
        # Shielded, since half a chunk would spoil what follows it.
        with trio.CancelScope(deadline=trio.current_time() + SEND_TIMEOUT_S, shield=True) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def hypercorn_config() -> Any:
    """Limits of hypercorn's protocol; it logs nothing of its own."""
    config = HypercornConfig()
    config.h11_max_incomplete_size = HEADER_BYTES
    config.keep_alive_timeout = IDLE_S
    config.include_server_header = False
    config.errorlog = None
    config.accesslog = None
    return config
