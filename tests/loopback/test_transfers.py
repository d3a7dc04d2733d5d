"""Transfers on real peers: downloads that outlive kill -9 and a full disk, steering, and having others download."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshmax.base.units import MIB
from meshmax.testing.process import PeerProcess, meet, peers, start_peer, until
from tests.loopback.test_mesh import CHUNK, add_model, has_locally, lists

pytestmark = pytest.mark.loopback

BIG_BYTES = 160 * MIB
# Other peers on this machine are on the same LAN: nobody else must have, or mean, our models.
BIG, SMALL = f"big-{os.getpid()}", f"small-{os.getpid()}"
OWN_BYTES = os.getpid() * 64


def shown(peer: PeerProcess, transfer_id: str) -> dict[str, Any]:
    return dict(peer.get(f"/api/v1/transfers/{transfer_id}"))


def state_is(peer: PeerProcess, transfer_id: str, *states: str) -> bool:
    return shown(peer, transfer_id)["state"] in states


def slowly(peer: PeerProcess, rate: str = "20MB/s") -> None:
    """Let it give slowly, so that there is a middle."""
    peer.run("limit", "--up", rate)


def detach(peer: PeerProcess, name: str) -> str:
    return str(json.loads(peer.run("pull", name, "--detach", "--json").stdout)["transfer_id"])


def test_a_download_goes_on_after_kill_9_and_fetches_only_what_is_missing(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        add_model(a, tmp_path, BIG, BIG_BYTES + OWN_BYTES)
        until("it is listed", partial(lists, b, BIG))
        slowly(a)
        transfer_id = detach(b, BIG)
        until("some of it is there", lambda: shown(b, transfer_id)["bytes_done"] > BIG_BYTES // 5)
        before = shown(b, transfer_id)["bytes_done"]
        b.kill()
        again = start_peer(b.home)
        try:
            until("it goes on", lambda: state_is(again, transfer_id, "running", "done"), 60)
            until("it is done", lambda: state_is(again, transfer_id, "done"), 60)
            assert has_locally(again, BIG)
            last = shown(again, transfer_id)
            fetched = sum(source["bytes"] for source in last["peers"].values())
            assert fetched <= last["bytes_total"] - before + 64 * CHUNK
            out = [each for each in a.get("/api/v1/transfers")["transfers"] if each["direction"] == "out"]
            assert sum(each["bytes_done"] for each in out) >= last["bytes_total"]
            assert out[0]["model"] == f"{BIG}:latest"
        finally:
            again.stop()


def test_a_download_waits_while_its_only_source_is_away_and_can_be_paused_and_cancelled(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b") as (a, b):
        meet(a, b)
        add_model(a, tmp_path, BIG, BIG_BYTES + OWN_BYTES)
        until("it is listed", partial(lists, b, BIG))
        slowly(a)
        transfer_id = detach(b, BIG)
        until("some of it is there", lambda: shown(b, transfer_id)["bytes_done"] > BIG_BYTES // 10)
        b.run("transfers", "pause", transfer_id)
        assert state_is(b, transfer_id, "paused")
        a.kill()
        b.run("transfers", "resume", transfer_id)
        until("it waits", lambda: state_is(b, transfer_id, "waiting"), 60)
        assert "no peer that can be reached" in b.run("transfers").stdout
        again = start_peer(a.home)
        try:
            until("it is done", lambda: state_is(b, transfer_id, "done"), 60)
        finally:
            again.stop()


def test_a_model_is_distributed_by_command(tmp_path: Path) -> None:
    with peers(tmp_path, "a", "b", "c") as (a, b, c):
        meet(a, b, c)
        add_model(a, tmp_path, SMALL, 4 * MIB + OWN_BYTES)
        said = a.run("distribute", SMALL, "--to", b.peer_id, c.peer_id).stdout
        assert said.count("downloads it as") == 2
        for peer in (b, c):
            until("it is there", partial(has_locally, peer, SMALL))
        assert "have it already" in a.run("distribute", SMALL, "--replicas", "3").stdout


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_halts_a_download_which_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 96 * MIB) as disk, peers(tmp_path, "a") as (a,):
        add_model(a, tmp_path, BIG, 64 * MIB + OWN_BYTES)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(60 * MIB))
        b = start_peer(tmp_path / "b", models=str(disk / "models"))
        try:
            meet(a, b)
            until("it is listed", partial(lists, b, BIG))
            transfer_id = detach(b, BIG)
            until("it waits", lambda: state_is(b, transfer_id, "waiting"), 60)
            assert "free" in shown(b, transfer_id)["reason"] or "full" in shown(b, transfer_id)["reason"]
            ballast.unlink()
            until("it is done", lambda: state_is(b, transfer_id, "done"), 60)
            assert has_locally(b, BIG)
        finally:
            b.stop()
