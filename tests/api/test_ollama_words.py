"""Ollama's JSON, golden."""

import base64
import json
from typing import Any

import msgspec
import pytest

from meshmax.api import ollama_words
from meshmax.api.bodies import decode_words
from meshmax.api.ollama_words import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody, Remote, ReplyWriter
from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import (
    MAX_PROMPT_BYTES,
    ChatRequest,
    Delta,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Message,
    Options,
    ToolCall,
)

NOW_S = 1_761_498_924.097767
FINISH = Finish("stop", 26, 259, 10.706818083, 6.338219291, 0.130079, 4.23271, (1, 2, 3))


def text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def test_the_lines_of_a_generated_stream_are_ollamas_to_the_byte() -> None:
    writer = ReplyWriter("gemma4", chat=False)
    assert text(writer.delta(Delta("That"), NOW_S)) == (
        '{"model":"gemma4","created_at":"2025-10-26T17:15:24.097767Z","response":"That","done":false}'
    )
    assert text(writer.finish(FINISH, NOW_S)) == (
        '{"model":"gemma4","created_at":"2025-10-26T17:15:24.097767Z","response":"","done":true,"done_reason":"stop",'
        '"context":[1,2,3],"total_duration":10706818083,"load_duration":6338219291,"prompt_eval_count":26,'
        '"prompt_eval_duration":130079000,"eval_count":259,"eval_duration":4232710000}'
    )


def test_the_lines_of_a_chat_carry_a_message_and_no_context() -> None:
    writer = ReplyWriter("gemma4", chat=True)
    call = ToolCall("f", {"b": 1, "a": [2]}, "call_ab12cd34")
    line = writer.delta(Delta("Hi", thinking="hm", tool_calls=(call,)), NOW_S)
    assert text(line["message"]) == (
        '{"role":"assistant","content":"Hi","thinking":"hm","tool_calls":'
        '[{"id":"call_ab12cd34","function":{"index":0,"name":"f","arguments":{"b":1,"a":[2]}}}]}'
    )
    last = writer.finish(FINISH, NOW_S)
    assert list(last)[:5] == ["model", "created_at", "message", "done", "done_reason"]
    assert last["message"] == {"role": "assistant", "content": ""}
    assert "context" not in last


@pytest.mark.parametrize("reason", ["load", "unload"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_load_or_unload_is_answered_without_measures(reason: Any, chat: bool) -> None:
    reply = ReplyWriter("m", chat).finish(Finish(reason, total_s=5.0), NOW_S)
    shown = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    created = {"model": "m", "created_at": "2025-10-26T17:15:24.097767Z"}
    assert reply == created | shown | {"done": True, "done_reason": reason}


def test_what_is_zero_is_left_out_and_tool_calls_end_with_stop() -> None:
    reply = ReplyWriter("m", chat=False).finish(Finish("tool_calls", output_tokens=1), NOW_S)
    assert list(reply) == ["model", "created_at", "response", "done", "done_reason", "load_duration", "eval_count"]
    assert reply["done_reason"] == "stop"


def test_a_reply_that_is_not_streamed_joins_everything() -> None:
    parts = [
        Delta("a", thinking="x", logprobs=({"token": "a"},)),
        Delta("b", tool_calls=(ToolCall("f", {}),), tokens=2),
    ]
    whole = ollama_words.join(parts)
    reply = ReplyWriter("m", chat=False).finish(Finish("length", 1, 3), NOW_S, whole)
    assert reply["response"] == "ab"
    assert reply["thinking"] == "x"
    assert reply["logprobs"] == ({"token": "a"},)
    assert reply["tool_calls"] == [{"function": {"index": 0, "name": "f", "arguments": {}}}]
    assert reply["done_reason"] == "length"
    assert whole.tokens == 3


def test_a_model_of_a_peer_is_named_with_its_host_before_the_time() -> None:
    line = ReplyWriter("far", chat=False, remote=Remote("attic", "far:latest")).delta(Delta("x"), NOW_S)
    assert list(line) == ["model", "remote_model", "remote_host", "created_at", "response", "done"]


def test_a_generate_body_is_read_field_by_field() -> None:
    body = {
        "model": "m",
        "prompt": "p",
        "suffix": "s",
        "system": "be brief",
        "template": "{{ .Prompt }}",
        "images": [base64.b64encode(b"png").decode()],
        "format": {"type": "object"},
        "think": "high",
        "context": [1, 2],
        "logprobs": True,
        "top_logprobs": 3,
        "options": {"seed": 1, "odd": 2},
        "later_field": 1,
    }
    request, ignored = ollama_words.generate_request(decode_words(json.dumps(body).encode(), GenerateBody))
    assert request == GenerateRequest(
        "p",
        "s",
        "be brief",
        "{{ .Prompt }}",
        False,
        (b"png",),
        (1, 2),
        {"type": "object"},
        "high",
        True,
        3,
        Options(seed=1),
    )
    assert ignored == ["odd"]


def test_null_and_empty_mean_not_given() -> None:
    body = {"model": "m", "prompt": None, "system": "", "format": "", "options": None, "images": None, "think": None}
    request, _ = ollama_words.generate_request(decode_words(json.dumps(body).encode(), GenerateBody))
    assert request == GenerateRequest()


def test_a_conversation_with_tools_is_read() -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "User", "content": "hi", "images": None},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "7", "tool_name": "f"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    request, _ = ollama_words.chat_request(decode_words(json.dumps(body).encode(), ChatBody))
    assert request == ChatRequest(
        (
            Message("user", "hi"),
            Message("assistant", tool_calls=(ToolCall("f", {"a": 1}),)),
            Message("tool", "7", tool_name="f"),
        ),
        ({"type": "function", "function": {"name": "f"}},),
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"raw": True, "template": "x"}, "raw mode does not support template, system, or context"),
        ({"raw": True, "system": "x"}, "raw mode does not support template, system, or context"),
        ({"raw": True, "context": [1]}, "raw mode does not support template, system, or context"),
        ({"format": "xml"}, 'invalid format: "xml"'),
        ({"format": 5}, "invalid format: 5"),
        ({"think": "hard"}, 'invalid think value: "hard"'),
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ({"top_logprobs": -1}, "top_logprobs must be between 0 and 20"),
        ({"images": ["%%%"]}, "illegal base64 data"),
        ({"images": ["data:image/png;base64,AAAA"]}, "illegal base64 data"),
        ({"options": {"num_ctx": "big"}}, 'option "num_ctx" must be of type integer'),
        ({"context": [-1]}, "context must hold the tokens"),
        ({"_debug_render_only": True}, "_debug_render_only is not offered"),
        ({"prompt": "x" * (MAX_PROMPT_BYTES + 1)}, "at most 16777216 are accepted"),
    ],
)
def test_a_bad_field_is_refused_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ollama_words.generate_request(decode_words(json.dumps(body).encode(), GenerateBody))
    assert message in str(caught.value)


def test_a_role_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="invalid role: 'robot'"):
        ollama_words.chat_request(decode_words(b'{"messages":[{"role":"robot"}]}', ChatBody))


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (0, 0.0),
        ("0", 0.0),
        (10, 10.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        (-1, -1.0),
        ("-1s", -1.0),
        (1e300, -1.0),
    ],
)
def test_keep_alive_is_seconds_or_a_go_duration(given: Any, seconds: float | None) -> None:
    assert ollama_words.keep_alive_s(given) == seconds


@pytest.mark.parametrize("given", ["soon", "", "5 m"])
def test_another_keep_alive_is_refused(given: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid duration"):
        ollama_words.keep_alive_s(given)


@pytest.mark.parametrize(
    ("given", "inputs"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ("", ()), (None, ()), ([], ()), (["a", ""], ("a", ""))],
)
def test_the_input_of_an_embedding_is_a_text_or_texts(given: Any, inputs: tuple[str, ...]) -> None:
    body = decode_words(json.dumps({"model": "m", "input": given}).encode(), EmbedBody)
    assert ollama_words.embed_request(body)[0].inputs == inputs


@pytest.mark.parametrize("given", [5, [1], {"a": 1}, [["a"]], True])
def test_another_input_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^invalid input type$"):
        ollama_words.embed_inputs(given)


def test_the_older_embedding_is_not_normalised() -> None:
    request, _ = ollama_words.embeddings_request(EmbeddingsBody(prompt="x"))
    assert request == EmbedRequest(("x",), normalize=False)
    assert ollama_words.embed_request(EmbedBody(input="x", dimensions=-1))[0] == EmbedRequest(("x",))
    with pytest.raises(InvalidRequest, match="dimensions must be between 1 and 65536"):
        ollama_words.embed_request(EmbedBody(input="x", dimensions=65537))
    assert ollama_words.embed_request(EmbedBody(input="x", truncate=False, dimensions=8))[0] == EmbedRequest(
        ("x",), truncate=False, dimensions=8
    )
