"""OpenAI's JSON as Ollama writes it."""

import base64
import json
from typing import Any

import pytest

from meshmax.api import openai_words
from meshmax.api.bodies import decode_words
from meshmax.api.openai_words import ChatCompletionBody, ChatWriter, CompletionBody, CompletionWriter, EmbeddingBody
from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import Delta, EmbedRequest, Finish, Message, Options, ToolCall


def chat(**fields: Any) -> Any:
    given = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return openai_words.chat_request(decode_words(json.dumps(given).encode(), ChatCompletionBody))


def test_temperature_and_top_p_default_to_one_and_the_rest_is_translated() -> None:
    assert chat().options == Options(temperature=1.0, top_p=1.0)
    request = chat(
        max_tokens=5, seed=1, stop="x", temperature=0, frequency_penalty=0.5, presence_penalty=0.1, n=3, user="u"
    )
    assert request.options == Options(
        num_predict=5, seed=1, stop=("x",), temperature=0.0, top_p=1.0, frequency_penalty=0.5, presence_penalty=0.1
    )
    assert chat(max_completion_tokens=7).options.num_predict == 7


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning": {"effort": "xhigh"}}, "max"),
        ({"reasoning_effort": "medium"}, "medium"),
    ],
)
def test_effort_becomes_think(fields: dict[str, Any], think: Any) -> None:
    assert chat(**fields).think == think


def test_a_response_format_becomes_a_format() -> None:
    assert chat(response_format={"type": "text"}).format is None
    assert chat(response_format={"type": "json_object"}).format == "json"
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    assert chat(response_format=schema).format == {"type": "object"}


def test_parts_calls_and_tool_answers_become_messages() -> None:
    image = "data:image/png;base64," + base64.b64encode(b"png").decode()
    parts = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": image}}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    assert chat(messages=messages).messages == (
        Message("system", "be brief"),
        Message("user", "what", images=(b"png",)),
        Message("assistant", tool_calls=(ToolCall("f", {"a": 1}, "c1"),)),
        Message("tool", "7", tool_name="f", tool_call_id="c1"),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "[] is too short - 'messages'"),
        ({"messages": None}, "[] is too short - 'messages'"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid message content type"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "parts are of type text or image_url"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}
                ]
            },
            "image URLs are not currently supported",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "data:text/html;base64,AA"}]}
                ]
            },
            "invalid image input",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid role"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "invalid tool call arguments",
        ),
        ({"reasoning_effort": "huge"}, "invalid reasoning effort"),
        ({"response_format": {"type": "xml"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format must be"),
        ({"stop": 5}, "stop must be a string or a list of strings"),
        ({"top_logprobs": 50}, "top_logprobs must be between 0 and 20"),
    ],
)
def test_a_bad_field_is_refused_with_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert message in str(caught.value)


def test_a_stream_says_the_role_once_thoughts_alone_and_the_reason_at_the_end() -> None:
    writer = ChatWriter("m", 123, 1_730_000_000)
    head = {
        "id": "chatcmpl-123",
        "object": "chat.completion.chunk",
        "created": 1_730_000_000,
        "model": "m",
        "system_fingerprint": "fp_ollama",
    }
    first = writer.chunks(Delta("a", thinking="hm"))
    assert [chunk["choices"][0]["delta"] for chunk in first] == [
        {"role": "assistant", "reasoning": "hm"},
        {"content": "a"},
    ]
    assert first[0] == head | {
        "choices": [{"index": 0, "delta": {"role": "assistant", "reasoning": "hm"}, "finish_reason": None}]
    }
    called = writer.chunks(Delta(tool_calls=(ToolCall("f", {"a": 1}, "call_1"),)))
    assert called[0]["choices"][0]["delta"]["tool_calls"] == [
        {"id": "call_1", "index": 0, "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    ]
    reason, counts = writer.last_chunks(Finish("stop", 1, 2), include_usage=True)
    assert reason["choices"] == [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]
    assert counts == head | {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}


def test_a_whole_completion_has_ollamas_fields() -> None:
    whole = ChatWriter("m", 1, 5).whole(Delta("text", logprobs=({"token": "t"},)), Finish("length", 1, 2))
    assert whole == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "system_fingerprint": "fp_ollama",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "text"},
                "logprobs": {"content": ({"token": "t"},)},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


def test_a_text_completion_is_read_and_written() -> None:
    request = openai_words.completion_request(CompletionBody(prompt="p", suffix="s", max_tokens=3, logprobs=2))
    assert (request.prompt, request.suffix, request.top_logprobs, request.options.num_predict) == ("p", "s", 2, 3)
    writer = CompletionWriter("m", 7, 5)
    assert writer.chunks(Delta("x"))[0]["choices"] == [{"text": "x", "index": 0, "finish_reason": None}]
    assert writer.last_chunks(Finish(), include_usage=False)[0]["choices"] == [
        {"text": "", "index": 0, "finish_reason": "stop"}
    ]
    assert writer.whole(Delta("x"), Finish("stop", 1, 1))["object"] == "text_completion"
    with pytest.raises(InvalidRequest, match="prompt must be a string"):
        openai_words.completion_request(CompletionBody(prompt=["a"]))


@pytest.mark.parametrize("given", [None, "", [], [1, 2], [[1]], 5])
def test_an_input_that_is_no_text_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^invalid input$"):
        openai_words.embed_request(EmbeddingBody(input=given))


def test_an_embedding_request_is_read() -> None:
    assert openai_words.embed_request(EmbeddingBody(input=["a"], dimensions=2)) == EmbedRequest(("a",), dimensions=2)
    with pytest.raises(InvalidRequest, match="encoding_format"):
        openai_words.embed_request(EmbeddingBody(input="a", encoding_format="hex"))
