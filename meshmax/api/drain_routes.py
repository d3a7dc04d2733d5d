"""POST /api/v1/nodes/{id}/drain and /undrain, and how a node stands: GET /api/v1/nodes/{id}/drain.

Each answers at once, with how the node stands then; who waits until it is drained asks again. Saying it twice is no error: the
last deadline counts. ``{id}`` is a PeerId or a unique name; other nodes take the admin scope. Not here: what draining is
(core.draining).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import decode_words, read_body, require_json
from meshmax.api.replies import json_reply
from meshmax.api.table import route
from meshmax.base.drain import DEADLINE_S, MAX_DEADLINE_S, DrainView
from meshmax.base.ids import PeerId

MAX_BODY_BYTES: Final = 1024  # a number


class DrainBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of drain, which may be left out. ``deadline_s``: how long answers that run may go on."""

    deadline_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_S)] = DEADLINE_S


class NoBody(msgspec.Struct, forbid_unknown_fields=True):
    """A body without fields."""


class Draining(Protocol):
    """How a node drains itself and others: see node.draining. Raises Refused, OutOfScope, PeerGone."""

    @property
    def ending(self) -> bool:
        """Whether the node is about to end, so that it takes no prompts at all."""
        ...

    async def drain(self, peer: PeerId, deadline_s: float) -> DrainView:
        """Take no prompts any more."""
        ...

    async def undrain(self, peer: PeerId) -> DrainView:
        """Take prompts again."""
        ...

    async def view(self, peer: PeerId) -> DrainView:
        """How it stands."""
        ...


class HasDraining(Protocol):
    """A node that can be drained."""

    @property
    def draining(self) -> Draining:
        """See node.draining."""
        ...


class DrainFace:
    """The routes of draining; ``find_node`` gives the PeerId of a node that is named."""

    def __init__(self, node: HasDraining, find_node: Callable[[str], PeerId]) -> None:
        self._node = node
        self._find_node = find_node

    def routes(self) -> list[HttpRoute]:
        """Every route."""
        return [
            route("/api/v1/nodes/{id}/drain", self.view, ("GET", "HEAD")),
            route("/api/v1/nodes/{id}/drain", self.drain, ("POST",)),
            route("/api/v1/nodes/{id}/undrain", self.undrain, ("POST",)),
        ]

    async def view(self, request: Request) -> Response:
        """How the node stands."""
        peer = self._find_node(request.path_params["id"])
        return json_reply(_json(peer, await self._node.draining.view(peer)))

    async def drain(self, request: Request) -> Response:
        """Take it out of service."""
        body = await _read(request, DrainBody)
        peer = self._find_node(request.path_params["id"])
        return json_reply(_json(peer, await self._node.draining.drain(peer, body.deadline_s)))

    async def undrain(self, request: Request) -> Response:
        """Take it back into service."""
        await _read(request, NoBody)
        peer = self._find_node(request.path_params["id"])
        return json_reply(_json(peer, await self._node.draining.undrain(peer)))


async def _read(request: Request, words: type[Any]) -> Any:
    """The body as ``words``; none at all says nothing."""
    body = await read_body(request, MAX_BODY_BYTES)
    if not body.strip():
        return words()
    require_json(request)
    return decode_words(body, words)


def _json(peer: PeerId, view: DrainView) -> dict[str, Any]:
    """``running`` answers still run; ``left_s`` until they are ended; ``handed_over``: how many were."""
    left_s = None if view.left_s is None else round(view.left_s, 3)
    return {"id": peer, "status": view.state, "running": view.running, "left_s": left_s, "handed_over": view.ended}
