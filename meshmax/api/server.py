"""The API on a socket: bound before anybody is told of it, served by hypercorn's HTTP protocol, ended in order.

Rules: an address that was asked for and is taken is an error, the default moves on to the next free port; a connection
that takes nothing for SEND_TIMEOUT_S is dropped, as is one above MAX_CONNECTIONS; when cancelled, nothing new is accepted,
requests under way get GRACE_S, then connections are closed by force, so that the whole ends within two seconds.
hypercorn's connection is used (connection) and its server is not, because the latter neither bounds connections nor slow readers
(its writes are shielded from cancellation) and handles signals itself.
"""

from __future__ import annotations

import ipaddress
import socket as stdlib_socket
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import psutil
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from meshmax.api.app import make_app
from meshmax.api.connection import GRACE_S, IDLE_S, Connection, PatientStream
from meshmax.api.node_view import ApiNode
from meshmax.base.config import DEFAULT_API_PORT, PORT_TRIES, Config, parse_host_port
from meshmax.base.errors import ConfigError
from meshmax.base.units import KIB
from meshmax.telemetry.isolate import isolate

DEFAULT_HOST: Final = "127.0.0.1"
BACKLOG: Final = 128
MAX_CONNECTIONS: Final = 1024  # at once; a browser opens six, a busy client pool a hundred
HEADER_BYTES: Final = 32 * KIB  # request line and headers


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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.keep_time)
            await _serve(app, trio.SocketListener(listening))
            nursery.cancel_scope.cancel()


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
        self._end_answers = app.end_answers
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
        client = PatientStream(stream)
        await Connection(self._app, self._config, self._context, ConnectionState({}), client).run()


def hypercorn_config() -> Any:
    """Limits of hypercorn's protocol; it logs nothing of its own."""
    config = HypercornConfig()
    config.h11_max_incomplete_size = HEADER_BYTES
    config.keep_alive_timeout = IDLE_S
    config.include_server_header = False
    config.errorlog = None
    config.accesslog = None
    return config
