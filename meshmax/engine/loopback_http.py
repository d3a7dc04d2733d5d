"""A small HTTP/1.1 client for an engine on loopback: h11 over a trio stream, one connection a request.

Rules: leaving a response closes its connection, whatever is still to come, so that the engine sees at once that nobody
listens; connections are never reused, since a server may close an idle one just when the next request is on its way.
(General clients stack async generators, and leave them to the garbage collector when a stream is left early.) No TLS, no
redirects, no proxies, no deadlines: those are the caller's. What breaks is an EngineCrashed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import h11
import msgspec
import trio

from meshmax.base.errors import EngineCrashed
from meshmax.base.foreign import words_of

READ_BYTES: Final = 65536
MAX_BODY_BYTES: Final = 64 << 20  # vectors of one call, the largest answer that is not streamed, are far smaller
MAX_LINE_BYTES: Final = 8 << 20  # of a stream; a token is some hundred bytes

_END: Final = h11.EndOfMessage()
_BROKEN: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class RequestHeads:
    """The heads of requests to one server, which differ by their kind and their length alone: h11 checks and writes each once."""

    def __init__(self, headers: Sequence[tuple[str, str]]) -> None:
        self._headers = headers
        self._known: dict[tuple[str, str, bool], tuple[h11.Request, bytes]] = {}  # as many as we know paths

    def begin(self, method: str, target: str, content: bytes, *, close: bool) -> tuple[h11.Connection, bytes]:
        """What reads the response, and all that is to be sent for it. ``close``: it is the last one of its connection."""
        kind = method, target, close
        if kind not in self._known:
            request = h11.Request(
                method=method, target=target, headers=[*self._headers, *([("Connection", "close")] if close else [])]
            )
            written = h11.Connection(h11.CLIENT).send(request) or b""
            self._known[kind] = request, written.removesuffix(b"\r\n")
        request, head = self._known[kind]
        connection = h11.Connection(h11.CLIENT)
        connection.send(request)
        connection.send(_END)  # of what it is told: the length and the body are ours to write
        return connection, b"%bContent-Length: %d\r\n\r\n%b" % (head, len(content), content)


class Response:
    """The status, and the body as it comes."""

    def __init__(self, stream: trio.abc.Stream, connection: h11.Connection) -> None:
        self._stream = stream
        self._connection = connection
        self.status = 0
        self.heard = False  # anything came
        self._headers: Iterable[tuple[bytes, bytes]] = ()

    @property
    def headers(self) -> dict[str, str]:
        """With names in lower case; of several with one name the last."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self._headers}

    async def receive(self) -> bytes | None:
        """More of the body; None at its end. Raises EngineCrashed when it breaks off."""
        event = await self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        return None

    async def read(self) -> bytes:
        """The whole body. Raises EngineCrashed when it breaks off or is larger than MAX_BODY_BYTES."""
        body = bytearray()
        while (data := await self.receive()) is not None:
            body += data
            if len(body) > MAX_BODY_BYTES:
                raise EngineCrashed("the engine's answer is too large")
        return bytes(body)

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The body's lines, without their ends and the empty ones; close it (`aclosing`). Raises EngineCrashed as `receive`."""
        pending = b""
        while (data := await self.receive()) is not None:
            *whole, pending = (pending + data).split(b"\n")
            for line in whole:
                if kept := line.removesuffix(b"\r"):
                    yield kept
            if len(pending) > MAX_LINE_BYTES:
                raise EngineCrashed("a line of the engine's answer is too long")
        if pending:
            yield pending

    async def start(self) -> None:
        """Wait for the status. Raises EngineCrashed."""
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise EngineCrashed("the engine broke off before its answer")
        self.status = event.status_code
        self._headers = event.headers

    def is_over(self) -> bool:
        """Whether the whole answer is here, and the server can be asked again over the same connection."""
        connection = self._connection
        try:
            if connection.their_state is h11.SEND_BODY and not isinstance(connection.next_event(), h11.EndOfMessage):
                return False
        except h11.RemoteProtocolError:
            return False
        return (
            connection.their_state is h11.DONE and connection.our_state is h11.DONE and not connection.trailing_data[0]
        )

    async def _next(self) -> Any:
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                data = await self._receive()
                self.heard = self.heard or bool(data)
                self._connection.receive_data(data)
        except h11.RemoteProtocolError:  # whose words quote what came, which may be our key
            raise EngineCrashed("the engine broke off: its answer is not whole, or no HTTP") from None
        except _BROKEN as error:
            raise EngineCrashed(f"the engine broke off: {words_of(error)}") from None
        return event

    async def _receive(self) -> bytes:
        return bytes(await self._stream.receive_some(READ_BYTES))


class LoopbackHttp:
    """Requests to one server, with a bearer key."""

    def __init__(self, address: str, key: str) -> None:
        parts = urlsplit(address)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        host, bearer = f"{self._host}:{self._port}", f"Bearer {key}"
        self._heads = RequestHeads([("Host", host), ("Authorization", bearer), ("Content-Type", "application/json")])

    @asynccontextmanager
    async def open_response(self, method: str, path: str, body: object = None) -> AsyncIterator[Response]:
        """Send a request (``body`` as JSON) and wait for the status; leaving closes the connection. Raises EngineCrashed."""
        content = b"" if body is None else msgspec.json.encode(body)
        connection, data = self._heads.begin(method, path, content, close=True)
        stream = await self._connect()
        try:
            await self._send(stream, data)
            response = Response(stream, connection)
            await response.start()
            yield response
        finally:
            stream.socket.close()  # at once and without a checkpoint

    async def _connect(self) -> trio.SocketStream:
        try:
            return await trio.open_tcp_stream(self._host, self._port)
        except OSError as error:
            raise EngineCrashed(f"the engine cannot be reached: {error}") from None

    async def _send(self, stream: trio.SocketStream, data: bytes) -> None:
        try:
            await stream.send_all(data)
        except _BROKEN as error:
            raise EngineCrashed(f"the engine broke off: {words_of(error)}") from None
