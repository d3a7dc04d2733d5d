"""An ASGI application on connections in memory, and servers that misbehave: what clients of HTTP servers are tried against.

`AsgiFront` plays a server in front of an application: HTTP/1.1, one request a connection, and a client that hangs up cancels
the application, as hypercorn does. It leaves the mark of meshmax peers out, so that a peer's own application can stand for
an Ollama or another server. `Scripted` is a server whose every byte the test writes. Satisfies engine.server_http.Connect.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import h11
import trio
import trio.testing

from meshmax.base.loop_guard import FROM_MESHMAX

READ_BYTES: Final = 65536


class AsgiFront:
    """Serves ``app`` in ``nursery``. ``requests``: (method, path, headers) of each; ``down``: nobody takes a connection."""

    def __init__(self, app: Any, nursery: trio.Nursery, hide_mark: bool = True) -> None:
        self._app, self._nursery, self._hide_mark = app, nursery, hide_mark
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.down = False
        self.open = 0
        self._scopes: set[trio.CancelScope] = set()

    def cut(self) -> None:
        """Break every connection off, in the middle of whatever it is at."""
        for scope in self._scopes:
            scope.cancel()

    async def connect(self, _host: str, _port: int) -> trio.abc.Stream:
        """A connection. Raises OSError while it is down."""
        await trio.lowlevel.checkpoint()
        if self.down:
            raise ConnectionRefusedError("connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: trio.abc.Stream) -> None:
        self.open += 1
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                await _Exchange(self, stream).run()
        except trio.BrokenResourceError:
            pass  # the client has hung up
        finally:
            self._scopes.discard(scope)
            self.open -= 1
            await trio.aclose_forcefully(stream)

    async def call(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Run the application on one request."""
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["method"], scope["path"], headers))
        if self._hide_mark:
            scope["headers"] = [each for each in scope["headers"] if each[0] != FROM_MESHMAX.encode()]
        await self._app(scope, receive, send)


class _Exchange:
    def __init__(self, front: AsgiFront, stream: trio.abc.Stream) -> None:
        self._front, self._stream = front, stream
        self._connection = h11.Connection(h11.SERVER)
        self._body = b""
        self._taken = False
        self._gone = trio.Event()

    async def run(self) -> None:
        request, body = await self._next(), bytearray()
        if not isinstance(request, h11.Request):
            return
        while isinstance(event := await self._next(), h11.Data):
            body += event.data
        self._body = bytes(body)
        path, _, query = request.target.decode().partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method.decode(),
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            await self._front.call(scope, self._receive, self._send)
            nursery.cancel_scope.cancel()

    async def _next(self) -> Any:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._stream.receive_some(READ_BYTES))
        return event

    async def _watch(self, scope: trio.CancelScope) -> None:
        while await self._stream.receive_some(READ_BYTES):
            pass
        self._gone.set()
        scope.cancel()

    async def _receive(self) -> dict[str, Any]:
        if not self._taken:
            self._taken = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name != b"connection"]
            event: Any = h11.Response(status_code=message["status"], headers=[*headers, (b"connection", b"close")])
            await self._out(self._connection.send(event) or b"")
            return
        data = message.get("body", b"")
        out = self._connection.send(h11.Data(data=data)) if data else b""
        if not message.get("more_body"):
            out = (out or b"") + (self._connection.send(h11.EndOfMessage()) or b"")
        if out:
            await self._out(out)

    async def _out(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            self._gone.set()  # an application hears of it by `receive` alone


Script = Callable[[bytes, trio.abc.Stream], Awaitable[None]]


class Scripted:
    """Answers each connection by ``script(request, stream)``; the stream closes when it returns."""

    def __init__(self, script: Script, nursery: trio.Nursery) -> None:
        self._script, self._nursery = script, nursery
        self.requests: list[bytes] = []
        self.left = 0

    async def connect(self, _host: str, _port: int) -> trio.abc.Stream:
        """A connection."""
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: trio.abc.Stream) -> None:
        request = b""
        connection = h11.Connection(h11.SERVER)
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    data = await stream.receive_some(READ_BYTES)
                    request += data
                    connection.receive_data(data)
            self.requests.append(request)
            await self._script(request, stream)
        except trio.BrokenResourceError:
            self.left += 1
        finally:
            await trio.aclose_forcefully(stream)


def answer(status: int, body: bytes, *headers: str) -> bytes:
    """A whole answer."""
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
