"""The command load: what it asks of the peer, what it says, how it ends."""

import json
import re

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer

DIGEST = "6a" * 32


HERE = {"digest": DIGEST, "size": 5, "size_vram": 0, "expires_at": "2026-01-01T00:05:00Z"}


@pytest.fixture
def here(fake_peer: FakePeer) -> FakePeer:
    fake_peer.on("GET", "/api/v1/models/tiny", {"digest": DIGEST})
    fake_peer.on("GET", "/api/ps", {"models": []})
    fake_peer.on("POST", "/api/generate", {"done": True, "done_reason": "load"})
    return fake_peer


def test_it_loads_without_a_prompt_and_says_how_long_it_took(
    here: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "tiny", "--keep-alive", "30m"]) == 0
    assert here.bodies("/api/generate") == [{"model": "tiny", "stream": False, "keep_alive": "30m"}]
    assert re.fullmatch(r"'tiny' loaded in \d+\.\d s\n", capsys.readouterr().out)


def test_json_tells_where_and_until_when(here: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    here.on("GET", "/api/ps", {"models": [HERE]})
    assert main(["load", "tiny", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["loaded"]
    assert told.pop("took_s") >= 0
    facts = {key: HERE[key] for key in ("size", "size_vram", "expires_at")}
    assert told == {"model": "tiny", "peer": "", "was_loaded": True, **facts}


def test_one_that_was_there_and_one_that_another_peer_loads_are_told_so(
    here: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    here.on("POST", "/api/generate", {"done": True, "done_reason": "load", "remote_host": "attic"})
    assert main(["load", "tiny"]) == 0
    here.on("POST", "/api/generate", {"done": True, "done_reason": "load"})
    here.on("GET", "/api/ps", {"models": [HERE]})
    assert main(["load", "tiny"]) == 0
    there, already = capsys.readouterr().out.splitlines()
    assert there.endswith(" s on attic")
    assert already == "'tiny' was loaded already"


def test_what_does_not_fit_ends_with_the_peers_sentence(here: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    here.on("POST", "/api/generate", {"error": "the model needs about 9 GB", "code": "engine_unavailable"}, 503)
    assert main(["load", "tiny"]) != 0
    assert capsys.readouterr().err == "Error: the model needs about 9 GB\n"


def test_a_keep_alive_that_is_no_duration_is_refused_before_anything_is_asked(here: FakePeer) -> None:
    assert main(["load", "tiny", "--keep-alive", "soon"]) != 0
    assert here.asked == []


def test_an_unknown_model_ends_with_3(here: FakePeer) -> None:
    here.on("GET", "/api/v1/models/x", {"error": "model 'x' not found"}, 404)
    assert main(["load", "x"]) == 3
