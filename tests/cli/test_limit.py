from __future__ import annotations

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer

LIMITS = {"up": 10_000_000, "down": 0, "peer_up": 0, "peer_down": 500_000}
SET = {"up": 10_000_000, "down": None, "peer_up": None, "peer_down": None}


def test_limit_shows_what_holds_and_why(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    assert main(["limit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["out,", "in", "all", "10", "MB/s", "command"],
        ["in,", "in", "all", "none", "configuration"],
        ["out,", "to", "each", "peer", "none", "configuration"],
        ["in,", "from", "each", "peer", "500", "KB/s", "configuration"],
    ]


def test_what_is_not_named_stays_as_it_was_set(fake_peer: FakePeer) -> None:
    fake_peer.on("GET", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    fake_peer.on("PUT", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    assert main(["limit", "--down", "2MB/s"]) == 0
    assert fake_peer.bodies("/api/v1/limits")[-1] == {**SET, "down": 2_000_000}


def test_reset_goes_back_to_the_configuration(fake_peer: FakePeer) -> None:
    fake_peer.on("GET", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    fake_peer.on("PUT", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    assert main(["limit", "--reset", "--up", "off"]) == 0
    assert fake_peer.bodies("/api/v1/limits")[-1] == {"up": 0}


def test_what_is_no_rate_is_refused_before_anything_is_asked(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["limit", "--up", "fast"]) == 2
    assert "10MB/s" in capsys.readouterr().err
    assert fake_peer.asked == []


@pytest.mark.parametrize("word", ["none", "off", "None"])
def test_the_word_that_is_shown_for_no_limit_is_taken_as_well(fake_peer: FakePeer, word: str) -> None:
    fake_peer.on("GET", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    fake_peer.on("PUT", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    assert main(["limit", "--up", word]) == 0
    assert fake_peer.bodies("/api/v1/limits")[-1] == {**SET, "up": 0}


def test_help_says_what_reset_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limit", "--help"]) == 0
    assert "Forget what was set by command" in " ".join(capsys.readouterr().out.split())


def test_that_0_is_no_limit_is_said_since_it_may_be_meant_otherwise(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    fake_peer.on("PUT", "/api/v1/limits", {"limits": LIMITS, "set": SET})
    assert main(["limit", "--down", "0", "--peer-up", "0/s"]) == 0
    assert fake_peer.bodies("/api/v1/limits")[-1] == {**SET, "down": 0, "peer_up": 0}
    said = capsys.readouterr()
    assert said.err == (
        "0 is no limit, as --down none --peer-up none says more plainly; `meshmax transfers pause` halts a pull\n"
    )
    assert main(["limit", "--down", "none", "--up", "10MB/s"]) == 0
    assert capsys.readouterr().err == ""
