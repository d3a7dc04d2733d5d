"""Routes: a path, its verbs exactly (HEAD only where it is named), an endpoint whose errors become replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

import trio
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

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

ANY_VERB = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


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
        return reply
