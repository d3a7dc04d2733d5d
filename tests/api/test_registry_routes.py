"""``/v2/`` in this process: what each request is answered, over a real store and a catalog of one model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
from starlette.applications import Starlette

from meshmax.api.access import Call, Policy, judge
from meshmax.api.exchange import OpenAnswers
from meshmax.api.registry_routes import RegistryFace
from meshmax.api.registry_uploads import UploadFace
from meshmax.base.errors import ModelNotFound
from meshmax.base.model import CHUNK_BYTES, CONFIG_MEDIA_TYPE, MODEL_MEDIA_TYPE, Layer, Manifest, StoredModel
from meshmax.base.names import ModelName, parse_name
from meshmax.services.pull_through import open_pull_through
from meshmax.services.repositories import Repositories
from meshmax.services.uploads import Uploads, open_uploads
from meshmax.store import open_store
from meshmax.testing.asgi_transport import AsgiTransport
from meshmax.wire.manifest import build_manifest, digest_of
from tests.store.fakes import in_place

DATA = bytes(range(256)) * 8192 + b"the end"
CONFIG = b'{"model_format":"gguf"}'


def manifest() -> bytes:
    config = Layer(CONFIG_MEDIA_TYPE, digest_of(CONFIG), len(CONFIG))
    return build_manifest(config, [Layer(MODEL_MEDIA_TYPE, digest_of(DATA), len(DATA))])


class Site:
    """A node that is a registry, and a client of it."""

    def __init__(self) -> None:
        self.local: tuple[StoredModel, ...] = ()
        self.http: httpx.AsyncClient

    def resolve(self, name: str, *, parts: bool = False) -> Any:
        for stored in self.local:
            if parse_name(stored.name) == parse_name(name):
                return SimpleNamespace(digest=stored.manifest.digest, stored=stored)
        raise ModelNotFound

    def entries(self) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(name=stored.name, local=True) for stored in self.local)

    async def push(self, data: bytes) -> httpx.Response:
        return await self.http.post(f"/v2/library/x/blobs/uploads/?digest=sha256:{digest_of(data)}", content=data)

    async def push_model(self) -> str:
        for data in (DATA, CONFIG):
            assert (await self.push(data)).status_code == 201
        assert (await self.http.put("/v2/library/x/manifests/v1", content=manifest())).status_code == 201
        return f"/v2/library/x/blobs/sha256:{digest_of(DATA)}"


@asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[Site]:
    site: Any = Site()
    async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:

        async def publish(name: ModelName, made: Manifest) -> StoredModel:
            stored = await store.models.put(name, made.raw, None)
            site.local = (*site.local, stored)
            return stored

        uploads = Uploads(store.staging, store.blobs, publish, lambda: site.local, store.blobs.remove)
        pulls: Any = SimpleNamespace()
        async with open_pull_through(pulls, store.blobs) as through, open_uploads(uploads):
            repositories = Repositories(
                site, store.blobs, lambda: site.local, pulls, lambda digest: {}, through, upstreams=None
            )
            node = SimpleNamespace(repositories=repositories, uploads=uploads)
            app = Starlette(routes=[*UploadFace(node).routes(), *RegistryFace(node, OpenAnswers()).routes()])
            transport = AsgiTransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:11434") as site.http:
                yield site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(tmp_path) as made:
        yield made


async def test_it_says_that_it_is_a_registry(site: Site) -> None:
    for path in ("/v2/", "/v2"):
        reply = await site.http.get(path)
        assert (reply.status_code, reply.json()) == (200, {})
        assert reply.headers["docker-distribution-api-version"] == "registry/2.0"


async def test_a_manifest_is_its_very_bytes_by_tag_and_by_digest(site: Site) -> None:
    await site.push_model()
    raw = manifest()
    for reference in ("v1", f"sha256:{digest_of(raw)}"):
        url = f"/v2/library/x/manifests/{reference}"
        got, head = await site.http.get(url), await site.http.head(url)
        assert got.content == raw
        for reply in (got, head):
            assert reply.headers["docker-content-digest"] == f"sha256:{digest_of(raw)}"
            assert reply.headers["content-length"] == str(len(raw))
        assert head.content == b""
    assert (await site.http.get("/v2/library/x/tags/list")).json() == {"name": "library/x", "tags": ["v1"]}


async def test_a_blob_tells_its_length_and_where_its_ranges_are(site: Site) -> None:
    url = await site.push_model()
    head = await site.http.head(url)
    assert head.headers["content-length"] == str(len(DATA))
    whole = await site.http.get(url)
    assert (whole.status_code, whole.content) == (200, DATA)
    assert whole.headers["location"] == url
    assert whole.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        (f"bytes={CHUNK_BYTES - 2}-{CHUNK_BYTES + 1}", CHUNK_BYTES - 2, CHUNK_BYTES + 2),
        ("bytes=-7", len(DATA) - 7, len(DATA)),
        (f"bytes={CHUNK_BYTES}-", CHUNK_BYTES, len(DATA)),
    ],
)
async def test_a_range_is_exactly_its_bytes(site: Site, header: str, start: int, end: int) -> None:
    url = await site.push_model()
    reply = await site.http.get(url, headers={"range": header})
    assert (reply.status_code, reply.content) == (206, DATA[start:end])
    assert reply.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"


async def test_a_range_beyond_the_end_is_refused_and_one_of_another_version_ignored(site: Site) -> None:
    url = await site.push_model()
    beyond = await site.http.get(url, headers={"range": f"bytes={len(DATA)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(DATA)}")
    other = await site.http.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/library/x/manifests/latest", 404, "MANIFEST_UNKNOWN"),
        ("GET", f"/v2/library/x/manifests/sha256:{'ab' * 32}", 404, "MANIFEST_UNKNOWN"),
        ("GET", f"/v2/library/x/blobs/sha256:{'ab' * 32}", 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/library/x/blobs/latest", 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/library/x/blobs/sha256:12", 400, "BLOB_UPLOAD_INVALID"),
        ("GET", "/v2/a/b/c/manifests/latest", 404, "NAME_INVALID"),
        ("GET", "/v2/library/..%2Fx/manifests/latest", 404, "NAME_INVALID"),
        ("PUT", "/v2/library/x/manifests/latest", 400, "MANIFEST_INVALID"),
        ("PUT", f"/v2/library/x/manifests/sha256:{'ab' * 32}", 400, "BLOB_UPLOAD_INVALID"),
        ("PATCH", "/v2/library/x/blobs/uploads/none", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PUT", "/v2/library/x/blobs/uploads/none?digest=sha256:12", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("POST", "/v2/library/x/blobs/uploads/?digest=latest", 400, "BLOB_UPLOAD_INVALID"),
    ],
)
async def test_what_cannot_be_is_told_in_a_registrys_words(
    site: Site, method: str, path: str, status: int, code: str
) -> None:
    reply = await site.http.request(method, path)
    assert (reply.status_code, reply.json()["errors"][0]["code"]) == (status, code)


async def test_parts_with_a_range_may_come_again_and_must_be_what_they_say(site: Site) -> None:
    at = (await site.http.post("/v2/library/x/blobs/uploads/")).headers["location"]
    assert at.startswith("http://127.0.0.1:11434/v2/library/x/blobs/uploads/")
    for _ in range(2):
        reply = await site.http.patch(at, content=b"first", headers={"content-range": "0-4"})
        assert (reply.status_code, reply.headers["range"]) == (202, "0-4")
    for content, header in ((b"short", "5-20"), (b"longer than that", "5-7"), (b"x", "nonsense")):
        assert (await site.http.patch(at, content=content, headers={"content-range": header})).status_code == 400
    at = (await site.http.post("/v2/library/x/blobs/uploads/")).headers["location"]
    end = await site.http.put(f"{at}?digest=sha256:{digest_of(b'whole')}&etag=x-1", content=b"whole")
    assert end.status_code == 201
    mounted = await site.http.post(f"/v2/library/y/blobs/uploads/?mount=sha256:{digest_of(b'whole')}&from=library/x")
    assert mounted.status_code == 201


async def test_bytes_that_are_not_the_digest_are_refused(site: Site) -> None:
    reply = await site.http.post(f"/v2/library/x/blobs/uploads/?digest=sha256:{'ab' * 32}", content=b"x")
    assert (reply.status_code, reply.json()["errors"][0]["code"]) == (400, "DIGEST_INVALID")


@pytest.mark.parametrize("path", ["/v2/", "/v2/library/x/blobs/uploads/"])
async def test_a_page_of_another_origin_needs_the_token(path: str) -> None:
    await trio.lowlevel.checkpoint()
    policy = Policy(loopback=True, hostname="desk", token="secret")
    assert judge(Call(path, "127.0.0.1:11434", "http://localhost:3000", ""), policy) == "cross-origin"
    assert judge(Call(path, "127.0.0.1:11434", "http://localhost:3000", "Bearer secret"), policy) == "ok"
    assert judge(Call(path, "evil.example", None, ""), policy) == "host"
    assert judge(Call(path, "127.0.0.1:11434", None, ""), policy) == "ok"
