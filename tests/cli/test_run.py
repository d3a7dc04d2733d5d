from __future__ import annotations

import io
import json

import pytest

from meshmax.cli.main import main
from tests.cli.conftest import FakePeer, Lines

ANSWER = Lines(
    [
        {"model": "m", "response": "Par", "done": False},
        {"model": "m", "response": "is.", "done": False},
        {"model": "m", "response": "", "done": True, "done_reason": "stop", "eval_count": 2, "eval_duration": 10**9},
    ]
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def peer(fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> FakePeer:
    monkeypatch.setattr("sys.stdin", Terminal())
    fake_peer.on("POST", "/api/show", {"capabilities": ["completion"]})
    fake_peer.on("POST", "/api/generate", ANSWER)
    fake_peer.headers = {"X-Meshmax-Peer": "12D3KooW", "X-Meshmax-Route": "the only holder"}
    return fake_peer


def test_a_prompt_is_answered_once(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "capital", "of", "France?"]) == 0
    assert capsys.readouterr() == ("Paris.\n", "")
    assert peer.bodies("/api/generate") == [{"model": "m", "prompt": "capital of France?"}]


def test_a_prompt_that_is_not_urgent_says_so_and_one_may_name_a_policy(peer: FakePeer) -> None:
    assert main(["run", "m", "--batch", "--policy", "least-loaded", "hello"]) == 0
    assert (peer.sent[-1]["x-meshmax-priority"], peer.sent[-1]["x-meshmax-policy"]) == ("batch", "least-loaded")
    assert main(["run", "m", "hello"]) == 0
    assert not any(name.startswith("x-meshmax") for name in peer.sent[-1])


def test_piped_text_stands_before_the_prompt(
    peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("some text"))
    assert main(["run", "m", "summarise"]) == 0
    assert peer.bodies("/api/generate")[0]["prompt"] == "some text summarise"


def test_piped_text_alone_is_the_prompt(
    peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(["run", "m"]) == 0
    assert peer.bodies("/api/generate")[0]["prompt"] == "hello"


def test_nothing_piped_and_no_prompt_is_an_error(
    peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["run", "m"]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_the_flags_become_fields_of_the_request(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "hi", "--format", "json", "--keepalive", "1h", "--think", "--verbose"]) == 0
    assert peer.bodies("/api/generate") == [
        {"model": "m", "prompt": "hi", "format": "json", "keep_alive": "1h", "think": True}
    ]
    assert "eval rate:            2.00 tokens/s\nanswered by:          12D3KooW\n" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "sent"), [("--think=false", False), ("--think=high", "high"), ("--think", True)])
def test_think_takes_a_value_or_none(peer: FakePeer, given: str, sent: object) -> None:
    assert main(["run", "m", "hi", given]) == 0
    assert peer.bodies("/api/generate")[0]["think"] == sent


def test_a_wrong_duration_is_refused_before_anybody_is_asked(
    peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "m", "hi", "--keepalive", "soon"]) == 2
    assert 'write it like "5m"' in capsys.readouterr().err
    assert peer.asked == []


def test_as_json_the_whole_answer_says_who_gave_it(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/generate", {"model": "m", "response": "Paris.", "done": True})
    assert main(["run", "m", "hi", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["response"] == "Paris."
    assert answer["meshmax"] == {"peer": "12D3KooW", "route": "the only holder"}
    moved = {"peer": "12D3Other", "continued": True}
    peer.on("POST", "/api/generate", {"model": "m", "response": "Paris.", "done": True, "meshmax": moved})
    assert main(["run", "m", "hi", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["meshmax"]
    assert told == answer["meshmax"] | {"continued_by": "12D3Other", "exact": True}


def test_an_unknown_model_says_what_to_do(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/show", {"error": "model 'x' not found"}, 404)
    assert main(["run", "x", "hi"]) == 3
    assert "`meshmax add x FILE.gguf` adds one" in capsys.readouterr().err


def test_with_pull_the_model_comes_first(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/pull", Lines([{"status": "success"}]))
    assert main(["run", "m", "hi", "--pull"]) == 0
    assert [path for _, path, _ in peer.asked] == ["/api/pull", "/api/show", "/api/generate"]


def test_an_error_after_the_first_words_ends_with_its_code(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/generate", Lines([ANSWER[0], {"error": "the engine crashed", "code": "engine_crashed"}]))
    assert main(["run", "m", "hi"]) == 8
    assert capsys.readouterr() == ("Par\n", "Error: the engine crashed\n")


def test_a_model_that_only_embeds_prints_a_vector(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/show", {"capabilities": ["embedding"]})
    peer.on("POST", "/api/embed", {"embeddings": [[0.5, 0.25]]})
    assert main(["run", "m", "hi", "--dimensions", "2"]) == 0
    assert capsys.readouterr().out == "[0.5, 0.25]\n"
    assert peer.bodies("/api/embed") == [{"model": "m", "input": "hi", "dimensions": 2}]


def test_piped_bytes_that_are_no_text_are_an_error_of_one_line(
    peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert main(["run", "m"]) == 2
    assert capsys.readouterr().err == "Error: standard input is not UTF-8 text\n"


def test_an_argument_that_is_no_text_is_an_error_of_one_line(
    peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "m", "\udcff"]) == 2
    assert capsys.readouterr().err == "Error: what was given is not UTF-8 text\n"


def test_an_error_in_another_peers_words_writes_no_escape_sequences(
    peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.on("POST", "/api/generate", {"error": "no\x1b]0;title\x07\x9b2J", "code": "refused"}, 403)
    assert main(["run", "m", "hi"]) == 5
    assert capsys.readouterr().err == "Error: no]0;title2J\n"


def test_a_model_that_only_embeds_wants_a_text(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/show", {"capabilities": ["embedding"]})
    assert main(["run", "m", ""]) == 2
    assert "give it a text after its name" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_letter_is_no_failure(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    peer.on("POST", "/api/generate", Lines([{"response": "\u4f60a", "done": True}]))
    assert main(["run", "m", "hi"]) == 0
    assert written.getvalue() == b"?a\n"


def test_v_is_verbose_here(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "-v", "hi"]) == 0
    assert "eval count" in capsys.readouterr().err


def test_who_had_a_model_is_not_contradicted(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    said = "model 'm' not found: desktop had it, and has been gone for 12 s"
    peer.on("POST", "/api/show", {"error": said, "code": "not_found"}, 404)
    assert main(["run", "m", "hi"]) == 3
    assert capsys.readouterr().err == f"Error: {said}\n"


def test_where_whoever_has_the_model_was_lost_just_now_the_prompt_waits(
    peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "a, which has model 'm', was lost 2 s ago and is looked for: try again"
    peer.on("POST", "/api/show", {"error": said, "code": "busy"}, 503)
    assert main(["run", "m", "hello"]) == 0
    assert capsys.readouterr() == ("Paris.\n", "")


def test_what_a_prompt_fetches_first_is_asked_for(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    said = "model 'm' not found; a prompt fetches it first"
    peer.on("POST", "/api/show", {"error": said, "code": "not_fetched"}, 404)
    assert main(["run", "m", "hi"]) == 0
    assert capsys.readouterr().err == ""


def test_the_look_at_the_model_says_that_a_prompt_follows(peer: FakePeer) -> None:
    assert main(["run", "m", "hi"]) == 0
    assert [sent.get("x-meshmax-ahead") for sent in peer.sent] == ["prompt", None]
