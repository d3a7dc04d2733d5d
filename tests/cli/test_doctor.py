"""`meshmax doctor`: what a person sees, exit codes, JSON, and what it does without a peer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer, Lines

PATH = "/api/v1/doctor?stream=true"


def finding(code: str, severity: str, sentence: str, advice: str = "") -> dict[str, str]:
    return {"code": code, "severity": severity, "sentence": sentence, "advice": advice}


def look(name: str, **report: Any) -> dict[str, Any]:
    full = {"name": name, "state": "working", "problem": "", "found": 2, "first_found_s": 0.25, "restarts": 0, **report}
    return {"report": full, "found_now": 1, "first_s": 0.12}


TOLD = {
    "peer_id": "12D3KooWB", "name": "box", "direction": "out", "why": "",
    "at": "/ip4/10.0.0.2/tcp/1", "address": "/ip4/10.0.0.1/tcp/2",
    "ours": [{"rung": "mdns", "addresses": [], "ago_s": 1.0}], "theirs": [], "their_rungs": ["mdns"],
    "clock_ahead_s": -10800.0, "uncertain_s": 0.1, "ports": [{"kind": "control", "port": 11435, "outcome": "silent"}],
}  # fmt: skip
RUNGS = [look("mdns"), {**look("dht", state="off", problem="not configured"), "found_now": 0, "first_s": None}]
BOOTSTRAP = [{"address": "/ip4/10.0.0.9/tcp/1", "problem": "", "source": "ticket"}]
WELL = [finding("peers_online", "ok", "1 peer is online: box")]
ILL = [finding("port_unreachable", "error", "TCP port 11435 cannot be reached", "let it in"), *WELL]


def diagnosis(findings: list[dict[str, str]]) -> dict[str, Any]:
    well = all(each["severity"] == "ok" for each in findings)
    peer = {
        "rungs": RUNGS,
        "bootstrap": BOOTSTRAP,
        "looked_back": [TOLD, {**TOLD, "name": "mute", "why": "it did not answer"}],
    }
    return {"well": well, "findings": findings, "facts": {"machine": {}, "peer": peer}, "took_s": 3.2}


def steps(findings: list[dict[str, str]]) -> Lines:
    return Lines([{"status": "climbing"}, {"status": "asking"}, {"status": "success", **diagnosis(findings)}])


def test_a_peer_in_good_health_ends_with_zero(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", PATH, steps(WELL))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "climbing ...\nasking ...\n"
    assert shown.out.splitlines()[-1] == "all is well (3.2 s)"


def test_findings_are_shown_with_what_to_do(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", PATH, steps(ILL))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert rows[0] == ["RUNG", "STATE", "FOUND", "FIRST", "NOW", "PROBLEM"]
    assert rows[1] == ["mdns", "working", "2", "0.25", "s", "1", "in", "0.12", "s"]
    assert rows[2] == ["dht", "off", "-", "-", "-", "not", "configured"]
    assert ["/ip4/10.0.0.9/tcp/1", "ticket", "-"] in rows
    assert any(line.startswith("box") and "-10800 s" in line and "control 11435 silent" in line for line in lines)
    assert any(line.startswith("mute") and "it did not answer" in line for line in lines)
    assert "FAIL  TCP port 11435 cannot be reached" in lines
    assert "      -> let it in" in lines
    assert lines[-1] == "1 thing to look at (3.2 s)"


def test_a_problem_is_told_once_as_a_finding_or_else_in_its_rung_row(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    ill = diagnosis([finding("mdns_failing", "warning", "mDNS does not work: no route")])
    failing = [look("mdns", state="failing", problem="no route"), look("dht", state="failing", problem="no node")]
    ill["facts"]["peer"]["rungs"] = failing
    fake_peer.on("GET", PATH, Lines([{"status": "success", **ill}]))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("mdns") and lines[1].endswith("see below")
    assert lines[2].startswith("dht") and lines[2].endswith("no node")


def test_what_a_relay_keeps_from_being_tried_and_what_a_failing_rung_repeats_is_not_shown(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = diagnosis(WELL)
    shown["facts"]["peer"]["rungs"] = [look("rendezvous", state="failing", problem="no node")]
    untried = [{"kind": "control", "port": 11435, "outcome": "not_tried"}]
    over_relay = {**TOLD, "address": "", "at": "", "ports": untried, "relayed_s": 60.0}
    shown["facts"]["peer"]["looked_back"] = [over_relay, {**TOLD, "name": "near", "ports": untried}]
    fake_peer.on("GET", PATH, Lines([{"status": "success", **shown}]))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not_tried" not in out
    assert [line.split() for line in out.splitlines()][1] == [
        "rendezvous",
        "failing",
        "2",
        "0.25",
        "s",
        "-",
        "no",
        "node",
    ]
    (box,) = [line for line in out.splitlines() if line.startswith("box ")]
    assert box.endswith("not tried (relay)")
    (near,) = [line for line in out.splitlines() if line.startswith("near ")]
    assert near.endswith(" -")


def test_json_is_the_diagnosis_alone(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", PATH, steps(ILL))
    assert main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out) == diagnosis(ILL)


def test_a_peers_words_cannot_write_to_the_terminal(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", PATH, steps([finding("refused", "warning", "\x1b[2Jbad", "\x1b]0;x\x07do")]))
    assert main(["doctor"]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_an_answer_that_stops_in_the_middle_is_an_error(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", PATH, Lines([{"status": "climbing"}]))
    assert main(["doctor"]) == 4
    assert "ask again" in capsys.readouterr().err


def test_a_peer_that_knows_no_doctor_is_said_to_be_old(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) not in (0, 1)
    assert "older than `meshmax doctor`: update it" in capsys.readouterr().err


def test_without_a_peer_the_machine_alone_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("MESHMAX_API", "MESHMAX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--json", "--home", str(tmp_path / "none")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert "no_peer_running" in {each["code"] for each in told["findings"]}
    assert told["facts"]["peer"] is None
    assert not (tmp_path / "none").exists()


def test_a_peer_that_was_named_and_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MESHMAX_API", raising=False)
    assert main(["doctor", "--api", "127.0.0.1:1"]) == 4
    assert "no meshmax peer is running" in capsys.readouterr().err
