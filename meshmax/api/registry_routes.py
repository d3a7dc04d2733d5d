"""``/v2/``, the reading side: this peer as a registry, from which a stock ``ollama pull`` fetches through the mesh.

What that client needs beyond the registry protocol: the head of an answer comes at once, before the mesh has the bytes;
a HEAD of a blob tells its length; a GET without a range is answered with 200 and a Location of its own, since the client
takes its ranges from there and never reads that body. A body is sent chunk by chunk as they arrive; when the pull fails
the connection is broken off, so that no client takes half a range for a whole one. Not here: what is offered
(services.repositories), pushing (registry_uploads).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final, Protocol

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute
from starlette.types import Receive, Scope, Send

from meshmax.api.exchange import OpenAnswers, cancel_on_hang_up
from meshmax.api.registry_words import VERSION, answered, registry_route
from meshmax.base.errors import BlobNotFound, Busy, MeshmaxError
from meshmax.base.model import CHUNK_BYTES, Manifest
from meshmax.services.repositories import BlobOffer, Repositories, chunks_of
from meshmax.telemetry.log import get_logger
from meshmax.wire.registry import media_type_of, name_of, parse_range, try_digest

MAX_READERS: Final = 128  # bodies sent at once; each holds two chunks of 1 MiB

_log = get_logger("registry")


class HasRepositories(Protocol):
    """A node that offers models as a registry does."""

    @property
    def repositories(self) -> Repositories:
        """See services.repositories."""
        ...


class RegistryFace:
    """The routes that read."""

    def __init__(self, node: HasRepositories, open_answers: OpenAnswers) -> None:
        self._node = node
        self._open_answers = open_answers
        self._readers = 0

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        read = ("GET", "HEAD")
        return [
            registry_route("/v2/", self.version, read),
            registry_route("/v2", self.version, read),
            registry_route("/v2/{name:path}/manifests/{reference}", self.manifest, read),
            registry_route("/v2/{name:path}/blobs/{digest}", self.blob, read),
            registry_route("/v2/{name:path}/tags/list", self.tags, ("GET",)),
        ]

    async def version(self, _request: Request) -> Response:
        """That this is a registry."""
        await trio.lowlevel.checkpoint()
        return answered({})

    async def tags(self, request: Request) -> Response:
        """The tags of a name."""
        await trio.lowlevel.checkpoint()
        name = request.path_params["name"]
        return answered({"name": name, "tags": self._node.repositories.tags(name_of(name))})

    async def manifest(self, request: Request) -> Response:
        """A manifest by tag or digest: the very bytes."""
        reference = request.path_params["reference"]
        digest = try_digest(reference)
        name = name_of(request.path_params["name"], "latest" if digest else reference)
        found: Manifest = await self._node.repositories.manifest(name, digest)
        headers = _headers(found.digest) | {"content-type": media_type_of(found.raw)}
        if request.method == "HEAD":
            return _Head(headers, len(found.raw))
        return Response(found.raw, 200, headers)

    async def blob(self, request: Request) -> Any:
        """A blob, or a range of it."""
        digest = try_digest(request.path_params["digest"])
        if digest is None:
            raise BlobNotFound("a blob is asked for by its digest, sha256:HEX")
        offer = await self._node.repositories.blob(name_of(request.path_params["name"]), digest)
        headers = _headers(digest) | {"accept-ranges": "bytes", "content-type": "application/octet-stream"}
        if request.method == "HEAD":
            return _Head(headers, offer.size)
        span = None
        if request.headers.get("if-range", headers["etag"]) == headers["etag"]:
            try:
                span = parse_range(request.headers.get("range", ""), offer.size)
            except IndexError:
                return Response(status_code=416, headers={"content-range": f"bytes */{offer.size}"})
        if self._readers >= MAX_READERS:
            raise Busy(f"{MAX_READERS} clients read from this registry already")
        return _BlobReply(self, offer, span, headers | {"location": request.url.path}, self._open_answers)

    # --- for _BlobReply ----------------------------------------------------------------------------------------------

    @property
    def repositories(self) -> Repositories:
        """What is read from."""
        return self._node.repositories

    def count(self, by: int) -> None:
        """One reader more, or less."""
        self._readers += by


def _headers(digest: str) -> dict[str, str]:
    return VERSION | {"docker-content-digest": f"sha256:{digest}", "etag": f'"sha256:{digest}"'}


class _Head(Response):
    """The answer to a HEAD: the length of what a GET would bring, and no body."""

    def __init__(self, headers: dict[str, str], size: int) -> None:
        super().__init__(None, 200, headers)
        self.headers["content-length"] = str(size)


class _BlobReply:
    """A body that is sent as its chunks arrive. ``span`` None: the whole blob."""

    def __init__(
        self,
        face: RegistryFace,
        offer: BlobOffer,
        span: tuple[int, int] | None,
        headers: dict[str, str],
        open_answers: OpenAnswers,
    ) -> None:
        self._face = face
        self._offer = offer
        self._start, self._end = span or (0, offer.size)
        self._headers = headers | {"content-length": str(self._end - self._start)}
        if span is not None:
            self._headers["content-range"] = f"bytes {self._start}-{self._end - 1}/{offer.size}"
        self._status = 206 if span else 200
        self._open_answers = open_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; returns when the last byte is sent, and when the client is gone."""
        self._face.count(1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_on_hang_up, receive, nursery.cancel_scope)
                with self._open_answers.held():
                    await self._send(send)
                nursery.cancel_scope.cancel()
        finally:
            self._face.count(-1)

    async def _send(self, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        try:
            with ExitStack() as stack:
                through = self._face.repositories.through
                model = self._offer.offer
                hold = stack.enter_context(through.hold(model.manifest.digest, model.name)) if model else None
                for index in chunks_of(self._start, self._end):
                    chunk = await self._face.repositories.read(self._offer, hold, index)
                    first = index * CHUNK_BYTES
                    part = chunk[max(self._start - first, 0) : self._end - first]
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except MeshmaxError as error:
            # The server breaks the connection off when less was sent than was announced.
            _log.info("a blob could not be sent to its end", blob=self._offer.digest[:12], error=error.message)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
