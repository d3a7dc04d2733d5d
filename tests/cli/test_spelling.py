"""Names that nobody knows: which one was meant, and where that is told."""

import json
from typing import Any

import pytest

from meshmax.cli.main import main
from meshmax.cli.spelling import most_like
from tests.cli.conftest import FakePeer, Lines

KNOWN = ["smollm2:latest", "llama3.2:1b", "mistral:7b", "someone/Qwen2.5:latest", "smollm2@0123456789ab"]
TAGS = {"models": [{"name": "smollm2:latest"}, {"name": "mistral:7b", "remote_host": "attic"}]}


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("smolm2", "smollm2"),
        ("SmolLM", "smollm2"),
        ("smollm2:135m", "smollm2"),
        ("smolm2:latest", "smollm2"),
        ("llama3.2", "llama3.2:1b"),
        ("lama3.2", "llama3.2:1b"),
        ("llama", "llama3.2:1b"),
        ("mixtral", "mistral:7b"),
        ("someone/qwen2", "someone/Qwen2.5"),
        ("gemma", ""),
        ("x", ""),
        ("sm", ""),
        ("", ""),
    ],
)
def test_the_name_that_is_most_like_the_wanted_one_is_meant(wanted: str, meant: str) -> None:
    assert most_like(wanted, KNOWN) == meant


def test_a_name_is_not_like_itself_whatever_its_case() -> None:
    assert most_like("SmolLM2", KNOWN[:1]) == ""
    assert most_like("m", []) == ""


def test_a_name_in_thousands_of_names_is_compared_by_its_letters() -> None:
    assert most_like("modle-77", [f"model-{n}" for n in range(3000)]) == "model-77"


@pytest.mark.parametrize(
    ("command", "method", "path"),
    [
        (["show", "NAME"], "POST", "/api/show"),
        (["rm", "NAME"], "DELETE", "/api/delete"),
        (["cp", "NAME", "other"], "POST", "/api/copy"),
        (["load", "NAME"], "GET", "/api/v1/models/NAME"),
        (["stop", "NAME"], "GET", "/api/v1/models/NAME"),
        (["pin", "NAME"], "POST", "/api/v1/models/NAME/pin"),
        (["distribute", "NAME", "--replicas", "2"], "POST", "/api/v1/models/NAME/distribute"),
        (["run", "NAME", "hi"], "POST", "/api/show"),
        (["pull", "NAME"], "POST", "/api/pull"),
        (["pull", "NAME", "--detach"], "POST", "/api/v1/models/NAME/download"),
    ],
)
def test_each_command_asks_whether_a_name_like_it_was_meant(
    fake_peer: FakePeer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    method: str,
    path: str,
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    fake_peer.on("GET", "/api/tags", TAGS)

    def said(name: str) -> str:
        error: Any = {"error": f"model '{name}' not found", "code": "model_not_found"}
        if command[0] == "pull":
            error = {"error": f"pull model manifest: file does not exist: no peer has '{name}'", "code": "no_providers"}
        fake_peer.on(method, path.replace("NAME", name), Lines([error]) if path == "/api/pull" else error, 404)
        assert main([name if word == "NAME" else word for word in command]) == 3
        return capsys.readouterr().err

    assert "id you mean 'smollm2'?" in said("smolm2")
    assert "id you mean" not in said("gemma")
    only_here = command[0] in ("rm", "cp", "pin")
    assert ("id you mean 'mistral:7b'?" in said("mixtral")) is not only_here


def test_no_name_is_proposed_where_the_peer_says_more_or_cannot_list(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/tags", TAGS)
    fake_peer.on("POST", "/api/show", {"error": "model 'smolm2' not found here; attic has it"}, 404)
    assert main(["show", "smolm2"]) == 3
    assert capsys.readouterr().err == "Error: model 'smolm2' not found here; attic has it\n"
    fake_peer.on("GET", "/api/tags", {"error": "no token"}, 401)
    fake_peer.on("POST", "/api/show", {"error": "model 'smolm2' not found"}, 404)
    assert main(["show", "smolm2"]) == 3
    assert capsys.readouterr().err == "Error: model 'smolm2' not found\n"


@pytest.mark.parametrize("name", ["bad name!", "a/b/c/d", "smollm2@xyz"])
def test_a_name_that_no_model_can_have_says_what_is_accepted(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fake_peer.on("POST", "/api/show", {"error": f"model '{name}' not found"}, 404)
    assert main(["show", name, "--json"]) == 2
    told = json.loads(capsys.readouterr().err)
    assert told["code"] == "invalid_name"
    assert "hexadecimal" in told["error"] or "use [host/][namespace/]model[:tag]" in told["error"]
