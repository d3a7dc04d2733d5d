"""Requests as OpenAI's interface and its dialects take them, and what their chunks mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meshmax.base.errors import CapabilityMissing, EngineCrashed, EngineError
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Message,
    Options,
    Said,
    ToolCall,
)
from meshmax.engine import openai_words as words

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT = ChatRequest((Message("user", "hi"),))
EVERYTHING = Options(
    num_ctx=1, num_predict=9, seed=3, temperature=0.1, top_k=5, top_p=0.2, min_p=0.3, typical_p=0.4, repeat_last_n=6,
    repeat_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.6, stop=("x",), num_batch=7, num_gpu=8, num_thread=9,
)  # fmt: skip
PLAIN = {
    "max_tokens": 9, "seed": 3, "temperature": 0.1, "top_p": 0.2, "presence_penalty": 0.5, "frequency_penalty": 0.6,
    "stop": ["x"],
}  # fmt: skip


def chunks(request: ChatRequest | GenerateRequest, *told: dict[str, Any]) -> tuple[list[Delta], Finish]:
    reader = words.ChunkReader(request, lambda: "call_made", lambda text: text)
    deltas = [reader.on_chunk(msgspec.convert(chunk, words.Chunk)) for chunk in told]
    calls, finish = reader.end(0.5, 2.0)
    return [delta for delta in (*deltas, calls) if delta], finish


def sent(body: dict[str, Any]) -> dict[str, Any]:
    return {key: body[key] for key in body if key not in ("model", "stream", "stream_options", "messages", "prompt")}


def test_every_field_of_a_chat_is_passed_on() -> None:
    request = ChatRequest(
        (
            Message("user", "what", images=(b"\x89PNG", b"\xff\xd8", b"RIFF....WEBP")),
            Message("assistant", "", "hm", tool_calls=(ToolCall("f", {"a": 1}, "call_1"),)),
            Message("tool", "42", tool_name="f", tool_call_id="call_1"),
        ),
        (TOOL,),
        {"type": "object"},
        logprobs=True,
        top_logprobs=2,
    )
    body = words.chat_body(request, "org/m", "")
    assert body["model"] == "org/m"
    assert body["stream_options"] == {"include_usage": True}
    content = body["messages"][0]["content"]
    assert content[0] == {"type": "text", "text": "what"}
    kinds = [part["image_url"]["url"].partition(";")[0] for part in content[1:]]
    assert kinds == ["data:image/png", "data:image/jpeg", "data:image/webp"]
    assert body["messages"][1]["tool_calls"] == [
        {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": '{"a":1}'}}
    ]
    assert body["messages"][2] == {"role": "tool", "content": "42", "tool_call_id": "call_1", "name": "f"}
    assert sent(body) == {
        "tools": [TOOL],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert words.chat_body(ChatRequest(CHAT.messages, format="json"), "m", "")["response_format"] == {
        "type": "json_object"
    }


@pytest.mark.parametrize(
    ("server", "more"),
    [
        ("", {}),
        ("vllm", {"top_k": 5, "min_p": 0.3, "repetition_penalty": 1.1}),
        ("llama-server", {"top_k": 5, "min_p": 0.3, "typical_p": 0.4, "repeat_last_n": 6, "repeat_penalty": 1.1}),
    ],
)
def test_a_server_is_told_the_options_that_it_knows(server: words.Server, more: dict[str, Any]) -> None:
    assert sent(words.chat_body(ChatRequest(CHAT.messages, options=EVERYTHING), "m", server)) == PLAIN | more
    unlimited = Options(num_predict=-1, seed=-1, top_k=0)
    assert sent(words.chat_body(ChatRequest(CHAT.messages, options=unlimited), "m", server)) == {}


@pytest.mark.parametrize(
    ("think", "unknown", "known"),
    [
        (None, {}, {}),
        (True, {"reasoning_effort": "medium"}, {"chat_template_kwargs": {"enable_thinking": True}}),
        (False, {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            "max",
            {"reasoning_effort": "high"},
            {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}},
        ),
    ],
)
def test_thinking_is_asked_for_in_the_servers_words(think: Any, unknown: Any, known: Any) -> None:
    request = ChatRequest(CHAT.messages, think=think)
    assert sent(words.chat_body(request, "m", "")) == unknown
    assert sent(words.chat_body(request, "m", "vllm")) == known


def test_an_answer_that_was_begun_goes_on_where_the_server_is_known_to_do_that() -> None:
    request = ChatRequest(CHAT.messages, said=Said("One,", tokens=2), options=Options(num_predict=10))
    vllm = words.chat_body(request, "m", "vllm")
    assert vllm["messages"][-1] == {"role": "assistant", "content": "One,"}
    assert sent(vllm) == {"max_tokens": 8, "add_generation_prompt": False, "continue_final_message": True}
    assert sent(words.chat_body(request, "m", "llama-server")) == {"max_tokens": 8}
    with pytest.raises(CapabilityMissing, match="cannot go on there"):
        words.chat_body(request, "m", "")
    raw = GenerateRequest("Count: ", raw=True, said=Said("One,"))
    assert words.completion_body(raw, "m", "")["prompt"] == "Count: One,"
    for refused in (
        ChatRequest(CHAT.messages, format="json", said=Said("{")),
        ChatRequest(CHAT.messages, (TOOL,), said=Said("I")),
        ChatRequest(CHAT.messages, said=Said(thinking="hm")),
    ):
        with pytest.raises(CapabilityMissing):
            words.chat_body(refused, "m", "vllm")


def test_a_prompt_is_a_chat_and_a_raw_one_a_completion() -> None:
    assert words.chat_body(GenerateRequest("hi", system="s"), "m", "")["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
    ]
    assert [words.is_bare(GenerateRequest("x", **how)) for how in ({}, {"raw": True}, {"suffix": "y"})] == [
        False,
        True,
        True,
    ]
    body = words.completion_body(GenerateRequest("def f(", suffix="return", logprobs=True, top_logprobs=3), "m", "")
    assert sent(body) == {"suffix": "return", "logprobs": 3}
    assert body["prompt"] == "def f("


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest("x", context=(1,)),
        GenerateRequest("x", template="{{ .Prompt }}"),
        GenerateRequest("x", raw=True, images=(b"i",)),
        GenerateRequest("x", raw=True, format="json"),
        GenerateRequest("x", raw=True, context=(1,)),
        GenerateRequest("x", suffix="y", said=Said("z")),
    ],
)
def test_what_cannot_be_said_is_refused(request_: GenerateRequest) -> None:
    make = words.completion_body if words.is_bare(request_) else words.chat_body
    with pytest.raises(CapabilityMissing, match="is not possible with the server"):
        make(request_, "m", "")


@pytest.mark.parametrize(
    ("options", "hint"), [(Options(), True), (Options(temperature=0.0), False), (Options(seed=1), False)]
)
def test_where_an_answer_cannot_go_on_what_would_let_it_is_said(options: Options, hint: bool) -> None:
    begun = ChatRequest((Message("user", "x"),), options=options, said=Said("y"))
    with pytest.raises(CapabilityMissing, match="cannot go on there") as refused:
        words.chat_body(begun, "m", "")
    assert ("with temperature 0 or a seed" in refused.value.message) is hint


def test_a_streamed_chat_with_thinking_and_calls_in_pieces() -> None:
    request = ChatRequest(CHAT.messages, (TOOL,), logprobs=True)

    def piece(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, **more}]}

    deltas, finish = chunks(
        request,
        piece({"role": "assistant", "content": None}),
        piece({"reasoning_content": "hm"}),
        piece({"reasoning": "ha"}),
        piece({"content": "Hi"}, logprobs={"content": [{"token": "Hi", "logprob": -1.0}]}),
        piece({"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]}),
        piece({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}, {"index": 1, "function": {"name": "g"}}]}),
        piece({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
        piece({}, finish_reason="tool_calls"),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9,
                                  "prompt_tokens_details": {"cached_tokens": 50}}},
    )  # fmt: skip
    assert deltas[:2] == [Delta(thinking="hm"), Delta(thinking="ha")]
    assert deltas[2] == Delta("Hi", logprobs=({"token": "Hi", "logprob": -1.0},))
    assert deltas[3] == Delta(tool_calls=(ToolCall("f", {"a": 1}, "c1"), ToolCall("g", {}, "call_made")), tokens=0)
    assert finish == Finish("stop", 7, 9, 2.5, prompt_s=0.5, output_s=2.0, cached_tokens=7)


def test_a_streamed_completion_with_logprobs_of_the_older_shape() -> None:
    told = {"tokens": ["a", "b"], "token_logprobs": [-1.0, None], "top_logprobs": [{"a": -1.0, "c": -2.0}, None]}
    deltas, finish = chunks(
        GenerateRequest("x", raw=True, logprobs=True, top_logprobs=2),
        {"choices": [{"text": "ab", "logprobs": told}]},
        {"choices": [{"text": "", "finish_reason": "length"}]},
    )
    top = [{"token": "a", "logprob": -1.0}, {"token": "c", "logprob": -2.0}]
    assert deltas == [Delta("ab", logprobs=({"token": "a", "logprob": -1.0, "top_logprobs": top},))]
    assert (finish.done_reason, finish.output_tokens) == ("length", 1)


def test_an_answer_without_an_end_and_one_with_an_error() -> None:
    with pytest.raises(EngineCrashed):
        chunks(CHAT, {"choices": [{"delta": {"content": "a"}}]})
    for error in ({"message": "no memory"}, "no memory"):
        with pytest.raises(EngineError, match="no memory"):
            chunks(CHAT, {"error": error})


def test_arguments_without_an_end_are_refused() -> None:
    endless = {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 600_000}}]}}]}
    with pytest.raises(EngineError, match="too long"):
        chunks(CHAT, endless, endless)


def test_a_digest_is_of_the_id_alone_and_never_changes() -> None:
    assert words.digest_of("org/m") == "e9d868ff354c4638b582db624391c64fcc284ca98465b28aa9a5525b39636e3f"
    assert words.digest_of("org/m") != words.digest_of("org/M")


def test_models_are_chosen_by_pattern_and_have_names_of_ours() -> None:
    ids = ["meta-llama/Llama-3.1-8B-Instruct", "/models/tiny-Q4_0.gguf", "gpt-4o", "gpt-4o", "", "a b/c d", "x" * 500]
    listing = words.Listing([words.ListedModel(one) for one in ids])
    names = [words.offer_of(model, "there").name for model in words.chosen(listing, ())]
    assert names == ["meta-llama/Llama-3.1-8B-Instruct:latest", "tiny-Q4_0:latest", "gpt-4o:latest", "a-b/c-d:latest"]
    assert [model.id for model in words.chosen(listing, ("GPT-*",))] == ["gpt-4o"]


def test_what_a_server_tells_of_a_model_is_kept() -> None:
    meta = words.Meta(512, 8192, 576, 134_515_008, 96_576_768)
    offer = words.offer_of(words.ListedModel("m", 1700000000, "llamacpp", meta=meta), "there")
    assert (offer.size, offer.details.context_length, offer.details.embedding_length) == (96_576_768, 512, 576)
    assert (offer.details.parameter_size, offer.modified_at_s) == ("0.1B", 1700000000.0)
    assert [words.server_of(words.ListedModel("m", owned_by=who)) for who in ("vllm", "llamacpp", "openai", None)] == [
        "vllm",
        "llama-server",
        "",
        "",
    ]


def test_texts_are_sent_as_they_are() -> None:
    request = EmbedRequest(("a", "b"), dimensions=3)
    assert words.embed_body(request, request.inputs, "m", "") == {
        "model": "m",
        "input": ["a", "b"],
        "encoding_format": "float",
    }
    assert words.embed_body(request, request.inputs, "m", "vllm")["truncate_prompt_tokens"] == -1


def test_a_model_of_a_server_is_ready_and_a_vllms_is_on_a_gpu() -> None:
    offers = [words.offer_of(words.ListedModel("m", owned_by=who), "there") for who in ("vllm", "llamacpp", "x")]
    assert [offer.device for offer in offers] == ["gpu", "cpu", "cpu"]
    assert all(offer.loaded is not None for offer in offers)
