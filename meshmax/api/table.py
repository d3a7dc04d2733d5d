"""Routes: a path, its verbs exactly (HEAD only where it is named), an endpoint whose errors become replies.

A path without parameters is looked up, the others are tried in turn; what no route knows gets the words of Ollama's router.
A path that would be known with one slash where it has several, or without the one at its end, is answered with where to ask
instead (307, so that a body goes along), as Ollama does: clients are given base URLs that end with a slash.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from meshmax.api.replies import (
    PROMPT_PATHS,
    ROUTE_HEADER,
    dialect_of,
    error_reply,
    not_offered,
    not_routed,
    only_error,
)
from meshmax.base.errors import MeshmaxError

Endpoint = Callable[[Request], Awaitable[ASGIApp]]

_SLASHES: Final = re.compile("/+")
ANY_VERB = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class Table:
    """An ASGI application of ``routes``; of those that fit the first one answers."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes
        self._by_path: dict[tuple[str, str], Route] = {}
        tried: list[Route] = []
        for known in routes:
            if known.param_convertors:
                tried.append(known)
            elif not any(earlier.path_regex.match(known.path) for earlier in tried):
                for verb in known.methods or ():
                    self._by_path.setdefault((verb, known.path), known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; there are no WebSockets."""
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        found = self._by_path.get((scope["method"], scope["path"])) or self._matching(scope)
        reply = await found.endpoint(Request(scope, receive, send)) if isinstance(found, Route) else found
        await reply(scope, receive, send)

    def _matching(self, scope: Scope) -> Route | ASGIApp:
        other_verbs: set[str] = set()
        for known in self._routes:
            match, found = known.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                return known
            if match is Match.PARTIAL:
                other_verbs |= known.methods or set()
        if other_verbs:
            return PlainTextResponse("405 method not allowed", 405, {"allow": ", ".join(sorted(other_verbs))})
        if elsewhere := self._plain_path(scope):
            return Response(status_code=307, headers={"location": elsewhere})
        return PlainTextResponse("404 page not found", 404)

    def _plain_path(self, scope: Scope) -> str:
        """Where this request belongs whose path has slashes too many, '' where no route is. Only paths that are looked up."""
        plain = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        if plain == scope["path"] or (scope["method"], plain) not in self._by_path:
            return ""
        query = scope.get("query_string", b"").decode("latin-1")
        return f"{plain}?{query}" if query else plain


def route(path: str, endpoint: Endpoint, verbs: Collection[str]) -> Route:
    """A route that answers these verbs only."""

    async def answered(request: Request) -> ASGIApp:
        return await answer(endpoint, request)

    made = Route(path, answered, methods=list(verbs))
    made.methods = set(verbs)  # Starlette adds HEAD to GET, which Ollama's router does not
    return made


def closed_route(path: str, verbs: Collection[str], what: str) -> Route:
    """A route that is known and not offered yet: 501 and a sentence."""

    async def refuse(_request: Request) -> ASGIApp:
        await trio.lowlevel.checkpoint()
        raise not_offered(what)

    return route(path, refuse, verbs)


async def answer(endpoint: Endpoint, request: Request) -> ASGIApp:
    """The endpoint's reply, or its error in the shape of the path's interface."""
    try:
        return await endpoint(request)
    except (MeshmaxError, BaseExceptionGroup) as error:
        if (ours := only_error(error)) is None:
            raise
        reply = error_reply(ours, dialect_of(request.scope["path"]))
        if request.method == "POST" and request.scope["path"] in PROMPT_PATHS:
            reply.headers[ROUTE_HEADER] = not_routed(ours)
        del ours  # it knows this frame, and by it the request and its body
        return reply
