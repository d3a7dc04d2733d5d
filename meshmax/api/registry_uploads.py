"""``/v2/``, the writing side: ``ollama push`` and ``docker push`` publish into the mesh.

POST opens an upload (or takes a whole blob, or finds that the blob is here already), PATCH brings bytes, with or without
saying which, PUT ends it with its digest, and PUT of a manifest makes the model. Addresses are absolute: some clients do
not resolve relative ones. Bodies go to the disk as they come; nothing waits for a whole one. Not here: what is taken and
what is thrown away (services.uploads), access (guard).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import read_body
from meshmax.api.registry_words import VERSION, registry_route
from meshmax.api.replies import RequestTimeout
from meshmax.base.errors import BlobNotFound, InvalidRequest, ManifestInvalid, PeerGone
from meshmax.base.ids import Sha256
from meshmax.base.model import MAX_BLOB_BYTES, MAX_MANIFEST_BYTES
from meshmax.base.units import MIB
from meshmax.services.uploads import Upload, Uploads
from meshmax.wire.registry import name_of, parse_upload_range, try_digest

SILENCE_S: Final = 60.0  # of a client in the middle of a body
GATHER_BYTES: Final = MIB  # for one write


class HasUploads(Protocol):
    """A node to which models can be pushed."""

    @property
    def uploads(self) -> Uploads:
        """See services.uploads."""
        ...


class UploadFace:
    """The routes that write."""

    def __init__(self, node: HasUploads) -> None:
        self._node = node

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        one = "/v2/{name:path}/blobs/uploads/{id}"
        return [
            registry_route("/v2/{name:path}/blobs/uploads/", self.begin, ("POST",)),
            registry_route("/v2/{name:path}/blobs/uploads", self.begin, ("POST",)),
            registry_route(one, self.status, ("GET",)),
            registry_route(one, self.part, ("PATCH",)),
            registry_route(one, self.end, ("PUT",)),
            registry_route(one, self.cancel, ("DELETE",)),
            registry_route("/v2/{name:path}/manifests/{reference}", self.manifest, ("PUT",)),
        ]

    @property
    def _uploads(self) -> Uploads:
        return self._node.uploads

    async def begin(self, request: Request) -> Response:
        """Open an upload; 201 where the blob is here already (mounted) or came whole."""
        name_of(request.path_params["name"])
        given = request.query_params.get("digest")
        mount = _try_digest(request.query_params.get("mount"))
        if mount is not None and await self._uploads.has(mount):
            return _created(request, mount)
        upload = await self._uploads.open()
        if given is None:
            return _accepted(request, upload)
        digest = _required_digest(given)
        async with self._thrown_away_if_it_fails(upload):
            await self._take(request, upload, None)
            await self._uploads.finish(upload, digest)
        return _created(request, digest)

    async def part(self, request: Request) -> Response:
        """The next bytes, or those that Content-Range says."""
        upload = self._uploads.get(request.path_params["id"])
        header = request.headers.get("content-range")
        async with upload.busy:
            await self._take(request, upload, parse_upload_range(header) if header else None)
        return _accepted(request, upload)

    async def end(self, request: Request) -> Response:
        """The last bytes, if any, and the digest."""
        upload = self._uploads.get(request.path_params["id"])
        digest = _required_digest(request.query_params.get("digest") or "")
        header = request.headers.get("content-range")
        async with upload.busy:
            await self._take(request, upload, parse_upload_range(header) if header else None)
        await self._uploads.finish(upload, digest)
        return _created(request, digest)

    async def status(self, request: Request) -> Response:
        """How far an upload is."""
        await trio.lowlevel.checkpoint()
        reply = _accepted(request, self._uploads.get(request.path_params["id"]))
        reply.status_code = 204
        return reply

    async def cancel(self, request: Request) -> Response:
        """Throw an upload away."""
        await self._uploads.cancel(self._uploads.get(request.path_params["id"]))
        return Response(status_code=204, headers=VERSION)

    async def manifest(self, request: Request) -> Response:
        """Make the model."""
        reference = request.path_params["reference"]
        digest = try_digest(reference)
        if digest is not None:
            raise InvalidRequest("a manifest is put under a tag here, which is the model's name")
        name = name_of(request.path_params["name"], reference)
        raw = await read_body(request, MAX_MANIFEST_BYTES)
        try:
            stored = await self._uploads.put_manifest(name, raw)
        except BlobNotFound as error:
            raise ManifestInvalid(error.message) from None
        headers = {"docker-content-digest": f"sha256:{stored.manifest.digest}"}
        headers["location"] = _absolute(request, f"manifests/sha256:{stored.manifest.digest}")
        return Response(status_code=201, headers=VERSION | headers)

    async def _take(self, request: Request, upload: Upload, span: tuple[int, int] | None) -> None:
        """The request's body into the upload: at ``span``, or after what is there."""
        start = at = upload.size if span is None else span[0]
        most = MAX_BLOB_BYTES if span is None else span[1]
        gathered = bytearray()
        more = True
        while more:
            data, more = await _next_part(request)
            gathered += data
            if at + len(gathered) > most:
                raise InvalidRequest("the body is longer than its Content-Range, or than any blob may be")
            if gathered and (len(gathered) >= GATHER_BYTES or not more):
                await self._uploads.write(upload, at, bytes(gathered))
                at += len(gathered)
                gathered.clear()
        if span is not None and at != span[1]:
            raise InvalidRequest(f"the body has {at - start} bytes and its Content-Range {span[1] - start}")

    @asynccontextmanager
    async def _thrown_away_if_it_fails(self, upload: Upload) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._uploads.cancel(upload)
            raise


async def _next_part(request: Request) -> tuple[bytes, bool]:
    with trio.move_on_after(SILENCE_S):
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise PeerGone("the client went away")
        return message.get("body", b""), message.get("more_body", False)
    raise RequestTimeout(f"nothing came for {SILENCE_S:.0f} s")


def _try_digest(text: str | None) -> Sha256 | None:
    return try_digest(text) if text else None


def _required_digest(text: str) -> Sha256:
    digest = try_digest(text)
    if digest is None:
        raise InvalidRequest("an upload ends with ?digest=sha256:HEX")
    return digest


def _absolute(request: Request, rest: str) -> str:
    name = request.path_params["name"]
    return str(request.url.replace(path=f"/v2/{name}/{rest}", query=""))


def _accepted(request: Request, upload: Upload) -> Response:
    headers = {
        "location": _absolute(request, f"blobs/uploads/{upload.id}"),
        "docker-upload-uuid": upload.id,
        "range": f"0-{max(upload.size - 1, 0)}",
        "content-length": "0",
    }
    return Response(status_code=202, headers=VERSION | headers)


def _created(request: Request, digest: Sha256) -> Response:
    headers = {
        "location": _absolute(request, f"blobs/sha256:{digest}"),
        "docker-content-digest": f"sha256:{digest}",
        "content-length": "0",
    }
    return Response(status_code=201, headers=VERSION | headers)
