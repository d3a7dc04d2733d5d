"""Requests as Ollama takes them, and what its lists and lines mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meshmax.base.catalog import InMemory
from meshmax.base.errors import CapabilityMissing, EngineCrashed, EngineError
from meshmax.base.ids import Sha256
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    Finish,
    GenerateRequest,
    Message,
    Options,
    Said,
    ToolCall,
)
from meshmax.engine import ollama_words as words

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT = ChatRequest((Message("user", "hi"),))
D = "d" * 64


def lines(request: ChatRequest | GenerateRequest, *told: dict[str, Any]) -> tuple[list[Delta], Finish]:
    reader = words.LineReader(request, lambda: "call_made", lambda text: text)
    deltas = [reader.on_line(msgspec.convert(line, words.Line)) for line in told]
    return [delta for delta in deltas if delta], reader.end()


def test_every_field_of_a_chat_is_passed_on() -> None:
    call = ToolCall("f", {"b": 1, "a": [2]}, "call_1")
    request = ChatRequest(
        (
            Message("system", "be brief"),
            Message("user", "what is it", images=(b"\x89PNG",)),
            Message("assistant", "", "let me see", tool_calls=(call,)),
            Message("tool", "42", tool_name="f", tool_call_id="call_1"),
        ),
        (TOOL,),
        {"type": "object"},
        "high",
        True,
        3,
        Options(num_ctx=2048, temperature=0.0, stop=("a", "b"), num_gpu=0),
    )
    assert words.chat_body(request, "m:1b") == {
        "model": "m:1b",
        "stream": True,
        "options": {"num_ctx": 2048, "temperature": 0.0, "stop": ["a", "b"], "num_gpu": 0},
        "format": {"type": "object"},
        "think": "high",
        "logprobs": True,
        "top_logprobs": 3,
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "what is it", "images": ["iVBORw=="]},
            {
                "role": "assistant",
                "content": "",
                "thinking": "let me see",
                "tool_calls": [
                    {"id": "call_1", "function": {"index": 0, "name": "f", "arguments": {"b": 1, "a": [2]}}}
                ],
            },
            {"role": "tool", "content": "42", "tool_name": "f", "tool_call_id": "call_1"},
        ],
        "tools": [TOOL],
    }


def test_every_field_of_a_prompt_is_passed_on() -> None:
    request = GenerateRequest(
        "def f(", "return", "sys", "{{ .Prompt }}", False, (b"i",), (1, 2), "json", False, options=Options(seed=7)
    )
    assert words.generate_body(request, "m") == {
        "model": "m",
        "stream": True,
        "options": {"seed": 7},
        "format": "json",
        "think": False,
        "prompt": "def f(",
        "raw": False,
        "suffix": "return",
        "system": "sys",
        "template": "{{ .Prompt }}",
        "images": ["aQ=="],
        "context": [1, 2],
    }


def test_an_answer_that_was_begun_is_the_last_message_and_counts() -> None:
    said = Said("One, two,", tokens=4)
    body = words.chat_body(msgspec.structs.replace(CHAT, said=said, options=Options(num_predict=10)), "m")
    assert body["messages"][-1] == {"role": "assistant", "content": "One, two,"}
    assert body["options"]["num_predict"] == 6
    raw = GenerateRequest("Count: ", raw=True, said=said)
    assert words.generate_body(raw, "m")["prompt"] == "Count: One, two,"
    chat = words.as_chat(GenerateRequest("Count", system="s", think=True, said=said))
    assert chat == ChatRequest((Message("system", "s"), Message("user", "Count")), think=True, said=said)


@pytest.mark.parametrize(
    "request_",
    [
        ChatRequest(CHAT.messages, format="json", said=Said("{")),
        ChatRequest(CHAT.messages, (TOOL,), said=Said("I")),
        ChatRequest(CHAT.messages, said=Said(thinking="hm")),
        GenerateRequest("x", context=(1,), said=Said("a")),
        GenerateRequest("x", suffix="y", said=Said("a")),
        GenerateRequest("x", template="{{ .Prompt }}", said=Said("a")),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(request_: ChatRequest | GenerateRequest) -> None:
    with pytest.raises(CapabilityMissing):
        words.refuse_continuing(request_)


@pytest.mark.parametrize(
    ("template", "renderer", "open_"),
    [
        ("{{ .System }} {{ .Prompt }} {{ .Response }}<|end|>", "", True),
        ("{{ range .Messages }}{{ .Content }}{{ if not $last }}<|end|>{{ end }}{{ end }}", "", True),
        ("{{ range .Messages }}{{ .Content }}<|end|>{{ end }}", "", False),
        ("{{ .Prompt }}", "", False),
        ("", "", False),
        ("{{ .Prompt }}{{ .Response }}", "qwen3-coder", False),
    ],
)
def test_only_a_template_that_leaves_the_last_turn_open_lets_it_go_on(
    template: str, renderer: str, open_: bool
) -> None:
    assert words.goes_on(words.Shown(template=template, renderer=renderer)) is open_


def test_a_streamed_chat_with_thinking_and_calls() -> None:
    request = ChatRequest(CHAT.messages, (TOOL,), logprobs=True, top_logprobs=1)
    probability = {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": [{"token": "H", "logprob": -0.5}] * 3}
    deltas, finish = lines(
        request,
        {"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False},
        {"message": {"content": "Hi"}, "logprobs": [probability, "odd", {"token": 5}], "done": False},
        {"message": {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}, "done": False},
        {
            "message": {"content": ""},
            "done": True,
            "done_reason": "stop",
            "total_duration": 3_000_000_000,
            "load_duration": 1_000_000_000,
            "prompt_eval_count": 7,
            "prompt_eval_duration": 500_000_000,
            "eval_count": 9,
            "eval_duration": 1_500_000_000,
        },
    )
    assert deltas[0] == Delta(thinking="hm")
    kept = {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": [{"token": "H", "logprob": -0.5}]}
    assert deltas[1] == Delta("Hi", logprobs=(kept,))
    assert deltas[2] == Delta(tool_calls=(ToolCall("f", {"a": 1}, "call_made"),), tokens=0)
    assert finish == Finish("stop", 7, 9, pytest.approx(3), pytest.approx(1), pytest.approx(0.5), pytest.approx(1.5))  # type: ignore[arg-type]


def test_calls_come_together_at_the_end_so_that_none_is_missing_where_an_answer_breaks() -> None:
    reader = words.LineReader(ChatRequest(CHAT.messages, (TOOL,)), lambda: "id", lambda text: text)

    def on_line(line: dict[str, Any]) -> Delta | None:
        return reader.on_line(msgspec.convert(line, words.Line))

    for name in "fg":
        assert on_line({"message": {"content": "", "tool_calls": [{"function": {"name": name}}]}}) is None
    last = on_line({"message": {"content": ""}, "done": True})
    assert last == Delta(tool_calls=(ToolCall("f", {}, "id"), ToolCall("g", {}, "id")), tokens=0)


def test_a_prompts_end_has_its_context_and_a_raw_ones_has_not() -> None:
    last = {"response": "", "done": True, "done_reason": "length", "context": [1, 2, 3]}
    assert lines(GenerateRequest("x"), last)[1].context == (1, 2, 3)
    assert lines(GenerateRequest("x", raw=True), last)[1].context == ()
    assert lines(GenerateRequest("x"), {"response": "a", "done": False}, last)[1].output_tokens == 1


def test_an_answer_without_an_end_and_one_with_an_error() -> None:
    with pytest.raises(EngineCrashed):
        lines(CHAT, {"message": {"content": "a"}})
    with pytest.raises(EngineError, match="no memory"):
        lines(CHAT, {"error": "no memory"})


def test_a_list_of_models_and_what_is_in_memory() -> None:
    details = {"family": "llama", "families": None, "parameter_size": "8B", "quantization_level": "Q4_0"}
    tags = msgspec.convert(
        {
            "models": [
                {"name": "a:latest", "digest": D, "size": 5, "modified_at": "2025-10-26T17:15:24.123456789+02:00",
                 "details": details, "capabilities": ["completion", "tools"]},
                {"name": "far:cloud", "digest": "e" * 64, "remote_host": "https://ollama.com:443"},
                {"name": "odd", "digest": "sha256:zz"},
                {"name": "../../etc/passwd", "digest": "f" * 64, "size": 1},
            ]
        },
        words.Tags,
    )  # fmt: skip
    running = msgspec.convert(
        {"models": [{"name": "a:latest", "digest": D, "size": 9, "size_vram": 8, "context_length": 4096,
                     "expires_at": "2318-01-01T00:00:00Z"}]},
        words.Tags,
    )  # fmt: skip
    known = {Sha256("f" * 64): words.details_of(None, ["embedding"])}
    first, second = words.offers(tags, running, "there", known)
    assert (first.name, first.digest, first.size, first.engine, first.origin) == ("a:latest", D, 5, "ollama", "there")
    assert first.modified_at_s == pytest.approx(1761491724.123456)
    assert (first.details.parameter_size, first.details.capabilities) == ("8B", ("completion", "tools"))
    assert first.loaded == InMemory(9, 8, 4096, None)
    assert (second.name, second.details.capabilities) == ("passwd:latest", ("embedding",))
    assert second.loaded is None


def test_a_description_is_bounded_and_keeps_what_is_told() -> None:
    shown = msgspec.convert(
        {
            "license": "x" * 1_000_000,
            "parameters": 'stop                           "<end>"\ntemperature                    0.5\nnum_ctx 4096',
            "template": "{{ .Prompt }}",
            "details": {"family": "llama"},
            "model_info": {
                "llama.context_length": 8192,
                "llama.embedding_length": 576,
                "tokens": ["a"] * 100,
                "odd": {},
            },
            "capabilities": ["completion"],
            "modified_at": "never",
        },
        words.Shown,
    )
    told = words.description_of(Sha256(D), shown)
    assert len(told.license) == words.MAX_DESCRIBED_BYTES
    assert told.parameters == {"stop": "<end>", "temperature": 0.5, "num_ctx": 4096}
    assert (told.details.context_length, told.details.embedding_length) == (8192, 576)
    assert told.model_info["tokens"] == []
    assert told.model_info["odd"] is None
    assert told.modified_at_s == 0.0


def test_images_are_refused_where_nobody_would_look_at_them() -> None:
    shown = ChatRequest((Message("user", "look", images=(b"png",)), Message("user", "well?")))
    for request in (shown, GenerateRequest("look", images=(b"png",))):
        with pytest.raises(CapabilityMissing, match='"m" does not support vision'):
            words.refuse_images(request, "m", ("completion",))
        words.refuse_images(request, "m", ("completion", "vision"))
        words.refuse_images(request, "m", ())
    words.refuse_images(GenerateRequest("words alone"), "m", ("completion",))
