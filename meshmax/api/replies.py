"""Whole replies: JSON with the content type that Ollama sends, and errors in the shape of each interface.

Which shape an error takes follows from the path: ``/v1/`` is OpenAI's, ``/api/v1/`` and the node's own paths are the
mesh's, the rest Ollama's. Not here: which error a request deserves (the faces), streams (exchange).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import msgspec
from starlette.responses import Response

from meshmax.base.errors import Busy, MeshmaxError, NotFound, NotOffered, Unauthorized, without_frames
from meshmax.core.refusal import WentAway

JSON_TYPE: Final = "application/json; charset=utf-8"

Dialect = Literal["ollama", "openai", "mesh"]

ROUTE_HEADER: Final = "x-meshmax-route"
PROMPT_PATHS: Final = frozenset(
    {
        *(f"/api/{verb}" for verb in ("generate", "chat", "embed", "embeddings")),
        *(f"/api/v1/{verb}" for verb in ("generate", "chat", "embeddings")),
        *(f"/v1/{verb}" for verb in ("completions", "chat/completions", "embeddings")),
    }
)
_MESH_PATHS: Final = frozenset({"/health", "/ready", "/status", "/metrics", "/docs"})


class PayloadTooLarge(MeshmaxError):
    """The request's body is too large."""

    code = "payload_too_large"
    http_status = 413


class UnsupportedMediaType(MeshmaxError):
    """The body must be JSON, sent with the header Content-Type: application/json."""

    code = "unsupported_media_type"
    http_status = 415


class Forbidden(MeshmaxError):
    """Calls from a web page of another origin need the API token."""

    code = "forbidden"
    http_status = 403


class RequestTimeout(MeshmaxError):
    """The request's body did not arrive in time."""

    code = "request_timeout"
    http_status = 408


class ShuttingDown(Busy):
    """This peer is shutting down."""


class InternalError(MeshmaxError):
    """Something went wrong inside this peer; its log tells more."""

    code = "internal"


def dialect_of(path: str) -> Dialect:
    """The interface that ``path`` belongs to."""
    if path.startswith("/v1/"):
        return "openai"
    return "mesh" if path.startswith("/api/v1/") or path in _MESH_PATHS else "ollama"


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``value`` as a JSON reply."""
    return Response(msgspec.json.encode(value), status, {"content-type": JSON_TYPE, **(headers or {})})


def error_body(error: MeshmaxError, dialect: Dialect) -> dict[str, Any]:
    """``error`` as the interface writes it. ``code`` is more than Ollama says: programs can tell causes apart by it."""
    if dialect != "openai":
        return {"error": error.message, "code": error.code}
    return {"error": {"message": error.message, "type": _openai_type(error.http_status), "param": None, "code": None}}


def error_reply(error: MeshmaxError, dialect: Dialect) -> Response:
    """``error`` as a whole reply, with Retry-After where a later try may help."""
    headers: dict[str, str] = {}
    if isinstance(error, Busy | WentAway):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return json_reply(error_body(error, dialect), error.http_status, headers)


def not_routed(error: MeshmaxError) -> str:
    """What X-Meshmax-Route says of a prompt that failed before a peer was looked for."""
    return f"nobody was asked: {error.code}"


def not_offered(what: str) -> NotOffered:
    """The error of a route that is known and not offered."""
    return NotOffered(f"{what} is not offered by this version of meshmax.")


def only_error(error: BaseException) -> MeshmaxError | None:
    """The error of our tree that ``error`` is, or the first of a group that holds nothing else; None for anything else.

    It is to be told, so it goes without its frames, which know the request, and who keeps the error.
    """
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, MeshmaxError)]
    return without_frames(ours[0]) if ours and len(ours) == len(leaves) else None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _openai_type(status: int) -> str:
    return {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")


def model_not_found(name: str) -> NotFound:
    """Ollama's sentence for a model that is not known, ``name`` as it was asked for."""
    return NotFound(f"model '{name[:200]}' not found")
