"""Registries both ways on real sockets: from upstream into a peer, through a peer out of the mesh, and pushed into it."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, start_peer, until
from meshmax.testing.registry_peer import MANIFEST_TYPE, OllamaClient, SlowRegistry, manifest_of, sha256

pytestmark = pytest.mark.loopback

MODEL = "application/vnd.ollama.image.model"
GGUF = build_gguf(tensor_bytes=12 << 20)
CONFIG = json.dumps({"model_format": "gguf", "model_family": "llama", "model_type": "1M"}).encode()
LICENSE = ("application/vnd.ollama.image.license", b"MIT")
LAYERS = [(MODEL, GGUF), LICENSE]
BIG = random.Random(3).randbytes(48 << 20)
BIG_GGUF = build_gguf(tensor_bytes=64 << 20)
PULL = [sys.executable, "-m", "meshmax.cli.main", "pull"]


def local(peer: PeerProcess) -> dict[str, str]:
    """Names and digests of what is whole here."""
    models = peer.get("/api/v1/models")["models"]
    return {name: entry["digest"] for name, entry in models.items() if entry["local"]}


def add(peer: PeerProcess, folder: Path, name: str = "small", data: bytes = GGUF) -> None:
    path = folder / f"{name}.gguf"
    path.write_bytes(data)
    peer.run("add", name, str(path))


@contextmanager
def one(folder: Path, name: str = "one", offline: str = "true", upstreams: str = "") -> Iterator[PeerProcess]:
    peer = start_peer(folder / name, "--name", name, "--no-lan", offline=offline, upstreams=upstreams)
    try:
        yield peer
    finally:
        peer.stop()


@contextmanager
def docker_registry(folder: Path) -> Iterator[str]:
    """Debian's docker-registry on a port of its own: its URL."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (Debian: apt-get install docker-registry)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until(
            "docker-registry answers", lambda: httpx.get(f"{url}/v2/", timeout=60, trust_env=False).status_code == 200
        )
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(params=["meshmax", "docker-registry"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A registry: ours, and one that everybody agrees is one."""
    if request.param == "meshmax":
        with one(tmp_path) as peer:
            yield peer.api
    else:
        with docker_registry(tmp_path) as url:
            yield url


ClientOf = Callable[[str], OllamaClient]


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Clients of registries by URL, closed afterwards."""
    with ExitStack() as stack:

        def make(base: str) -> OllamaClient:
            client = OllamaClient(base)
            stack.enter_context(client.http)
            return client

        yield make


# --- what every registry does ----------------------------------------------------------------------------------------


def test_what_was_pushed_is_pulled_byte_for_byte(registry: str, client_of: ClientOf) -> None:
    client = client_of(registry)
    raw = client.push("library/pushed", LAYERS, CONFIG)
    for reference in ("latest", sha256(raw)):
        url = f"{registry}/v2/library/pushed/manifests/{reference}"
        reply = client.http.get(url, headers={"accept": MANIFEST_TYPE})
        assert reply.content == raw
        assert reply.headers["docker-content-digest"] == sha256(raw)
        assert reply.headers["content-type"] == MANIFEST_TYPE
    for _, data in LAYERS:
        url = f"{registry}/v2/library/pushed/blobs/{sha256(data)}"
        assert client.http.get(url).content == data
        assert client.http.head(url).headers["content-length"] == str(len(data))
        assert client.part(url, 1, min(len(data), 3_000_000)) == data[1:3_000_000]
    assert not client.push_blob("library/pushed", GGUF)
    assert client.http.get(f"{registry}/v2/library/pushed/tags/list").json() == {
        "name": "library/pushed",
        "tags": ["latest"],
    }


def test_every_registry_refuses_the_same_things(registry: str, client_of: ClientOf) -> None:
    client = client_of(registry)
    http, base = client.http, f"{registry}/v2/library/x"
    assert http.get(f"{registry}/v2/").status_code == 200
    assert http.get(f"{base}/manifests/latest").status_code == 404
    assert http.head(f"{base}/blobs/{sha256(b'nothing')}").status_code == 404
    at = http.post(f"{base}/blobs/uploads/").headers["location"]
    wrong = http.put(httpx.URL(at).copy_merge_params({"digest": sha256(b"other")}), content=b"these")
    assert wrong.status_code == 400
    assert wrong.json()["errors"][0]["code"] == "DIGEST_INVALID"
    assert http.patch(f"{base}/blobs/uploads/{'0' * 32}", content=b"x").status_code == 404
    raw = b'{"schemaVersion":2}'
    headers = {"content-type": MANIFEST_TYPE}
    assert http.put(f"{base}/manifests/latest", content=raw, headers=headers).status_code in (400, 502)
    client.push_blob("library/x", b"only the config")
    lacking = manifest_of([(MODEL, b"never pushed")], b"only the config")
    assert http.put(f"{base}/manifests/latest", content=lacking, headers=headers).status_code in (400, 404, 502)
    assert http.get(f"{base}/manifests/latest").status_code == 404


def test_an_upload_can_come_whole_in_parts_without_a_range_or_be_cancelled(registry: str, client_of: ClientOf) -> None:
    client = client_of(registry)
    base = f"{registry}/v2/library/x/blobs"
    one_go = client.http.post(f"{base}/uploads/")
    whole = client.http.put(
        httpx.URL(one_go.headers["location"]).copy_merge_params({"digest": sha256(b"whole")}), content=b"whole"
    )
    assert whole.status_code == 201
    at = client.http.post(f"{base}/uploads/").headers["location"]
    for part in (b"first ", b"second"):
        reply = client.http.patch(at, content=part)
        assert reply.status_code == 202
        at = reply.headers["location"]
    assert client.http.get(at).status_code == 204
    end = httpx.URL(at).copy_merge_params({"digest": sha256(b"first second")})
    assert client.http.put(end).status_code == 201
    assert client.http.get(f"{base}/{sha256(b'first second')}").content == b"first second"
    at = client.http.post(f"{base}/uploads/").headers["location"]
    assert client.http.delete(at).status_code == 204
    assert client.http.patch(at, content=b"x").status_code == 404


# --- upstream --------------------------------------------------------------------------------------------------------


def test_a_peer_pulls_from_every_registry_and_becomes_a_provider(
    registry: str, tmp_path: Path, client_of: ClientOf
) -> None:
    raw = client_of(registry).push("library/far", LAYERS, CONFIG)
    with peers(tmp_path, "first", "second", offline="false", upstreams=registry) as (first, second):
        meet(first, second)
        lines = first.run("pull", "far").stdout
        assert "success" in lines
        assert local(first) == {"far:latest": sha256(raw).removeprefix("sha256:")}
        (transfer,) = first.get("/api/v1/transfers")["transfers"]
        assert transfer["peers"][registry]["bytes"] == len(GGUF) + len(CONFIG) + 3
        until("the second hears of it", lambda: "far:latest" in second.get("/api/v1/models")["models"])
        second.run("pull", "far")
        gave = second.get("/api/v1/transfers")["transfers"][0]["peers"]
        assert first.peer_id in gave
        assert registry not in gave


def test_a_name_that_is_nowhere_fails_soon_and_says_who_was_asked(tmp_path: Path) -> None:
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"http://127.0.0.1:{dead.getsockname()[1]}"
        with one(tmp_path, offline="false", upstreams=url) as peer:
            began = time.monotonic()
            failed = peer.run("pull", "nothing", check=False)
            assert time.monotonic() - began < 60
    assert failed.returncode == 3
    assert "pull model manifest: file does not exist" in failed.stderr
    assert url.removeprefix("http://") in failed.stderr


def test_offline_asks_nobody(tmp_path: Path) -> None:
    registry = SlowRegistry("library/far", LAYERS, CONFIG)
    with registry.serving(), one(tmp_path, offline="true", upstreams=registry.url) as peer:
        failed = peer.run("pull", "far", check=False)
        assert "--offline" in failed.stderr
    assert registry.sent == 0


def test_a_pull_that_is_killed_loses_the_last_second_only(tmp_path: Path) -> None:
    registry = SlowRegistry("library/big", [(MODEL, BIG)], CONFIG, rate_bytes_per_s=1 << 20)
    chance = random.Random(8)
    with registry.serving():
        for _ in range(3):
            with one(tmp_path, offline="false", upstreams=registry.url) as peer:
                command = [*PULL, "big"]
                env = {**os.environ, "MESHMAX_HOME": str(peer.home)}
                with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as pull:
                    before = registry.sent
                    until("it is under way", lambda before=before: registry.sent > before)  # type: ignore[misc]
                    time.sleep(chance.uniform(1.2, 2.5))
                    peer.kill()
                    pull.wait(20)
        with one(tmp_path, offline="false", upstreams=registry.url) as peer:
            peer.run("pull", "big")
            assert "big:latest" in local(peer)
    # Each kill costs what was not synced within a second, and what was on its way: 8 connections of 1 MiB/s.
    assert registry.sent < len(BIG) + 3 * (20 << 20)


def test_a_registry_that_goes_away_and_comes_back_is_taken_up(tmp_path: Path) -> None:
    registry = SlowRegistry("library/big", [(MODEL, BIG)], CONFIG, rate_bytes_per_s=2 << 20)
    with one(tmp_path, offline="false") as unused:
        assert unused.get("/api/version")
    with registry.serving():
        peer = start_peer(tmp_path / "two", "--no-lan", offline="false", upstreams=registry.url)
        started = peer.get("/api/v1/models")
        assert started["models"] == {}
    try:
        with registry.serving():
            reply = httpx.post(f"{peer.api}/api/v1/models/big/download", json={}, timeout=60, trust_env=False)
            assert reply.status_code == 202, reply.text
            until("some of it came", lambda: registry.sent > 8 << 20)
        time.sleep(2)
        with registry.serving():
            until("it is here", lambda: "big:latest" in local(peer), 60)
    finally:
        peer.stop()
    assert registry.sent < len(BIG) + (16 << 20)


# --- out of the mesh -------------------------------------------------------------------------------------------------


def test_a_stock_client_pulls_through_a_peer_what_another_peer_has(tmp_path: Path, client_of: ClientOf) -> None:
    with peers(tmp_path, "has", "asks") as (has, asks):
        meet(has, asks)
        add(has, tmp_path, "wide", BIG_GGUF)
        until("it is known", lambda: "wide:latest" in asks.get("/api/v1/models")["models"])
        raw, blobs = client_of(asks.api).pull("library/wide")
        assert BIG_GGUF in blobs.values()
        assert sha256(raw).removeprefix("sha256:") == local(has)["wide:latest"]
        until("it is here too", lambda: "wide:latest" in local(asks))
        (transfer,) = asks.get("/api/v1/transfers")["transfers"]
        assert has.peer_id in transfer["peers"]


def test_a_client_that_goes_away_ends_the_pull(tmp_path: Path, client_of: ClientOf) -> None:
    registry = SlowRegistry("library/big", [(MODEL, BIG)], CONFIG, rate_bytes_per_s=128 << 10)  # 1 MiB/s in all
    with registry.serving(), one(tmp_path, offline="false", upstreams=registry.url) as peer:
        http = client_of(peer.api).http
        manifest = http.get(f"{peer.api}/v2/library/big/manifests/latest").json()
        url = f"{peer.api}/v2/library/big/blobs/{manifest['layers'][0]['digest']}"
        assert int(http.head(url).headers["content-length"]) == len(BIG)
        assert _states(peer) == []  # a question is no pull
        with http.stream("GET", url, headers={"range": "bytes=0-40000000"}) as reply:
            assert reply.status_code == 206
            until("the pull begins", lambda: _states(peer) == ["running"])
            assert http.get(url.replace("blobs", "nothing")).status_code == 404
        until("the pull ends", lambda: _states(peer) == ["cancelled"])
        sent = registry.sent
        time.sleep(1)
        assert registry.sent - sent < 1 << 20


def _states(peer: PeerProcess) -> list[str]:
    return [transfer["state"] for transfer in peer.get("/api/v1/transfers")["transfers"]]


def test_a_stock_client_pulls_through_a_peer_what_only_upstream_has(tmp_path: Path, client_of: ClientOf) -> None:
    registry = SlowRegistry("library/far", LAYERS, CONFIG)
    with registry.serving(), one(tmp_path, offline="false", upstreams=registry.url) as peer:
        raw, blobs = client_of(peer.api).pull("library/far")
        assert raw == registry.manifest
        assert GGUF in blobs.values()
        until("it is here too", lambda: "far:latest" in local(peer))
        client_of(peer.api).pull("library/far")
    assert registry.sent == len(GGUF) + len(CONFIG) + 3


def test_a_pushed_model_is_in_the_mesh_at_once(tmp_path: Path, client_of: ClientOf) -> None:
    with peers(tmp_path, "takes", "pulls") as (takes, pulls):
        meet(takes, pulls)
        raw = client_of(takes.api).push("someone/pushed", LAYERS, CONFIG, "v1")
        digest = sha256(raw).removeprefix("sha256:")
        assert local(takes) == {"someone/pushed:v1": digest}
        until("the other hears of it", lambda: "someone/pushed:v1" in pulls.get("/api/v1/models")["models"])
        pulls.run("pull", "someone/pushed:v1")
        assert local(pulls) == {"someone/pushed:v1": digest}
        shown = takes.get("/api/tags")["models"][0]
        assert shown["digest"] == digest


def test_what_a_crash_left_of_a_push_is_swept(tmp_path: Path, client_of: ClientOf) -> None:
    with one(tmp_path) as peer:
        http = client_of(peer.api).http
        at = http.post(f"{peer.api}/v2/library/x/blobs/uploads/").headers["location"]
        assert http.patch(at, content=bytes(3 << 20)).status_code == 202
        partials = peer.home / "state" / "partials"
        assert len(list(partials.iterdir())) == 1
        peer.kill()
    with one(tmp_path):
        assert list(partials.iterdir()) == []


@pytest.mark.parametrize("path", ["/v2/", "/v2/library/x/manifests/latest"])
def test_no_page_and_no_name_of_a_stranger_reaches_the_registry(tmp_path: Path, path: str, client_of: ClientOf) -> None:
    with one(tmp_path) as peer:
        http = client_of(peer.api).http
        assert http.get(peer.api + path, headers={"host": "evil.example"}).status_code == 403
        assert http.get(peer.api + path, headers={"origin": "https://evil.example"}).status_code == 403
        uploads = f"{peer.api}/v2/library/x/blobs/uploads/"
        assert http.post(uploads, headers={"origin": "http://localhost:3000"}).status_code == 403
        assert http.post(uploads, headers={"origin": "https://evil.example"}).status_code == 403
        assert http.post(uploads).status_code == 202


def test_a_client_that_reads_slowly_costs_the_others_nothing(tmp_path: Path, client_of: ClientOf) -> None:
    with one(tmp_path) as peer:
        add(peer, tmp_path, "wide", BIG_GGUF)
        client = client_of(peer.api)
        digest: Any = client.http.get(f"{peer.api}/v2/library/wide/manifests/latest").json()["layers"][0]["digest"]
        url = f"{peer.api}/v2/library/wide/blobs/{digest}"
        with client.http.stream("GET", url) as idle:
            assert idle.status_code == 200
            began = time.monotonic()
            assert client.blob("library/wide", digest) == BIG_GGUF
            assert time.monotonic() - began < 60


def test_a_body_that_cannot_be_sent_to_its_end_is_broken_off(tmp_path: Path, client_of: ClientOf) -> None:
    with one(tmp_path) as peer:
        add(peer, tmp_path)
        http = client_of(peer.api).http
        digest = http.get(f"{peer.api}/v2/library/small/manifests/latest").json()["layers"][0]["digest"]
        with (peer.home / "models" / "blobs" / digest.replace(":", "-")).open("r+b") as file:
            file.seek(5 << 20)
            file.write(b"rotten")
        url = f"{peer.api}/v2/library/small/blobs/{digest}"
        with pytest.raises(httpx.RemoteProtocolError):
            http.get(url, headers={"range": "bytes=0-9000000"})
        assert http.get(f"{peer.api}/v2/").status_code == 200


def test_headers_come_before_the_bytes_and_many_clients_share_one_pull(tmp_path: Path, client_of: ClientOf) -> None:
    registry = SlowRegistry("library/big", [(MODEL, BIG)], CONFIG, rate_bytes_per_s=1 << 20)
    with registry.serving(), one(tmp_path, offline="false", upstreams=registry.url) as peer:
        clients = [client_of(peer.api) for _ in range(3)]
        http = clients[0].http
        manifest = http.get(f"{peer.api}/v2/library/big/manifests/latest").json()
        url = f"{peer.api}/v2/library/big/blobs/{manifest['layers'][0]['digest']}"
        clients[0].direct(url)
        assert registry.sent < len(BIG)
        with ThreadPoolExecutor(3) as pool:
            pulled = list(pool.map(lambda client: client.pull("library/big"), clients))
        assert all(BIG in blobs.values() for _, blobs in pulled)
        until("the pull is done", lambda: _states(peer) == ["done"])  # the disk may take longer than the clients
    assert registry.sent < len(BIG) + (
        16 << 20
    )  # once, and what was on its way when ranges were cut for another connection
