"""The commands pin, unpin and sweep."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer

DIGEST = "ab" * 32
ANSWER: dict[str, Any] = {
    "dry_run": False,
    "disk_budget_bytes": 200_000_000_000,
    "keep_free_bytes": 5_000_000_000,
    "used_bytes": 210_000_000_000,
    "free_bytes": 40_000_000_000,
    "needed_bytes": 10_000_000_000,
    "freed_bytes": 12_000_000_000,
    "lacking_bytes": 0,
    "models": [
        {
            "digest": DIGEST,
            "size": 12_000_000_000,
            "action": "goes",
            "reason": "used longest ago",
            "freed_bytes": 12_000_000_000,
            "names": ["old:latest", "older:latest"],
            "last_used": "2020-01-01T00:00:00Z",
            "holders": 2,
        }
    ],
    "partials": [
        {
            "digest": "cd" * 32,
            "size": 5_000_000,
            "action": "stays",
            "reason": "a pull needs it",
            "freed_bytes": 0,
            "touched": "2020-01-01T00:00:00Z",
        }
    ],
}


def test_models_are_pinned_one_after_the_other(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    for path, name in (("/api/v1/models/llama3/pin", "llama3:latest"), ("/api/v1/models/a/b:c/pin", "a/b:c")):
        fake_peer.on("POST", path, {"name": name, "digest": DIGEST, "pinned": True})
    assert main(["pin", "llama3", "a/b:c"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"'llama3:latest' is pinned to {DIGEST[:12]}",
        f"'a/b:c' is pinned to {DIGEST[:12]}",
    ]


def test_unpin_tells_what_it_did_as_json_too(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"name": "m:latest", "digest": DIGEST, "pinned": False}
    fake_peer.on("POST", "/api/v1/models/m/unpin", answer)
    assert main(["unpin", "m"]) == 0
    assert capsys.readouterr().out == "'m:latest' is not pinned\n"
    assert main(["unpin", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": [answer]}


def test_a_name_that_is_none_asks_nobody(fake_peer: FakePeer) -> None:
    assert main(["pin", "good", "../etc/passwd"]) == 2
    assert fake_peer.asked == []


def test_sweep_shows_what_went_what_stays_and_why(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/sweep", ANSWER)
    assert main(["sweep", "--free", "10GB", "--last-copies"]) == 0
    assert fake_peer.bodies("/api/v1/sweep") == [{"dry_run": False, "free": 10**10, "last_copies": True}]
    header, model, partial, _, summary = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert header.split() == ["NAME", "ID", "SIZE", "LAST", "USED", "WHAT", "WHY"]
    assert model.startswith("old:latest, older:latest")
    assert model.endswith("used longest ago")
    assert partial.startswith("(partial)")
    assert summary == "12 GB freed (210 GB used, 40 GB free, budget 200 GB, 5 GB to stay free)"


def test_a_dry_run_says_would(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/v1/sweep", {**ANSWER, "dry_run": True, "disk_budget_bytes": None, "keep_free_bytes": 0})
    assert main(["sweep", "--dry-run"]) == 0
    assert "12 GB would be freed (210 GB used, 40 GB free)" in capsys.readouterr().out


def test_a_sweep_that_could_not_free_enough_fails_after_its_table(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/v1/sweep", {**ANSWER, "lacking_bytes": 3_000_000_000})
    assert main(["sweep"]) == 7
    shown = capsys.readouterr()
    assert "old:latest" in shown.out
    assert "3 GB more are needed" in shown.err


def test_what_is_no_size_is_refused_before_anything_is_asked(fake_peer: FakePeer) -> None:
    assert main(["sweep", "--free", "lots"]) == 2
    assert fake_peer.asked == []


def test_list_as_json_tells_what_is_pinned(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    tags = [{"name": "a:latest", "pinned": True}, {"name": "b:latest"}]
    fake_peer.on("GET", "/api/tags", {"models": tags})
    assert main(["list", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["pinned"] for model in models] == [True, False]
