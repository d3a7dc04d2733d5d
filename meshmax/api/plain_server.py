"""A very small HTTP server on loopback: a few texts by path, GET and HEAD, one request a connection.

For programs that have no API but want to be watched (a bootstrap node): it needs none of the API's libraries. Rules: loopback
only, and only requests that name this machine as their host, so that no web page can read it; at most MAX_CONNECTIONS, each for
TIMEOUT_S and REQUEST_BYTES. Not here: the API of a peer (server).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

import trio

from meshmax.base.config import PORT_TRIES, parse_host_port
from meshmax.base.errors import ConfigError
from meshmax.telemetry.isolate import isolate

MAX_CONNECTIONS: Final = 16  # a monitor or two, and a person
TIMEOUT_S: Final = 5.0  # for one request and its answer
REQUEST_BYTES: Final = 8192  # request line and headers

_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]", ""})  # "": HTTP/1.0 without a Host
_TEXT: Final = "text/plain; charset=utf-8"

Page = Callable[[], tuple[str, bytes]]  # content type and body


class Started(Protocol):
    """trio's task status, as far as it is used here."""

    def started(self, value: str, /) -> None:
        """Tell whoever waits at which URL it listens."""
        ...


async def serve_pages(
    pages: Mapping[str, Page], address: str, default_port: int, *, task_status: Started = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve ``pages`` by path at ``address`` (HOST:PORT, '' for 127.0.0.1 and the first free port from ``default_port`` on).

    Started with the URL; runs until cancelled. Raises ConfigError: the address is taken, or not on loopback.
    """
    listener = await _listen(address, default_port)
    host, port = listener.socket.getsockname()[:2]
    task_status.started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
    await trio.serve_listeners(partial(_attend, pages, limiter), [listener])


async def _listen(address: str, default_port: int) -> trio.SocketListener:
    host, port = parse_host_port(address) if address else ("127.0.0.1", default_port)
    if not _is_loopback(host):
        raise ConfigError(f"{address} is not on loopback: only this machine may read the figures; write 127.0.0.1:PORT")
    last: OSError | None = None
    for candidate in (port,) if address else range(port, port + PORT_TRIES):
        try:
            return (await trio.open_tcp_listeners(candidate, host=host, backlog=MAX_CONNECTIONS))[0]
        except OSError as error:
            last = error
    raise ConfigError(f"cannot serve HTTP on {host}:{port}: {last}; choose another address with --api HOST:PORT")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _attend(pages: Mapping[str, Page], limiter: trio.CapacityLimiter, stream: trio.SocketStream) -> None:
    async with stream:
        with trio.move_on_after(TIMEOUT_S):
            async with limiter:
                await isolate("plain http", partial(_answer, pages, stream))


async def _answer(pages: Mapping[str, Page], stream: trio.SocketStream) -> None:
    try:
        request = b""
        while b"\r\n\r\n" not in request:
            part = await stream.receive_some(REQUEST_BYTES + 1 - len(request))
            request += part
            if not part or len(request) > REQUEST_BYTES:
                return
        await stream.send_all(reply_to(request, pages))
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # the reader has gone


def reply_to(request: bytes, pages: Mapping[str, Page]) -> bytes:
    """The whole answer to a request's head."""
    lines = request.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    host = next((line[5:].strip() for line in lines[1:] if line[:5].lower() == "host:"), "")
    if _host_name(host) not in _LOCAL_NAMES:
        return _reply("403 Forbidden", _TEXT, b"only this machine may read this\n", method)
    if method not in ("GET", "HEAD"):
        return _reply("405 Method Not Allowed", _TEXT, b"GET and HEAD only\n", method)
    if path not in pages:
        return _reply("404 Not Found", _TEXT, f"here are: {' '.join(sorted(pages))}\n".encode(), method)
    return _reply("200 OK", *pages[path](), method)


def _host_name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _reply(status: str, kind: str, body: bytes, method: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
