"""Both sides of the registry protocol as other programs speak it, for the loopback tier: nothing of it is meshmax's own.

`OllamaClient` does what Ollama's puller and pusher do, request by request, and is as strict where they are.
`SlowRegistry` serves blobs at a rate, counts what it sends, and can be stopped and started at its port.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"


def sha256(data: bytes) -> str:
    """As registries write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class OllamaClient:
    """A registry's client at ``base``; ``part_bytes`` is the size of ranges and of uploaded parts."""

    def __init__(self, base: str, part_bytes: int = 4 << 20) -> None:
        self.base = base.rstrip("/")
        self.part_bytes = part_bytes
        self.http = httpx.Client(timeout=60, trust_env=False, follow_redirects=False)

    def pull(self, name: str, tag: str = "latest") -> tuple[bytes, dict[str, bytes]]:
        """The manifest's bytes and every blob, each checked."""
        reply = self.http.get(f"{self.base}/v2/{name}/manifests/{tag}", headers={"accept": MANIFEST_TYPE})
        reply.raise_for_status()
        manifest = json.loads(reply.content)
        layers = [*manifest["layers"], manifest["config"]]
        return reply.content, {layer["digest"]: self.blob(name, layer["digest"]) for layer in layers}

    def blob(self, name: str, digest: str) -> bytes:
        """One blob: its length, its direct address, its parts side by side, its digest."""
        url = f"{self.base}/v2/{name}/blobs/{digest}"
        head = self.http.head(url)
        head.raise_for_status()
        size = int(head.headers["content-length"])
        direct = self.direct(url)
        starts = range(0, size, self.part_bytes)
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(lambda start: self.part(direct, start, min(start + self.part_bytes, size)), starts))
        data = b"".join(parts)
        assert sha256(data) == digest, "digest mismatch, file must be downloaded again"
        return data

    def direct(self, url: str) -> str:
        """Where the ranges are: of an answer without a range that is 200 or 307, whose body is not read."""
        with self.http.stream("GET", url) as reply:
            assert reply.status_code in (200, 307), reply.status_code
            assert "location" in reply.headers, "http: no Location header in response"
            return str(reply.url.join(reply.headers["location"]))

    def part(self, url: str, start: int, end: int) -> bytes:
        """One range."""
        reply = self.http.get(url, headers={"range": f"bytes={start}-{end - 1}"})
        assert reply.status_code == 206, reply.status_code
        assert len(reply.content) == end - start
        return reply.content

    def push(self, name: str, layers: list[tuple[str, bytes]], config: bytes, tag: str = "latest") -> bytes:
        """Every blob that is not there, then the manifest, whose bytes are returned."""
        for _, data in [*layers, ("config", config)]:
            self.push_blob(name, data)
        raw = manifest_of(layers, config)
        url = f"{self.base}/v2/{name}/manifests/{tag}"
        self.http.put(url, content=raw, headers={"content-type": MANIFEST_TYPE}).raise_for_status()
        return raw

    def push_blob(self, name: str, data: bytes) -> bool:
        """One blob in parts, one after the other at the address that the last answer gave; False if it was there."""
        digest = sha256(data)
        if self.http.head(f"{self.base}/v2/{name}/blobs/{digest}").status_code == 200:
            return False
        at = self._next(self.http.post(f"{self.base}/v2/{name}/blobs/uploads/"), 202)
        sums = hashlib.md5()
        count = 0
        for start in range(0, len(data), self.part_bytes):
            part = data[start : start + self.part_bytes]
            headers = {
                "content-type": "application/octet-stream",
                "content-range": f"{start}-{start + len(part) - 1}",
                "x-redirect-uploads": "1",
            }
            at = self._next(self.http.patch(at, content=part, headers=headers), 202)
            sums.update(hashlib.md5(part).digest())
            count += 1
        done = self.http.put(
            httpx.URL(at).copy_merge_params({"digest": digest, "etag": f"{sums.hexdigest()}-{count}"}),
            headers={"content-type": "application/octet-stream", "content-length": "0"},
        )
        assert done.status_code == 201, done.text
        return True

    def _next(self, reply: httpx.Response, status: int) -> str:
        assert reply.status_code == status, reply.text
        at = reply.headers.get("docker-upload-location") or reply.headers["location"]
        assert urlsplit(at).scheme, "the address is not absolute, which Ollama's client cannot follow"
        return str(at)


def manifest_of(layers: list[tuple[str, bytes]], config: bytes) -> bytes:
    """A manifest as Ollama writes it."""
    word = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": sha256(config),
            "size": len(config),
        },
        "layers": [{"mediaType": kind, "digest": sha256(data), "size": len(data)} for kind, data in layers],
    }
    return json.dumps(word, separators=(",", ":")).encode()


class SlowRegistry:
    """One model, ``name``:latest, served at ``rate_bytes_per_s`` a connection (0: as fast as it goes)."""

    def __init__(self, name: str, layers: list[tuple[str, bytes]], config: bytes, rate_bytes_per_s: int = 0) -> None:
        self.manifest = manifest_of(layers, config)
        self.content = {f"/v2/{name}/manifests/latest": self.manifest}
        for data in [*(data for _, data in layers), config]:
            self.content[f"/v2/{name}/blobs/{sha256(data)}"] = data
        self.rate_bytes_per_s = rate_bytes_per_s
        self.sent = 0  # bytes of blobs
        self.port = 0
        self.broken: Callable[[], bool] = lambda: False  # asked before each piece: whether the connection breaks now

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator[SlowRegistry]:
        """Serve while inside; every connection breaks at the end. The port stays the same."""
        ended = threading.Event()

        class OneHandler(_Answers):
            registry = self
            over = ended

        server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), OneHandler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            server.shutdown()
            server.server_close()
            thread.join(10)


class _Answers(http.server.BaseHTTPRequestHandler):
    registry: ClassVar[Any]
    over: ClassVar[threading.Event]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        data = self.registry.content.get(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        start, end = (int(span[1]), int(span[2]) + 1) if span else (0, len(data))
        self.send_response(206 if span else 200)
        if span:
            self.send_header("content-range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("content-length", str(end - start))
        self.end_headers()
        self._send(data[start:end], "/blobs/" in self.path)

    def _send(self, data: bytes, counted: bool) -> None:
        registry = self.registry
        rate = registry.rate_bytes_per_s
        step = max(1, rate // 50) if rate else 1 << 16
        for at in range(0, len(data), step):
            if self.over.is_set() or registry.broken():
                self.close_connection = True
                self.connection.close()
                return
            part = data[at : at + step]
            try:
                self.wfile.write(part)
            except OSError:
                self.close_connection = True
                return
            if counted:
                registry.sent += len(part)
            if rate:
                time.sleep(len(part) / rate)

    def log_message(self, *args: Any) -> None:
        """Nothing."""
