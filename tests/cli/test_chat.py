from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshmax.base.errors import NotFound
from meshmax.cli.chat import MAX_TURNS, Conversation, change_setting, converse, obey, read_message
from meshmax.cli.client import PeerClient
from tests.cli.conftest import FakePeer, Lines


def said(text: str, **more: Any) -> Lines:
    return Lines(
        [{"message": {"role": "assistant", "content": text}}, {"message": {"content": ""}, "done": True, **more}]
    )


def typing(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting: Iterator[str | type[BaseException]] = iter(lines)

    def read(_prompt: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


@pytest.fixture
def peer(fake_peer: FakePeer) -> FakePeer:
    fake_peer.on("POST", "/api/chat", said("Hello."))
    return fake_peer


def hold(peer: FakePeer, *lines: str | type[BaseException], **more: Any) -> list[dict[str, Any]]:
    """The requests of a conversation, without the first one, which loads the model."""
    with PeerClient(peer.url) as client:
        converse(client, Conversation("m", {}, **more), typing(*lines))
    bodies = peer.bodies("/api/chat")
    assert bodies[0] == {"model": "m", "messages": [], "stream": False}
    return bodies[1:]


def test_a_conversation_remembers_what_was_said(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    requests = hold(peer, "hi", "and?", "/bye", "never asked")
    assert [message["content"] for message in requests[1]["messages"]] == ["hi", "Hello.", "and?"]
    assert len(requests) == 2
    assert capsys.readouterr().out == "Hello.\n\nHello.\n\n"


def test_the_end_of_input_ends_the_conversation(peer: FakePeer) -> None:
    assert hold(peer) == []


def test_ctrl_c_at_the_prompt_says_how_to_exit_and_goes_on(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(hold(peer, KeyboardInterrupt, "hi")) == 1
    assert "Use Ctrl + d or /bye to exit." in capsys.readouterr().out


def test_three_quotes_begin_and_end_a_message_of_several_lines() -> None:
    assert read_message(typing('"""one', "two", 'three"""')) == "one\ntwo\nthree"
    assert read_message(typing('"""one line"""')) == "one line"


def test_clear_forgets_what_was_said(peer: FakePeer) -> None:
    requests = hold(peer, "hi", "/clear", "again")
    assert [message["content"] for message in requests[1]["messages"]] == ["again"]


def test_without_history_each_question_stands_alone(peer: FakePeer) -> None:
    requests = hold(peer, "/set nohistory", "one", "two")
    assert [len(request["messages"]) for request in requests] == [1, 1]


def test_what_is_set_goes_into_the_next_request(peer: FakePeer) -> None:
    lines = [
        "/set system Be brief.",
        "/set parameter seed 7",
        "/set parameter stop a b",
        "/set format json",
        "/set nothink",
    ]
    (request,) = hold(peer, *lines, "hi")
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert request["options"] == {"seed": 7, "stop": ["a", "b"]}
    assert (request["format"], request["think"]) == ("json", False)


def test_an_error_is_told_and_the_question_taken_back(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/chat", said(""))
    with PeerClient(peer.url) as client:
        talk = Conversation("m", {})

        type_next = typing("hi", "/bye")

        def read(prompt: str) -> str:
            peer.on("POST", "/api/chat", {"error": "busy"}, 503)  # from the first question on
            return type_next(prompt)

        converse(client, talk, read)
    assert talk.messages == []
    assert capsys.readouterr().err == "Error: busy\n"


def test_another_model_is_loaded_and_talked_to_from_then_on(peer: FakePeer) -> None:
    assert [request["model"] for request in hold(peer, "hi", "/load other", "hi")] == ["m", "other", "other"]


def test_a_model_that_cannot_be_loaded_leaves_the_conversation_as_it_was(peer: FakePeer) -> None:
    talk = Conversation("m", {}, messages=[{"role": "user", "content": "hi"}])
    peer.on("POST", "/api/chat", {"error": "model 'x' not found"}, 404)
    with PeerClient(peer.url) as client, pytest.raises(NotFound):
        obey(client, talk, ["/load", "x"])
    assert (talk.model, len(talk.messages)) == ("m", 1)


def test_a_model_that_nobody_knows_is_answered_with_the_one_that_was_meant(
    peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.on("GET", "/api/tags", {"models": [{"name": "smollm2:latest"}]})
    said = "model 'smolm2' not found; `meshmax pull smolm2` would get it from registry.ollama.ai, if it is there"
    peer.on("POST", "/api/chat", {"error": said}, 404)
    talk = Conversation("m", {})
    with PeerClient(peer.url) as client, pytest.raises(NotFound) as caught:
        obey(client, talk, ["/load", "smolm2"])
    assert caught.value.message == f"{said}. Did you mean 'smollm2'?"
    assert talk.model == "m"
    with PeerClient(peer.url) as client:
        obey(client, talk, ["/load"])
        obey(client, talk, ["/load", "two", "words"])
    assert capsys.readouterr().out.endswith("Usage: /load <model>\nUsage: /load <model>\n")


def test_an_unknown_command_says_where_help_is(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    assert hold(peer, "/frob", "/?", "/set", "/show", "/? shortcuts") == []
    out = capsys.readouterr().out
    assert "Unknown command '/frob'. Type /? for help" in out
    assert "/set parameter" in out


def test_verbose_tells_the_timings(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.on("POST", "/api/chat", said("Hello.", total_duration=10**9))
    hold(peer, "/set verbose", "hi")
    assert "total duration:       1s" in capsys.readouterr().err


def test_settings_answer_with_ollamas_sentences() -> None:
    talk = Conversation("m", {})
    assert change_setting(talk, ["verbose"]) == "Set 'verbose' mode."
    assert change_setting(talk, ["format", "xml"]).startswith("Invalid or missing format")
    assert change_setting(talk, ["noformat"]) == "Disabled format."
    assert change_setting(talk, ["nonsense"]).startswith("Available Commands")


def test_a_conversation_is_bounded() -> None:
    talk = Conversation("m", {})
    for turn in range(MAX_TURNS + 10):
        talk.ask(str(turn))
    assert len(talk.messages) == MAX_TURNS


def test_bytes_that_are_no_text_do_not_end_the_conversation(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter([b"\xff", b"hi", b"/bye"])

    def read(_prompt: str) -> str:
        return next(typed).decode()

    with PeerClient(peer.url) as client:
        converse(client, Conversation("m", {}), read)
    assert [body["messages"] for body in peer.bodies("/api/chat")][1:] == [[{"role": "user", "content": "hi"}]]
    assert "That was not UTF-8 text." in capsys.readouterr().out


def test_another_peers_error_writes_no_escape_sequences(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    with PeerClient(peer.url) as client:
        conversation = Conversation("m", {})
        peer.on("POST", "/api/show", {"error": "no\x1b[2J", "code": "refused"}, 403)
        converse(client, conversation, typing("/show info"))
    assert capsys.readouterr().err == "Error: no[2J\n"
