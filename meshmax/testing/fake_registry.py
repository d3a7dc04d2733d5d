"""A registry in memory that speaks to httpx in virtual time, and fails on demand.

It is an httpx transport: what a client asks is answered by `FakeRegistry.handle_async_request`, bodies come at
``rate_bytes_per_s`` a connection. ``faults`` are asked first, in order: each may answer a request in its own way, or let
it pass. Nothing here touches a socket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable

import httpx
import msgspec
import trio

from meshmax.base.ids import Sha256
from meshmax.base.model import CONFIG_MEDIA_TYPE, MODEL_MEDIA_TYPE, Layer, Manifest
from meshmax.wire.manifest import build_manifest, digest_of, parse_manifest
from meshmax.wire.registry import parse_range

Fault = Callable[[httpx.Request], "httpx.Response | None"]
STEP_BYTES = 16384


class Body(httpx.AsyncByteStream):
    """Bytes that come at a rate. ``cut_after``: the connection breaks after so many; ``stall_after``: nothing more comes."""

    def __init__(
        self,
        data: bytes,
        rate_bytes_per_s: float = float("inf"),
        cut_after: int | None = None,
        stall_after: int | None = None,
        on_sent: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._data = data
        self._rate = rate_bytes_per_s
        self._cut = cut_after
        self._stall = stall_after
        self._on_sent = on_sent

    async def __aiter__(self) -> AsyncIterator[bytes]:
        step = STEP_BYTES if self._rate == float("inf") else max(1, min(STEP_BYTES, int(self._rate)))
        for at in range(0, len(self._data), step):
            if self._stall is not None and at >= self._stall:
                await trio.sleep_forever()
            if self._cut is not None and at >= self._cut:
                raise httpx.RemoteProtocolError("the peer closed the connection without a word")
            part = self._data[at : at + step]
            await trio.sleep(len(part) / self._rate)
            self._on_sent(len(part))
            yield part


class FakeRegistry(httpx.AsyncBaseTransport):
    """Manifests by (repository, tag), blobs by digest. ``ranges`` False: it knows none and sends all of a blob."""

    def __init__(self, rate_bytes_per_s: float = float("inf")) -> None:
        self.manifests: dict[tuple[str, str], bytes] = {}
        self.blobs: dict[Sha256, bytes] = {}
        self.rate_bytes_per_s = rate_bytes_per_s
        self.ranges = True
        self.faults: list[Fault] = []
        self.requests: list[httpx.Request] = []
        self.sent: Counter[Sha256] = Counter()

    def add_model(self, repository: str, data: bytes, tag: str = "latest") -> Manifest:
        """A model of two blobs: ``data`` as its model layer, and a config."""
        layers = [self.add_blob(data), self.add_blob(msgspec.json.encode({"model_format": "gguf", "x": len(data)}))]
        config = Layer(CONFIG_MEDIA_TYPE, layers[1], len(self.blobs[layers[1]]))
        manifest = parse_manifest(build_manifest(config, [Layer(MODEL_MEDIA_TYPE, layers[0], len(data))]))
        self.manifests[repository, tag] = manifest.raw
        return manifest

    def add_blob(self, data: bytes) -> Sha256:
        """Its digest."""
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def asked(self, digest: Sha256) -> list[httpx.Request]:
        """Requests for one blob."""
        return [request for request in self.requests if request.url.path.endswith(digest)]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """What httpx calls."""
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        replies = (fault(request) for fault in self.faults)
        reply = next((reply for reply in replies if reply is not None), None) or self._answer(request)
        if reply.is_closed:  # made of bytes: as over a wire, they are still to be read
            reply = httpx.Response(reply.status_code, headers=reply.headers, stream=Body(reply.content))
        reply.request = request
        return reply

    def _answer(self, request: httpx.Request) -> httpx.Response:
        repository, _, rest = request.url.path.removeprefix("/v2/").rpartition("/")
        repository, _, kind = repository.rpartition("/")
        if kind == "manifests" and (repository, rest) in self.manifests:
            raw = self.manifests[repository, rest]
            return httpx.Response(200, headers={"docker-content-digest": f"sha256:{digest_of(raw)}"}, content=raw)
        digest = Sha256(rest.removeprefix("sha256:"))
        if kind != "blobs" or digest not in self.blobs:
            return httpx.Response(404, json={"errors": [{"code": "UNKNOWN"}]})
        return self.blob_reply(digest, request)

    def blob_reply(self, digest: Sha256, request: httpx.Request, **body: int) -> httpx.Response:
        """The answer for a blob; ``body`` are Body's faults."""
        data = self.blobs[digest]
        span = parse_range(request.headers.get("range", ""), len(data)) if self.ranges else None
        headers = {"content-length": str(len(data))}
        if span is not None:
            headers = {
                "content-length": str(span[1] - span[0]),
                "content-range": f"bytes {span[0]}-{span[1] - 1}/{len(data)}",
            }
            data = data[span[0] : span[1]]

        def count(size: int) -> None:
            self.sent[digest] += size

        stream = Body(data, self.rate_bytes_per_s, on_sent=count, **body)
        return httpx.Response(206 if span else 200, headers=headers, stream=stream)
