"""A peer that answers what a test says, over real HTTP on loopback, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakePeer:
    """``answers``: (method, path) to (status, body): a dict or list for JSON, a list of dicts wrapped in `Lines` for NDJSON."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: dict[str, str] = {}
        self.sent: list[dict[str, str]] = []  # headers of what was asked, their names in small letters

    def on(self, method: str, path: str, body: Any = None, status: int = 200) -> None:
        self.answers[method, path] = (status, body)

    def bodies(self, path: str) -> list[Any]:
        return [body for _, asked, body in self.asked if asked == path]


class Lines(list[dict[str, Any]]):
    """An NDJSON body."""


def _encoded(body: Any) -> bytes:
    if body is None:
        return b""
    if isinstance(body, bytes):
        return body
    if isinstance(body, Lines):
        return b"".join(json.dumps(line).encode() + b"\n" for line in body)
    return json.dumps(body).encode()


def _handler(peer: FakePeer) -> type[BaseHTTPRequestHandler]:
    class Answering(BaseHTTPRequestHandler):
        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked = json.loads(raw) if raw else None
            if self.path == "/api/v1/version":  # every command looks first whether somebody answers
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            peer.asked.append((self.command, self.path, asked))
            peer.sent.append({name.lower(): value for name, value in self.headers.items()})
            status, body = peer.answers.get((self.command, self.path), (404, {"error": "no such route"}))
            if isinstance(body, Lines) and (asked or {}).get("stream") is False:
                body = body[-1]
            encoded = _encoded(body)
            self.send_response(status)
            for name, value in {**peer.headers, "content-length": str(len(encoded))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(encoded)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    return Answering


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePeer]:
    for name in ("MESHMAX_API", "MESHMAX_HOME", "MESHMAX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    peer = FakePeer("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(peer))
    peer.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("MESHMAX_API", peer.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield peer
    server.shutdown()
    thread.join()
    server.server_close()
