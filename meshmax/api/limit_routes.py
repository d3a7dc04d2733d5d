"""GET and PUT /api/v1/limits: the limits on moving blobs, as they hold now and as they were set by command.

Rates are bytes a second as numbers, or texts like 10MB/s; 0 or "off" is no limit, null in a PUT is "as configured". A PUT
says all of what is set by command: a key that it leaves out is as configured.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import read_words
from meshmax.api.replies import json_reply
from meshmax.api.table import route
from meshmax.base.units import parse_rate
from meshmax.core.limits import Override
from meshmax.services.throttle import Limits


class LimitsBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of PUT /api/v1/limits."""

    up: str | int | None = None
    down: str | int | None = None
    peer_up: str | int | None = None
    peer_down: str | int | None = None


class HasLimits(Protocol):
    """A node with limits."""

    @property
    def limits(self) -> Limits:
        """See services.throttle."""
        ...


class LimitFace:
    """The routes of a node's limits."""

    def __init__(self, node: HasLimits) -> None:
        self._node = node

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        return [
            route("/api/v1/limits", self.show, ("GET", "HEAD")),
            route("/api/v1/limits", self.change, ("PUT",)),
        ]

    async def show(self, _request: Request) -> Response:
        """The limits that hold now, and which of them were set by command."""
        return json_reply(_view(self._node.limits))

    async def change(self, request: Request) -> Response:
        """Set limits from now on. Raises InvalidRequest for what is no rate."""
        body = await read_words(request, LimitsBody)
        given = {key: getattr(body, key) for key in Override.__struct_fields__}
        values = {key: None if value is None else parse_rate(str(value)) for key, value in given.items()}
        await self._node.limits.set(Override(**values))
        return json_reply(_view(self._node.limits))


def _view(limits: Limits) -> dict[str, Any]:
    return {"limits": msgspec.to_builtins(limits.rates), "set": msgspec.to_builtins(limits.override)}
