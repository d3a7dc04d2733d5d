"""The outermost layer of the API: access checks, CORS, request ids, and the boundary where a request's failure ends.

Every reply carries X-Request-ID. A body that nobody read is drained while the reply leaves, within bounds, since the
server would otherwise stand still with a full queue. Not here: the decisions (access), the routes.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Final

import structlog
import trio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshmax.api.access import Call, Policy, Verdict, judge
from meshmax.api.bodies import HOLD_BODY
from meshmax.api.prompts import REQUEST_ID
from meshmax.api.replies import Forbidden, InternalError, dialect_of, error_reply
from meshmax.api.wishes import HEADERS
from meshmax.base.errors import Busy, MeshmaxError, Unauthorized
from meshmax.base.loop_guard import FROM_MESHMAX, LOOP
from meshmax.base.units import MIB
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.metrics import HTTP_REQUESTS

MAX_REQUEST_ID: Final = 128  # characters of an id that a client chose
NO_REPLY: Final = 499  # the client went away before there was one, as Ollama counts it
MAX_HELD_BYTES: Final = 256 * MIB  # of the bodies of all requests; what is made of one takes two or three times as much
DRAIN_S: Final = 5.0  # how long a refused body may go on arriving
PREFLIGHT_AGE_S: Final = 43200  # Ollama's 12 hours
_FROM_MESHMAX: Final = FROM_MESHMAX.encode()
_ID_CHARACTERS: Final = frozenset(string.ascii_letters + string.digits + string.punctuation)
_STAINLESS: Final = (
    "arch async custom-poll-interval helper-method lang os package-version poll-helper "
    "retry-count runtime runtime-version timeout"
)
ALLOWED_HEADERS: Final = ",".join(
    [
        "Authorization",
        "Content-Type",
        "User-Agent",
        "Accept",
        "X-Requested-With",
        "X-Request-ID",
        "OpenAI-Beta",
        *HEADERS,
        *(f"x-stainless-{name}" for name in _STAINLESS.split()),
    ]
)
ALLOWED_METHODS: Final = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
EXPOSED_HEADERS: Final = "X-Request-ID,X-Meshmax-Peer,X-Meshmax-Route,Retry-After"


class Looped(MeshmaxError):
    """This is a meshmax peer, and no engine for another one: join its mesh instead (--join)."""

    code = "loop"
    http_status = LOOP


class Guard:
    """ASGI middleware around every route. ``new_id`` makes request ids."""

    def __init__(self, app: ASGIApp, policy: Policy, new_id: Any) -> None:
        self._app = app
        self._policy = policy
        self._new_id = new_id
        self._room = _Room()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer it here."""
        headers = dict(reversed(scope["headers"]))  # of a name that comes twice the first counts
        path, origin = scope["path"], headers[b"origin"].decode("latin-1") if b"origin" in headers else None
        call = Call(path, _text(headers, b"host"), origin, _text(headers, b"authorization"))
        verdict = judge(call, self._policy)
        if scope["type"] == "websocket":
            await (self._app if verdict == "ok" else _hang_up)(scope, receive, send)
            return
        scope[REQUEST_ID] = request_id = self._request_id(_text(headers, b"x-request-id"))
        cors = {} if verdict in ("host", "origin") else _cors(origin)
        exchange = _Exchange(receive, send, {"x-request-id": request_id, **cors}, self._room)
        scope[HOLD_BODY] = exchange.hold
        app = _refusal(verdict, scope["method"], path) or self._app
        if _FROM_MESHMAX in headers:
            app = error_reply(Looped(), dialect_of(path))
        try:
            structlog.contextvars.bind_contextvars(request_id=request_id)  # the task is the request's own
            ended_well = await isolate(
                "http request", lambda: app(scope, exchange.receive, exchange.send), path=path[:200]
            )
        finally:
            exchange.let_go()
            del scope[HOLD_BODY]  # which leads back to the scope: a ring of each request
        dialect = dialect_of(path)
        if not ended_well and not exchange.status:
            await error_reply(InternalError(), dialect)(scope, exchange.receive, exchange.send)
        HTTP_REQUESTS.labels(interface=dialect, status=str(exchange.status or NO_REPLY)).inc()

    def _request_id(self, given: str) -> str:
        sane = 0 < len(given) <= MAX_REQUEST_ID and _ID_CHARACTERS.issuperset(given)
        return given if sane else str(self._new_id())


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


async def _hang_up(_scope: Scope, receive: Receive, send: Send) -> None:
    """What a WebSocket gets that may not be: the server answers its handshake with 403."""
    await receive()
    await send({"type": "websocket.close", "code": 1008})


def _refusal(verdict: Verdict, method: str, path: str) -> ASGIApp | None:
    if verdict in ("host", "origin"):
        dialect = dialect_of(path)  # Ollama's own refusal is empty
        return (
            Response(status_code=403) if dialect == "ollama" else error_reply(Forbidden(_WHY_REFUSED[verdict]), dialect)
        )
    if method == "OPTIONS":  # a browser asks without credentials; the call itself is checked in full
        return Response(status_code=204, headers=_PREFLIGHT)
    refused = _UNTRUSTED.get(verdict)
    return error_reply(refused(), dialect_of(path)) if refused is not None else None


_UNTRUSTED: Final[Mapping[Verdict, type[MeshmaxError]]] = {"token": Unauthorized, "cross-origin": Forbidden}
_WHY_REFUSED: Final = {
    "host": "this API does not serve that Host header: use localhost or the peer's address",
    "origin": "calls from pages of that origin are not allowed: `origins` in the configuration lists further ones",
}
_PREFLIGHT: Final = {
    "access-control-allow-methods": ALLOWED_METHODS,
    "access-control-allow-headers": ALLOWED_HEADERS,
    "access-control-max-age": str(PREFLIGHT_AGE_S),
}


def _cors(origin: str | None) -> Mapping[str, str]:
    if origin is None:
        return {}
    return {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": EXPOSED_HEADERS,
        "vary": "Origin",
    }


class _Room:
    """How many bytes of bodies the requests under way hold together."""

    def __init__(self) -> None:
        self.held_bytes = 0


class _Exchange:
    """One request's two directions: adds headers to the reply, knows whether the body was read and the reply begun."""

    def __init__(self, receive: Receive, send: Send, extra: Mapping[str, str], room: _Room) -> None:
        self._receive = receive
        self._send = send
        self._extra = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in extra.items()]
        self._body_read = False
        self._room = room
        self._held_bytes = 0
        self.status = 0  # of the reply, once it has begun

    async def receive(self) -> Message:
        """The next message from the client."""
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._body_read = True
        return message

    def hold(self, size: int) -> None:
        """``size`` more bytes of the body stay in memory until the request ends. Raises Busy where all hold too much."""
        if self._room.held_bytes + size > MAX_HELD_BYTES:
            raise Busy("this node holds as many large requests as it has room for")
        self._room.held_bytes += size
        self._held_bytes += size

    async def send(self, message: Message) -> None:
        """Send, and while the last of the reply leaves take in what the client still sends."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._extra]}
        if self._body_read or message.get("more_body", False) or message["type"] != "http.response.body":
            await self._send(message)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            await self._send(message)
            nursery.cancel_scope.cancel()

    def let_go(self) -> None:
        """The request has ended, and its body is gone."""
        self._room.held_bytes -= self._held_bytes
        self._held_bytes = 0

    async def _drain(self) -> None:
        with trio.move_on_after(DRAIN_S):
            while (await self._receive())["type"] != "http.disconnect":
                pass
