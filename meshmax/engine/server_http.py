"""A small HTTP/1.1 client for servers that run models and are not our own children: plain or TLS.

Rules: leaving a response before its end closes its connection at once, so that the server sees that nobody listens and stops
its work. After the end of a prompt's answer the connection is kept for the next prompt (idle_connections); where the server
had closed it meanwhile, the request is sent once more over a fresh one: nothing of a reply had come, it was lost at once, and a
prompt may be asked twice.
TLS trusts the system's certificates. Redirects are not followed: the key goes to the host that was configured and to no
other. Every request says that a meshmax peer makes it (FROM_MESHMAX), so that a peer, were one the server, can refuse it
and no prompt goes in circles. A server that takes no connection, answers no headers or falls silent in an answer is given up
after the times below. The key stands in one header; errors never quote it, whatever the server says. Not here: words.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Final

import h11
import msgspec
import trio

from meshmax import __version__
from meshmax.base.config import parse_server_url
from meshmax.base.errors import Busy, EngineCrashed, EngineUnavailable
from meshmax.base.foreign import words_of
from meshmax.base.inference import Event
from meshmax.base.loop_guard import FROM_MESHMAX
from meshmax.engine.idle_connections import IdleConnections, Line
from meshmax.engine.loopback_http import RequestHeads, Response
from meshmax.engine.server_words import error_of, named

CONNECT_S: Final = 5.0  # TCP and TLS; a server that lives takes a fraction of a second
CALL_S: Final = 10.0  # for the whole of a call that computes nothing
SILENCE_S: Final = 600.0  # in an answer: as long as the longest load, or the longest prompt on a slow machine, may take
LOST_AT_ONCE_S: Final = 1.0  # a server that had closed a kept connection says so at once; later it has begun to work
END_S: Final = 0.01  # after an answer's last word; servers end their message with it or directly after
MAX_CALL_BYTES: Final = 8 << 20  # of an answer to a call: lists of thousands of models, vectors of sixteen texts

_BROKEN: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
Read = Callable[[AsyncIterator[bytes]], AsyncGenerator[Event, None]]
Begin = Callable[[], tuple[h11.Connection, bytes]]
Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class ServerHttp:
    """Requests to one server. ``url`` as in the configuration; ``connect`` makes the TCP connection."""

    def __init__(self, url: str, key: str = "", connect: Connect | None = None) -> None:
        scheme, self._host, self._port, self._path = parse_server_url(url, "url")
        self._tls = scheme == "https"
        self._context: ssl.SSLContext | None = None
        self._key = key
        self._connect_tcp = connect or _connect
        bare = self._port == (443 if self._tls else 80)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{host}{'' if bare else f':{self._port}'}{self._path}"  # never holds a password
        headers = [
            ("Host", host if bare else f"{host}:{self._port}"),
            ("User-Agent", f"meshmax/{__version__}"),
            ("Accept", "application/json, text/event-stream"),
            ("Content-Type", "application/json"),
            (FROM_MESHMAX, "1"),
        ]
        if key:
            headers.append(("Authorization", f"Bearer {key}"))
        self._heads = RequestHeads(headers)
        self._idle = IdleConnections()

    @property
    def host(self) -> str:
        """The server's host, as it stands in the URL."""
        return self._host

    def hidden(self, text: str) -> str:
        """``text`` of the server's, printable, without the key."""
        text = text.replace(self._key, "...") if self._key else text
        return "".join(letter if letter.isprintable() else " " for letter in text)

    async def call(self, method: str, path: str, body: object = None) -> Reply:
        """A request that computes nothing, and its whole answer. Raises EngineUnavailable; Busy after CALL_S."""
        with trio.move_on_after(CALL_S):
            try:
                async with self.open_response(method, path, body) as response:
                    return Reply(response.status, response.headers, await _whole(response))
            except EngineCrashed as error:
                raise EngineUnavailable(f"{self.url}: {error.message}") from None
        raise Busy(f"{self.url} did not answer within {CALL_S:g} s")

    @asynccontextmanager
    async def open_response(
        self, method: str, path: str, body: object = None, *, prompt: bool = False
    ) -> AsyncIterator[PatientResponse]:
        """Send a request (``body`` as JSON) and wait for the status; leaving closes the connection.

        ``prompt``: after a whole answer it is kept for the next one instead, until `drop_idle`. ``path`` follows the URL's
        own. Raises EngineUnavailable where there is no connection, EngineCrashed afterwards.
        """
        content = b"" if body is None else msgspec.json.encode(body)
        over = False
        begin = partial(self._heads.begin, method, self._path + path, content, close=not prompt)
        line, response = await self._begun(begin, self._idle.try_take() if prompt else None)
        try:
            yield response
            over = prompt and response.is_over()
        finally:
            if over:
                self._idle.put(line)
            else:
                line.drop()

    def drop_idle(self) -> None:
        """Close the connections that wait for the next prompt."""
        self._idle.drop_all()

    async def _begun(self, begin: Begin, kept: Line | None) -> tuple[Line, PatientResponse]:
        """The response to a request that was sent, over ``kept`` or a fresh connection."""
        began_s = trio.current_time()
        connection, data = begin()
        line = kept or await self._fresh()
        response = PatientResponse(line.stream, connection)
        sent = False
        try:
            await response.send(data)
            await response.start()
            sent = True
        except EngineCrashed:
            if kept is None or response.heard or trio.current_time() - began_s > LOST_AT_ONCE_S:
                raise
        finally:
            if not sent:
                line.drop()
        if sent:
            return line, response
        self.drop_idle()  # where one was closed, the others probably were
        return await self._begun(begin, None)

    async def _fresh(self) -> Line:
        tcp = await self._open()
        line, secured = Line(tcp, tcp), False
        try:
            line.stream = await self._secured(tcp)
            secured = True
        finally:
            if not secured:
                line.drop()
        return line

    async def _open(self) -> trio.abc.Stream:
        with trio.move_on_after(CONNECT_S):
            try:
                return await self._connect_tcp(self._host, self._port)
            except (OSError, trio.BrokenResourceError) as error:
                cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
                raise EngineUnavailable(f"{self.url} cannot be reached: {cause}") from None
        raise EngineUnavailable(f"{self.url} took no connection within {CONNECT_S:g} s")

    async def _secured(self, tcp: trio.abc.Stream) -> trio.abc.Stream:
        if not self._tls:
            return tcp
        if self._context is None:
            self._context = ssl.create_default_context()
        stream = trio.SSLStream(tcp, self._context, server_hostname=self._host, https_compatible=True)
        with trio.move_on_after(CONNECT_S):
            try:
                await stream.do_handshake()
            except (*_BROKEN, ssl.SSLError) as error:
                cause = error.__cause__ or error
                raise EngineUnavailable(f"{self.url}: no TLS connection: {cause}") from None
            return stream
        raise EngineUnavailable(f"{self.url} made no TLS connection within {CONNECT_S:g} s")


class PatientResponse(Response):
    """A response that gives a server up which falls silent."""

    async def send(self, data: bytes) -> None:
        """Send the request. Raises EngineCrashed."""
        with trio.move_on_after(SILENCE_S) as waiting:
            try:
                await self._stream.send_all(data)
            except _BROKEN as error:
                raise EngineCrashed(f"the server broke off: {words_of(error)}") from None
        if waiting.cancelled_caught:
            raise EngineCrashed(f"the server read nothing for {SILENCE_S:g} s")

    async def _receive(self) -> bytes:
        with trio.move_on_after(SILENCE_S):
            return await super()._receive()
        raise EngineCrashed(f"the server said nothing for {SILENCE_S:g} s")


@asynccontextmanager
async def open_prompt(
    http: ServerHttp, path: str, body: object, where: str, read: Read
) -> AsyncIterator[AsyncIterator[Event]]:
    """A streamed answer, whose lines ``read`` makes events of. ``where``: the server, in words. Raises what a status other
    than 200 means.
    """
    with named(where):
        async with http.open_response("POST", path, body, prompt=True) as response:
            if response.status != 200:
                raise error_of(response.status, response.headers, await response.read(), where, http.hidden)
            async with aclosing(response.lines()) as lines, aclosing(read(lines)) as events:
                yield events


async def read_out(lines: AsyncIterator[bytes]) -> None:
    """Read on after an answer's last word, for a moment: the connection can be used again once the message has ended."""
    with trio.move_on_after(END_S):
        try:
            async for _ in lines:
                pass
        except EngineCrashed:
            pass


async def _whole(response: PatientResponse) -> bytes:
    body = bytearray()
    while (data := await response.receive()) is not None:
        body += data
        if len(body) > MAX_CALL_BYTES:
            raise EngineCrashed(f"its answer is longer than {MAX_CALL_BYTES >> 20} MiB")
    return bytes(body)


@asynccontextmanager
async def shared_place(places: trio.CapacityLimiter) -> AsyncIterator[None]:
    """One of a server's places, waited for in turn; one task may have several. Where one is free no task switches."""
    borrower = object()
    if places.available_tokens > 0:
        places.acquire_on_behalf_of_nowait(borrower)
    else:
        await places.acquire_on_behalf_of(borrower)
    try:
        yield
    finally:
        places.release_on_behalf_of(borrower)


async def _connect(host: str, port: int) -> trio.abc.Stream:
    return await trio.open_tcp_stream(host, port)
