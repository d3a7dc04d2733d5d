"""Pins and sweeping over HTTP: POST /api/v1/models/{name}/pin and /unpin, POST /api/v1/sweep.

A sweep answers when it is done: with what went, and why each other model and partial stayed. Times are RFC 3339, sizes
bytes. Not here: what is decided (core.pins, core.sweep).
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import decode_words, read_body, read_words, require_json
from meshmax.api.replies import json_reply, model_not_found
from meshmax.api.stamps import rfc3339
from meshmax.api.table import route
from meshmax.api.transfer_routes import MAX_EMPTY_BYTES, NoBody
from meshmax.base.errors import ModelNotFound
from meshmax.base.units import parse_bytes
from meshmax.core.sweep import PartialCopy, Verdict
from meshmax.services.garbage import Garbage
from meshmax.services.sweep import Report


class SweepBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/sweep. ``free``: what is to go beyond the budget's need, like 20GB, or bytes.

    ``last_copies``: also what no other peer is known to have; ``dry_run``: only tell.
    """

    free: Annotated[str, msgspec.Meta(max_length=32)] | Annotated[int, msgspec.Meta(ge=0)] = 0
    last_copies: bool = False
    dry_run: bool = False


class HasGarbage(Protocol):
    """A node that pins and sweeps."""

    @property
    def garbage(self) -> Garbage:
        """See services.garbage."""
        ...


class SweepFace:
    """The routes of pins and sweeping for one node."""

    def __init__(self, node: HasGarbage) -> None:
        self._node = node

    def routes(self) -> list[HttpRoute]:
        """Every route; to stand before those whose path ends in a model's name."""
        return [
            route("/api/v1/models/{name:path}/pin", self.pin, ("POST",)),
            route("/api/v1/models/{name:path}/unpin", self.unpin, ("POST",)),
            route("/api/v1/sweep", self.sweep, ("POST",)),
        ]

    async def pin(self, request: Request) -> Response:
        """Keep a model, and let its name mean nothing else."""
        await _read_nothing(request)
        try:
            return json_reply(msgspec.to_builtins(await self._node.garbage.pinning.pin(_name(request))))
        except ModelNotFound:
            raise model_not_found(_name(request)) from None

    async def unpin(self, request: Request) -> Response:
        """Let go of a name."""
        await _read_nothing(request)
        return json_reply(msgspec.to_builtins(await self._node.garbage.pinning.unpin(_name(request))))

    async def sweep(self, request: Request) -> Response:
        """Sweep now. Raises InvalidRequest, StoreError."""
        body = await read_words(request, SweepBody)
        free_bytes = parse_bytes(body.free) if isinstance(body.free, str) else body.free
        report = await self._node.garbage.sweeper.sweep(
            free_bytes=free_bytes, last_copies=body.last_copies, dry_run=body.dry_run
        )
        return json_reply(report_json(report))


def report_json(report: Report) -> dict[str, Any]:
    """The reply of a sweep."""
    models = [v for v in report.verdicts if not isinstance(v.candidate, PartialCopy)]
    partials = [v for v in report.verdicts if isinstance(v.candidate, PartialCopy)]
    return {
        "dry_run": report.dry_run,
        "disk_budget_bytes": report.budget.limit_bytes,
        "keep_free_bytes": report.budget.keep_free_bytes,
        "used_bytes": report.used,
        "free_bytes": report.free,
        "needed_bytes": report.need,
        "freed_bytes": report.freed,
        "lacking_bytes": report.lacking,
        "models": [_verdict_json(verdict) for verdict in models],
        "partials": [_verdict_json(verdict) for verdict in partials],
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    one = verdict.candidate
    shown: dict[str, Any] = {
        "digest": one.digest,
        "size": one.size,
        "action": verdict.action,
        "reason": verdict.reason,
        "freed_bytes": verdict.frees,
    }
    if isinstance(one, PartialCopy):
        return shown | {"touched": rfc3339(one.touched_s)}
    return shown | {"names": list(one.names), "last_used": rfc3339(one.last_use_s), "holders": one.holders}


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name


async def _read_nothing(request: Request) -> None:
    """Refuse a body that says something."""
    body = await read_body(request, MAX_EMPTY_BYTES)
    if body.strip():
        require_json(request)
        decode_words(body, NoBody)
