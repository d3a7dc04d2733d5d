"""The commands transfers and distribute, and pull --detach."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshmax.cli import transfers
from meshmax.cli.main import main
from tests.cli.conftest import FakePeer

PULLING: dict[str, Any] = {
    "id": "ab12-1",
    "model": "llama3:latest",
    "direction": "in",
    "state": "running",
    "phase": "pulling ab12",
    "reason": "",
    "bytes_total": 4_000_000_000,
    "bytes_done": 1_000_000_000,
    "bytes_wasted": 0,
    "rate_bytes_per_s": 100_000_000.0,
    "eta_s": 30.2,
    "peers": {
        "a": {"bytes": 9, "rate_bytes_per_s": 5.0, "lanes": 2, "wants": 3},
        "b": {"bytes": 1, "lanes": 0, "wants": 0},
    },
}
WAITING = PULLING | {
    "id": "cd-2",
    "state": "waiting",
    "reason": "no peer has it\x1b[31m",
    "rate_bytes_per_s": 0.0,
    "eta_s": None,
    "peers": {},
}
SENDING = PULLING | {"id": "out-ab-1", "direction": "out", "bytes_total": 5_000_000, "bytes_done": 5_000_000}
DONE = PULLING | {"id": "ef-3", "state": "done", "rate_bytes_per_s": 0.0, "eta_s": None}


def test_transfers_are_a_table_with_the_reasons_below(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/transfers", {"transfers": [PULLING, WAITING, SENDING, DONE]})
    assert main(["transfers"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "ID          MODEL            STATE      DONE           RATE        ETA    SOURCES",
        "ab12-1      llama3:latest    running    1 GB / 4 GB    100 MB/s    30s    1",
        "cd-2        llama3:latest    waiting    1 GB / 4 GB    -           -      0",
        "out-ab-1    llama3:latest    sending    5 MB           100 MB/s    -      to 2",
        "ef-3        llama3:latest    done       1 GB / 4 GB    -           -      2",
        "",
        "cd-2: no peer has it[31m",
    ]


def test_what_bounds_a_transfer_is_told_below(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/transfers", {"transfers": [PULLING | {"note": "over a relay, slowly"}]})
    assert main(["transfers"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ab12-1: over a relay, slowly"


def test_few_ended_ones_are_shown_and_json_has_all(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"transfers": [DONE | {"id": f"x-{n}"} for n in range(30)]}
    fake_peer.on("GET", "/api/v1/transfers", answer)
    assert main(["transfers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
    assert main(["transfers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer


def test_watching_shows_them_again_until_it_is_interrupted(
    fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/transfers", {"transfers": [PULLING]})
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("meshmax.cli.transfers.time.sleep", pause)
    assert main(["transfers", "--watch"]) == 130
    assert capsys.readouterr().out.count("ab12-1") == 3
    pauses.clear()
    assert main(["transfers", "--watch", "--json"]) == 130
    assert [json.loads(line)["transfers"][0]["id"] for line in capsys.readouterr().out.splitlines()] == ["ab12-1"] * 3


@pytest.mark.parametrize(("verb", "state"), [("cancel", "cancelled"), ("pause", "paused"), ("resume", "running")])
def test_a_transfer_is_steered(fake_peer: FakePeer, verb: str, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", f"/api/v1/transfers/ab12-1/{verb}", {"id": "ab12-1", "state": state})
    assert main(["transfers", verb, "ab12-1"]) == 0
    assert capsys.readouterr().out == f"ab12-1 is {state}\n"
    assert main(["transfers", verb, "ab12-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "ab12-1", "state": state}


def test_steering_what_is_not_there_ends_with_the_code_of_its_cause(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/v1/transfers/x-9/cancel", {"error": "no transfer 'x-9'", "code": "not_found"}, 404)
    assert main(["transfers", "cancel", "x-9"]) == 3
    assert main(["transfers", "cancel", "../x"]) == 2
    assert "is no transfer's id" in capsys.readouterr().err
    assert len(fake_peer.asked) == 1


def test_peers_are_asked_to_download(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = {"error": "no", "code": "refused"}
    fake_peer.on(
        "POST", "/api/v1/models/llama3/distribute", {"transfer_ids": {"P1": "ab-1"}, "refused": {"P2": refusal}}, 202
    )
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": {"P1": {"name": "attic"}, "P2": {"name": ""}}})
    assert main(["distribute", "llama3", "--to", "attic", "P2"]) == 0
    assert capsys.readouterr().out == "attic downloads it as ab-1\nP2 refused: no\n"
    assert main(["distribute", "llama3", "--replicas", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"] == {"P2": refusal}
    assert fake_peer.bodies("/api/v1/models/llama3/distribute") == [{"nodes": ["attic", "P2"]}, {"replicas": 3}]


@pytest.mark.parametrize("words", [[], ["--to", "a", "--replicas", "2"]])
def test_a_distribution_says_whom_or_how_many(
    fake_peer: FakePeer, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distribute", "llama3", *words]) == 2
    assert "either --to PEER... or --replicas N" in capsys.readouterr().err
    assert fake_peer.asked == []


def test_enough_replicas_are_said_so(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/models/llama3/distribute", {"transfer_ids": {}}, 202)
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": {}})
    assert main(["distribute", "llama3", "--replicas", "2"]) == 0
    assert capsys.readouterr().out == "2 peers have it already\n"


def test_a_detached_pull_returns_at_once(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/models/hf.co/a/b:c/download", {"transfer_id": "ab-1"}, 202)
    assert main(["pull", "hf.co/a/b:c", "--detach"]) == 0
    assert "downloading 'hf.co/a/b:c' as ab-1" in capsys.readouterr().out
    assert main(["pull", "hf.co/a/b:c", "--detach", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"transfer_id": "ab-1"}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.4, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (4800, "1h20m"), (1e9, "-")],
)
def test_remaining_time_is_short(seconds: float | None, shown: str) -> None:
    assert transfers.show_eta(seconds) == shown
