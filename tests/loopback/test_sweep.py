"""Real peers sweep: two at once leave one copy, kill -9 costs neither pin nor model, a budget is kept."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, start_peer, until

pytestmark = pytest.mark.loopback

SIZE = 3 << 20


def add(peer: PeerProcess, folder: Path, *names: str) -> None:
    """Add models, each another one, that nobody else on this machine has; last used an hour ago."""
    for name in names:
        path = folder / f"{name}.gguf"
        if not path.exists():
            path.write_bytes(build_gguf({"general.name": f"{name}-{secrets.token_hex(8)}"}, tensor_bytes=SIZE))
        peer.run("add", name, str(path))
    peer.stop()
    long_ago = time.time() - 3600
    for manifest in (peer.home / "models" / "manifests").glob("*/*/*/*"):
        os.utime(manifest, (long_ago, long_ago))


def local(peer: PeerProcess) -> set[str]:
    models = peer.get("/api/v1/models")["models"]
    return {name.removesuffix(":latest") for name, model in models.items() if model["local"]}


def holders(peer: PeerProcess, name: str) -> int:
    return len(peer.get(f"/api/v1/models/{name}")["holders"])


def shared(peer: PeerProcess, name: str) -> bool:
    """Whether it knows two that have it."""
    return holders(peer, name) == 2


def sweep(peer: PeerProcess, *words: str) -> subprocess.CompletedProcess[str]:
    return peer.run("sweep", "--json", *words, check=False)


def both(folder: Path, *names: str) -> list[Path]:
    """Two homes that hold the same models."""
    with peers(folder, "one", "two") as made:
        for peer in made:
            add(peer, folder, *names)
        return [peer.home for peer in made]


def test_two_peers_that_sweep_at_the_same_moment_leave_one_copy_of_each_model(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(6)]
    both(tmp_path, *names)
    with peers(tmp_path, "one", "two") as (one, two):
        meet(one, two)
        for peer in (one, two):
            for name in names:
                until("both are known as holders", partial(shared, peer, name))
        threads = [threading.Thread(target=sweep, args=(peer, "--free", "1GB")) for peer in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert local(one) | local(two) == set(names)
        assert not local(one) & local(two)


def test_a_peer_that_is_killed_in_the_middle_of_its_sweep_loses_no_pin_and_no_last_copy(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(6)]
    both(tmp_path, *names, "pinned")
    with peers(tmp_path, "one", "two") as (one, two):
        meet(one, two)
        one.run("pin", "pinned")
        for name in names:
            until("both are known as holders", partial(shared, one, name))
        began = threading.Thread(target=sweep, args=(one, "--free", "1GB"))
        began.start()
        until("the sweep is under way", lambda: len(local(one)) < 7, every_s=0.001)
        one.kill()
        began.join(60)
        again = start_peer(tmp_path / "one", "--name", "one")
        try:
            assert local(again) | local(two) == {*names, "pinned"}
            listed: list[dict[str, Any]] = json.loads(again.run("list", "--json").stdout)["models"]
            assert {model["name"] for model in listed if model["pinned"]} == {"pinned:latest"}
            meet(again, two)
            until("holders are known", lambda: holders(again, "pinned") == 2)
            report = json.loads(sweep(again, "--free", "1GB").stdout)
            reasons = {tuple(model["names"]): model["reason"] for model in report["models"]}
            assert reasons["pinned:latest",] == "it is pinned"
            assert local(again) | local(two) == {*names, "pinned"}
        finally:
            again.stop()


def test_a_peer_keeps_its_budget_when_it_pulls(tmp_path: Path) -> None:
    both(tmp_path, "old", "new")
    with peers(tmp_path, "three") as (three,):
        add(three, tmp_path, "wanted")
    with peers(tmp_path, "three", "two") as (three, two), peers(tmp_path, "one", disk_budget="8MB") as (one,):
        meet(one, two, three)
        until("the models are known", lambda: holders(one, "old") == 2 and holders(one, "wanted") == 1)
        dry = json.loads(sweep(one, "--dry-run").stdout)
        assert dry["disk_budget_bytes"] == 8_000_000
        one.run("pull", "wanted")
        assert "wanted" in local(one)
        assert len(local(one)) == 2
        assert local(two) == {"old", "new"}
