"""Bundles between real peers that are killed while they write and read them, and a mirror rule at work."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import httpx
import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, start_peer, until

pytestmark = pytest.mark.loopback

SIZE = 256 << 20
DEATHS = 3


def model_file(path: Path, size: int = SIZE) -> Path:
    header = build_gguf(tensor_bytes=size)[:-size]
    with path.open("wb") as file:
        file.write(header)
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    return path


def begin(peer: PeerProcess, path: str, body: dict[str, object], kill_after_s: float) -> bool:
    """Ask for it and kill the peer meanwhile; True if it was done before."""
    began_s = time.monotonic()
    try:
        with httpx.stream("POST", peer.api + path, json=body, timeout=60, trust_env=False) as reply:
            for line in reply.iter_lines():
                if json.loads(line)["status"] == "success":
                    return True
                if time.monotonic() - began_s > kill_after_s:
                    peer.kill()
                    return False
    except httpx.TransportError:
        pass
    peer.kill()
    return False


def test_peers_that_are_killed_again_and_again_export_and_import_all_the_same(tmp_path: Path) -> None:
    chance = random.Random(7)
    file = model_file(tmp_path / "big.gguf")
    stick = tmp_path / "stick"
    export: dict[str, object] = {"models": ["big"], "to": str(stick), "split": "50MB"}
    site_a = start_peer(tmp_path / "a", "--no-lan")
    site_b = start_peer(tmp_path / "b", "--no-lan")
    try:
        site_a.run("add", "big", str(file), "--link")
        for _ in range(DEATHS):
            if begin(site_a, "/api/v1/models/export", export, chance.random() * 0.5):
                break
            site_a = start_peer(tmp_path / "a", "--no-lan")
        site_a.run("export", "big", "--to", str(stick), "--split", "50MB")
        assert len(list(stick.iterdir())) == len(list(stick.glob("*-of-*.meshmax"))) >= 6
        for _ in range(DEATHS):
            if begin(site_b, "/api/v1/models/import", {"paths": [str(stick)]}, chance.random() * 0.5):
                break
            site_b = start_peer(tmp_path / "b", "--no-lan")
        site_b.run("import", str(stick))
        listed = site_b.get("/api/v1/have")
        assert listed["models"] == site_a.get("/api/v1/have")["models"]
        assert site_b.run("fsck").returncode == 0
    finally:
        site_a.stop()
        site_b.stop()


def test_a_mirror_rule_brings_what_the_other_site_adds(tmp_path: Path) -> None:
    home = tmp_path / "b"
    home.mkdir()
    (home / "meshmax.yaml").write_text('mirror: [{models: "small*", from: a}]\n')
    with peers(tmp_path, "a", "b") as (site_a, site_b):
        meet(site_a, site_b)
        site_a.run("add", "small", str(model_file(tmp_path / "small.gguf", 4 << 20)))
        site_a.run("add", "other", str(model_file(tmp_path / "other.gguf", 4 << 20)))

        def names() -> bool:
            return [model["name"] for model in site_b.get("/api/v1/have")["models"]] == ["small:latest"]

        until("the mirrored model is here", names, 60)
        (transfer,) = site_b.get("/api/v1/transfers")["transfers"]
        assert (transfer["model"], transfer["state"]) == ("small:latest", "done")
