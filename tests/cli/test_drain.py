"""The commands drain and undrain: what they ask, what a person reads while it lasts and in the end."""

import json
from typing import Any

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer

NODE = "12D3KooWdesk"
PATH = f"/api/v1/nodes/{NODE}"


def stands(status: str, running: int = 0, handed_over: int = 0) -> dict[str, Any]:
    left_s = 9.0 if status == "draining" else None
    return {"id": NODE, "status": status, "running": running, "left_s": left_s, "handed_over": handed_over}


@pytest.fixture
def here(fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> FakePeer:
    """A peer called desk that is drained after two looks."""
    fake_peer.on("GET", "/api/v1/status", {"node_id": NODE, "name": "desk"})
    fake_peer.on("GET", "/api/v1/nodes/desk", {"id": NODE, "name": "desk"})
    fake_peer.on("POST", f"{PATH}/drain", stands("draining", 2))
    fake_peer.on("GET", f"{PATH}/drain", stands("draining", 1))
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            fake_peer.on("GET", f"{PATH}/drain", stands("drained", 0, 1))

    monkeypatch.setattr("meshmax.cli.drain.time.sleep", pause)
    return fake_peer


def test_it_waits_says_what_still_runs_and_then_that_it_is_drained(
    here: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drain", "--deadline", "1m"]) == 0
    assert here.bodies(f"{PATH}/drain")[0] == {"deadline_s": 60.0}
    assert capsys.readouterr().out.splitlines() == [
        "desk takes no prompts; 2 answers may go on for 9 s, then other peers carry on what is not whole",
        "(`meshmax drain --deadline 0s` hands over at once; Ctrl-C leaves this command, and desk goes on draining)",
        "1 answer still running, 9 s left",
        "desk is drained: it takes no prompts, and 1 answer was handed over (`meshmax undrain` takes it back)",
    ]


def test_a_named_peer_is_drained_and_the_way_back_names_it(here: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "desk"]) == 0
    assert here.bodies(f"{PATH}/drain")[0] == {"deadline_s": 300.0}
    assert capsys.readouterr().out.splitlines()[-1].endswith("(`meshmax undrain desk` takes it back)")


def test_the_time_that_is_left_is_told_every_ten_seconds(
    here: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lefts = iter([245.0, 240.1, 240.0, 231.0, 230.0, 0.0])
    here.on("POST", f"{PATH}/drain", {**stands("draining", 1), "left_s": 250.0})

    def pause(_seconds: float) -> None:
        left_s = next(lefts)
        here.on("GET", f"{PATH}/drain", {**stands("draining" if left_s else "drained", 1), "left_s": left_s})

    monkeypatch.setattr("meshmax.cli.drain.time.sleep", pause)
    assert main(["drain"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("desk takes no prompts; 1 answer may go on for 4 min 10 s, then other peers carry on")
    assert told[2:-1] == ["1 answer still running, 4 min left", "1 answer still running, 3 min 50 s left"]


def test_a_terminal_shows_the_time_that_is_left_in_one_line(
    here: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["drain"]) == 0
    told = capsys.readouterr().out.split("\n")
    assert told[2].split("\r\x1b[K")[1:3] == ["2 answers still running, 9 s left", "1 answer still running, 9 s left"]
    assert told[2].split("\r\x1b[K")[3].startswith("desk is drained: ")


def test_who_hands_over_at_once_is_told_no_wait(here: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    here.on("POST", f"{PATH}/drain", {**stands("draining", 1), "left_s": 0.0})
    assert main(["drain", "--deadline", "0s"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "desk takes no prompts; 1 answer under way here: other peers carry on at once"
    )


def test_json_is_the_last_word_alone(here: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stands("drained", 0, 1)


def test_who_undrains_it_meanwhile_is_told(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/status", {"node_id": NODE, "name": "desk"})
    fake_peer.on("POST", f"{PATH}/drain", stands("running"))
    assert main(["drain"]) == 0
    assert capsys.readouterr().out == "desk was undrained meanwhile: it takes prompts again\n"


def test_interrupting_it_leaves_the_draining_going_on(
    here: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshmax.cli.drain.time.sleep", interrupted)
    assert main(["drain"]) == 130
    assert "the draining of desk goes on" in capsys.readouterr().err


@pytest.mark.parametrize("deadline", ["-1s", "25h", "soon"])
def test_what_is_no_deadline_is_refused(here: FakePeer, deadline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", f"--deadline={deadline}"]) == 2
    assert here.bodies(f"{PATH}/drain") == []


def test_a_deadline_below_zero_is_refused_by_a_sentence_however_it_is_written(
    here: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--deadline", "-5s"], ["--deadline=-5s"]):
        assert main(["drain", *arguments]) == 2
        assert capsys.readouterr().err == (
            "Error: the deadline must be between 0s (other peers carry on at once) and 24h, not -5s\n"
        )
    assert here.bodies(f"{PATH}/drain") == []


def test_undrain_takes_it_back(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/status", {"node_id": NODE, "name": "desk"})
    fake_peer.on("POST", f"{PATH}/undrain", stands("running"))
    assert main(["undrain"]) == 0
    assert capsys.readouterr().out == "desk takes prompts again\n"


def test_a_refusal_ends_with_its_sentence_and_exit_code(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/nodes/attic", {"id": "x", "name": "attic"})
    fake_peer.on("POST", "/api/v1/nodes/x/drain", {"error": "in the open mesh nobody does", "code": "refused"}, 403)
    assert main(["drain", "attic"]) == 5
    assert capsys.readouterr().err == "Error: in the open mesh nobody does\n"
