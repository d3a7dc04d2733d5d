"""Real peers as processes on loopback: they meet by mDNS, share models and prompts, and outlive each other's deaths."""

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, start_peer, until

pytestmark = pytest.mark.loopback

BIG_BYTES = 192 << 20  # some seconds over libp2p, so that there is a middle to kill something in
CHUNK = 1 << 20


def add_model(peer: PeerProcess, folder: Path, name: str = "big", size: int = BIG_BYTES) -> None:
    path = folder / f"{name}.gguf"
    path.write_bytes(build_gguf(tensor_bytes=size))
    peer.run("add", name, str(path))


def lists(peer: PeerProcess, name: str) -> bool:
    return any(model["name"] == f"{name}:latest" for model in peer.get("/api/tags")["models"])


def has_locally(peer: PeerProcess, name: str) -> bool:
    return bool(peer.get("/api/v1/models")["models"].get(f"{name}:latest", {}).get("local"))


def transfer(peer: PeerProcess) -> dict[str, Any]:
    transfers = peer.get("/api/v1/transfers")["transfers"]
    return dict(transfers[0]) if transfers else {}


class Pull:
    """`POST /api/pull` in a thread; ``lines`` are its NDJSON objects so far."""

    def __init__(self, peer: PeerProcess, name: str) -> None:
        self.lines: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run, args=(peer.api, name), daemon=True)
        self._thread.start()

    def _run(self, api: str, name: str) -> None:
        try:
            with httpx.stream("POST", api + "/api/pull", json={"model": name}, timeout=120, trust_env=False) as reply:
                self.lines.extend(json.loads(line) for line in reply.iter_lines())
        except httpx.TransportError:
            pass

    def join(self) -> dict[str, Any]:
        """The last line."""
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.lines[-1] if self.lines else {}


def fetched_bytes(peer: PeerProcess) -> int:
    return sum(source["bytes"] for source in transfer(peer)["peers"].values())


def in_the_middle(peer: PeerProcess) -> bool:
    now = transfer(peer)
    return bool(now) and now["bytes_done"] > 0.2 * now["bytes_total"] > 0


def test_five_peers_find_each_other_by_mdns_and_a_model_of_one_is_everybodys(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b", "c", "d", "e") as (a, *others):
        meet(a, *others)
        add_model(a, tmp_path, "tiny", 1 << 16)
        for peer in others:
            until("the model is listed", partial(lists, peer, "tiny"))
            reply = httpx.post(
                peer.api + "/api/generate",
                json={"model": "tiny", "prompt": "one two", "stream": False},
                trust_env=False,
            )
            assert reply.status_code == 200
            assert reply.headers["x-meshmax-peer"] == a.peer_id
            assert "one two" in reply.json()["response"]


def test_a_pull_comes_from_every_holder_and_the_puller_serves_on(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b", "c") as (a, b, c):
        meet(a, b, c)
        add_model(a, tmp_path)
        until("b sees it", lambda: lists(b, "big"))
        b.run("pull", "big")
        until("both hold it", lambda: len(c.get("/api/v1/models")["models"]["big:latest"]["holders"]) == 2)
        c.run("pull", "big")
        sources = transfer(c)["peers"]
        assert {peer for peer, source in sources.items() if source["bytes"] > 0} == {a.peer_id, b.peer_id}
        assert has_locally(c, "big")


def test_a_puller_killed_in_the_middle_fetches_only_what_is_missing(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        add_model(a, tmp_path)
        until("b sees it", lambda: lists(b, "big"))
        Pull(b, "big")
        until("half way", lambda: in_the_middle(b))
        before = transfer(b)["bytes_done"]
        b.kill()
        again = start_peer(b.home)
        try:
            meet(a, again)
            until("it sees the model", lambda: lists(again, "big"))
            again.run("pull", "big")
            # At most the chunks in flight, and what was written in the second before the kill, come again.
            assert fetched_bytes(again) <= BIG_BYTES - before + 24 * CHUNK
            assert fetched_bytes(again) < BIG_BYTES
            assert has_locally(again, "big")
        finally:
            again.stop()


def test_a_source_killed_in_the_middle_is_replaced_by_the_other(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b", "c") as (a, b, c):
        meet(a, b, c)
        add_model(a, tmp_path)
        until("b sees it", lambda: lists(b, "big"))
        b.run("pull", "big")
        until("both hold it", lambda: len(c.get("/api/v1/models")["models"]["big:latest"]["holders"]) == 2)
        pull = Pull(c, "big")
        until("half way", lambda: in_the_middle(c))
        a.kill()
        assert pull.join() == {"status": "success"}
        assert has_locally(c, "big")


def test_a_pull_whose_only_source_was_killed_goes_on_when_it_is_back(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        add_model(a, tmp_path)
        until("b sees it", lambda: lists(b, "big"))
        pull = Pull(b, "big")
        until("half way", lambda: in_the_middle(b))
        a.kill()
        again = start_peer(a.home)
        try:
            assert pull.join() == {"status": "success"}
        finally:
            again.stop()


def test_a_corrupted_blob_is_not_served_and_the_pull_completes_from_another_peer(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b", "c") as (a, b, c):
        meet(a, b, c)
        add_model(a, tmp_path, size=24 << 20)
        until("b sees it", lambda: lists(b, "big"))
        b.run("pull", "big")
        blob = max((a.home / "models" / "blobs").iterdir(), key=lambda path: path.stat().st_size)
        with blob.open("r+b") as file:
            for chunk in range(0, 24, 2):
                file.seek(chunk * CHUNK + 12_345)
                file.write(b"rotten")
        until("both hold it", lambda: len(c.get("/api/v1/models")["models"]["big:latest"]["holders"]) == 2)
        c.run("pull", "big")
        good = max((b.home / "models" / "blobs").iterdir(), key=lambda path: path.stat().st_size)
        assert (c.home / "models" / "blobs" / good.name).read_bytes() == good.read_bytes()


def test_a_peer_killed_before_its_first_token_is_replaced_unseen_and_after_it_another_goes_on(tmp_path: Path) -> None:
    # Slow enough that there is a middle of an answer.
    with peers(tmp_path, "a", "b", "c", engine_echo_tokens_per_s="20") as (a, b, c):
        meet(a, b, c)
        add_model(a, tmp_path, "tiny", 1 << 16)
        until("b sees it", lambda: lists(b, "tiny"))
        b.run("pull", "tiny")
        until("both hold it", lambda: len(c.get("/api/v1/models")["models"]["tiny:latest"]["holders"]) == 2)
        by_id = {a.peer_id: a, b.peer_id: b}
        prompt = {"model": "tiny", "prompt": " ".join(map(str, range(200)))}
        with httpx.stream("POST", c.api + "/api/generate", json=prompt, timeout=60, trust_env=False) as reply:
            lines = reply.iter_lines()
            first = json.loads(next(lines))
            by_id.pop(reply.headers["x-meshmax-peer"]).kill()
            rest = [json.loads(line) for line in lines]
        (left,) = by_id
        assert rest[-1]["meshmax"] == {"peer": left, "continued": True}
        assert rest[-1]["done"] is True
        assert "".join(line["response"] for line in (first, *rest)) == prompt["prompt"]
        assert c.get("/health")["status"] in ("healthy", "degraded")
        again = httpx.post(c.api + "/api/generate", json=prompt | {"stream": False}, timeout=60, trust_env=False)
        assert again.status_code == 200
        assert again.headers["x-meshmax-peer"] == left


def test_a_client_that_goes_away_stops_the_work_on_the_serving_peer(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b", engine_echo_tokens_per_s="20") as (a, b):
        meet(a, b)
        add_model(a, tmp_path, "tiny", 1 << 16)
        until("b sees it", lambda: lists(b, "tiny"))
        prompt = {"model": "tiny", "prompt": " ".join(map(str, range(2000)))}
        with httpx.stream("POST", b.api + "/api/generate", json=prompt, timeout=60, trust_env=False) as reply:
            lines = reply.iter_lines()  # kept: a dropped iterator closes the stream
            next(lines)
            until("a works", lambda: a.get("/api/v1/nodes")["nodes"][a.peer_id]["load"]["running"] == 1)
        until("a stopped", lambda: a.get("/api/v1/nodes")["nodes"][a.peer_id]["load"]["running"] == 0, deadline_s=30)


def test_a_frozen_peer_is_noticed_within_ten_seconds_and_met_again_when_it_thaws(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        frozen_id = b.peer_id
        began = time.monotonic()
        b.freeze()
        until("a sees that b is gone", lambda: frozen_id not in a.neighbours(), deadline_s=60)
        assert time.monotonic() - began <= 30
        b.thaw()
        meet(a, b)


def test_a_model_that_nobody_has_is_said_so_in_ollamas_words(tmp_path: Path) -> None:
    with peers(tmp_path, "a") as (a,):
        reply = httpx.post(a.api + "/api/generate", json={"model": "nope", "prompt": "x"}, trust_env=False)
        assert reply.status_code == 404
        assert reply.json() == {"error": "model 'nope' not found", "code": "not_found"}
        done = a.run("pull", "nope", check=False)
        assert done.returncode == 3
        assert "file does not exist" in done.stderr
