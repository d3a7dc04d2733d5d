"""How ``/v2/`` answers: headers that every answer of a registry has, and errors in its shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from meshmax.api.replies import error_reply, json_reply, only_error
from meshmax.api.table import route
from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    IntegrityError,
    InvalidName,
    InvalidRequest,
    ManifestInvalid,
    MeshmaxError,
    NotFound,
    Unauthorized,
)
from meshmax.services.uploads import UploadUnknown
from meshmax.wire.registry import API_VERSION, API_VERSION_HEADER

VERSION: Final = {API_VERSION_HEADER: API_VERSION}

# The registry protocol's own words, the first that fits.
_CODES: Final[tuple[tuple[type[MeshmaxError], str], ...]] = (
    (UploadUnknown, "BLOB_UPLOAD_UNKNOWN"),
    (BlobNotFound, "BLOB_UNKNOWN"),
    (NotFound, "MANIFEST_UNKNOWN"),
    (InvalidName, "NAME_INVALID"),
    (ManifestInvalid, "MANIFEST_INVALID"),
    (IntegrityError, "DIGEST_INVALID"),
    (InvalidRequest, "BLOB_UPLOAD_INVALID"),
    (Busy, "TOOMANYREQUESTS"),
    (Unauthorized, "UNAUTHORIZED"),
)
# What a client did wrong is no gateway's failure here: the bytes were its own.
_STATUSES: Final[tuple[tuple[type[MeshmaxError], int], ...]] = ((InvalidName, 404), (IntegrityError, 400))


def answered(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as JSON, with the headers of a registry."""
    return json_reply(value, status, VERSION | (headers or {}))


def failed(error: MeshmaxError) -> Response:
    """``error`` as a registry says it."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "UNKNOWN")
    reply = error_reply(error, "ollama")
    reply.status_code = next((status for kind, status in _STATUSES if isinstance(error, kind)), reply.status_code)
    reply.body = msgspec.json.encode({"errors": [{"code": code, "message": error.message, "detail": None}]})
    reply.headers["content-length"] = str(len(reply.body))
    reply.headers[API_VERSION_HEADER] = API_VERSION
    return reply


def registry_route(path: str, endpoint: Callable[[Request], Awaitable[ASGIApp]], verbs: Collection[str]) -> Route:
    """A route of the registry: these verbs only, errors in its shape."""

    async def in_its_words(request: Request) -> ASGIApp:
        try:
            return await endpoint(request)
        except (MeshmaxError, BaseExceptionGroup) as error:
            if (ours := only_error(error)) is None:
                raise
            return failed(ours)

    return route(path, in_its_words, verbs)
