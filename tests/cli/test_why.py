"""The command why: the last prompt or a named one, as sentences and a table, or as JSON."""

import json
import re
from typing import Any

import pytest

from meshmax.api.request_words import request_json
from meshmax.cli.main import main
from tests.api.test_request_words import ROUTE
from tests.cli.conftest import FakePeer

SHOWN: dict[str, Any] = request_json(ROUTE)


def test_the_last_prompt_is_explained_without_an_id(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/requests", {"requests": [SHOWN, SHOWN | {"id": "older"}]})
    assert main(["why"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("request r1, ")
    assert "'m' was asked for" in lines[2]
    assert [re.split(r" {4,}", line) for line in lines[-2:]] == [
        ["PEER", "VERDICT", "EXPECTED", "WAY", "QUEUE", "LOADING", "PROMPT", "ANSWER", "WHY"],
        ["desk", "began, broke off", "2.00 s", "1 ms", "0.20 s", "-", "0.30 s", "1.50 s", "near"],
    ]


def test_a_named_prompt_is_asked_for_by_its_id(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/requests/a%2Fb%3F", SHOWN)
    assert main(["why", "a/b?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SHOWN


def test_who_was_asked_and_beaten_is_told_apart_from_who_was_not_asked(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = (SHOWN["candidates"][0] | {"verdict": "slower", "peer_id": peer} for peer in ("first", "other"))
    attempts = [SHOWN["attempts"][0] | {"peer_id": "first", "error": "cancelled"}]
    fake_peer.on(
        "GET", "/api/v1/requests", {"requests": [SHOWN | {"candidates": [first, other], "attempts": attempts}]}
    )
    assert main(["why"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert ["asked, and slower" in rows[0], "could have answered" in rows[1]] == [True, True]


def test_who_began_and_who_carried_on_are_told_apart(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    candidate = SHOWN["candidates"][0]
    began, went_on = (
        candidate | {"peer_id": "a", "verdict": "chosen"},
        candidate | {"peer_id": "b", "verdict": "slower"},
    )
    attempts = [
        {"peer_id": "a", "kind": "first", "tokens": 7, "error": "peer_gone"},
        {"peer_id": "b", "kind": "continuation", "tokens": 5, "error": ""},
    ]
    fake_peer.on(
        "GET", "/api/v1/requests", {"requests": [SHOWN | {"candidates": [began, went_on], "attempts": attempts}]}
    )
    assert main(["why"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert ["began, broke off" in rows[0], "carried it on" in rows[1]] == [True, True]


def test_names_of_others_cannot_write_to_the_terminal(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    evil = SHOWN | {"story": ["\x1b[31mred"], "candidates": [SHOWN["candidates"][0] | {"name": "\x1b[2Jx"}]}
    fake_peer.on("GET", "/api/v1/requests", {"requests": [evil]})
    assert main(["why"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_where_no_prompt_came_yet_that_is_said(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/requests", {"requests": []})
    assert main(["why"]) == 3
    error = capsys.readouterr().err
    assert "no prompt has come to this peer yet" in error
    assert "are known where they came" in error


def test_how_an_id_begins_is_enough_and_its_newest_try_is_told(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = [SHOWN | {"id": "ab12", "model": model} for model in ("newest", "older")]
    fake_peer.on("GET", "/api/v1/requests", {"requests": [SHOWN | {"id": "ac34"}, *tries]})
    assert main(["why", "ab", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tries[0]


def test_where_several_ids_begin_so_they_are_named(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("GET", "/api/v1/requests", {"requests": [SHOWN | {"id": f"ab{n}"} for n in range(6)]})
    assert main(["why", "ab"]) == 2
    said = capsys.readouterr().err
    assert "6 ids begin with 'ab': ab0, ab1, ab2, ab3 and 2 more; give more of the one that you mean" in said


def test_where_no_id_begins_so_the_peer_says_why(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"error": "no request 'x' is remembered here", "code": "not_found"}
    fake_peer.on("GET", "/api/v1/requests/x", said, 404)
    fake_peer.on("GET", "/api/v1/requests", {"requests": [SHOWN]})
    assert main(["why", "x"]) == 3
    assert said["error"] in capsys.readouterr().err
