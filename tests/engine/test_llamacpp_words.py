"""The wording between us and llama.cpp, on chunks as its server sends them."""

import re
from typing import Any

import pytest

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import (
    CapabilityMissing,
    ContextTooLong,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    MeshmaxError,
)
from meshmax.base.ids import Sha256
from meshmax.base.inference import ChatRequest, Delta, GenerateRequest, Message, Options, ToolCall
from meshmax.engine.call_ids import new_call_id
from meshmax.engine.llamacpp import load_words
from meshmax.engine.llamacpp_words import (
    LONGEST_LOOK_BACK,
    MAX_TOOL_CALLS,
    ChatReader,
    CompletionReader,
    chat_body,
    completion_body,
    error_of,
    infill_body,
    messages_of,
    reason_in_log,
    sampling,
)


@pytest.mark.parametrize(
    ("asked", "threads", "layers", "context"),
    [
        (Options(), 3, -1, 4096),
        (Options(num_thread=2, num_gpu=0, num_ctx=128), 2, 0, 128),
        (Options(num_thread=1 << 60, num_gpu=1 << 60, num_ctx=1 << 60), 3, 10_000, 1 << 22),
        (Options(num_thread=-5, num_gpu=-5, num_ctx=-5), 1, -1, 64),
    ],
)
def test_how_a_model_is_loaded_stays_within_what_an_engine_takes(
    asked: Options, threads: int, layers: int, context: int
) -> None:
    file = ModelFile(Sha256("a" * 64), "m", "/nowhere", 1, parameters=asked)
    words = load_words(file, EngineConfig(threads=3))
    assert (words["threads"], words["gpu_layers"], words["context_tokens"]) == (threads, layers, context)


def test_what_nobody_asked_for_is_ollamas_default_not_llamacpps() -> None:
    body = sampling(Options(), Options())
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"], body["n_predict"]) == (
        0.8,
        40,
        0.9,
        0.0,
        -1,
    )
    assert "seed" not in body


def test_repetition_is_looked_for_in_all_of_the_context_where_ollama_says_minus_one_which_llamacpp_does_not_take() -> (
    None
):
    assert sampling(Options(repeat_last_n=-1), Options())["repeat_last_n"] == LONGEST_LOOK_BACK
    assert sampling(Options(repeat_last_n=0), Options())["repeat_last_n"] == 0


def test_what_was_asked_wins_over_the_models_parameters_which_win_over_defaults() -> None:
    body = sampling(Options(temperature=0.0, stop=("a", "")), Options(temperature=0.5, top_k=3))
    assert (body["temperature"], body["top_k"], body["top_p"], body["stop"]) == (0.0, 3, 0.9, ["a"])


def test_a_seed_is_answered_without_cached_prompts_and_minus_one_is_random() -> None:
    assert sampling(Options(seed=7), Options())["cache_prompt"] is False
    random = sampling(Options(seed=-1), Options(seed=7))
    assert random["cache_prompt"] is True
    assert "seed" not in random


def test_the_models_system_text_is_said_unless_the_request_has_its_own() -> None:
    user = Message("user", "hi")
    own = {"role": "system", "content": "model's"}
    assert messages_of(ChatRequest((user,)), "model's")[0] == own
    assert messages_of(ChatRequest((Message("system", "mine"), user)), "model's")[0]["content"] == "mine"
    assert messages_of(GenerateRequest("hi"), "model's")[0] == own
    assert messages_of(GenerateRequest("hi", system=""), "model's") == [{"role": "user", "content": "hi"}]


def test_tool_turns_are_told_as_openai_tells_them() -> None:
    call = Message("assistant", tool_calls=(ToolCall("f", {"b": 1, "a": 2}),), thinking="hm")
    result = Message("tool", "42", tool_name="f", tool_call_id="call_0")
    said = messages_of(ChatRequest((call, result)), "")
    assert said[0]["tool_calls"] == [
        {"type": "function", "id": "call_0", "function": {"name": "f", "arguments": '{"b":1,"a":2}'}}
    ]
    assert said[0]["reasoning_content"] == "hm"
    assert said[1] == {"role": "tool", "content": "42", "tool_call_id": "call_0", "name": "f"}


def test_formats_become_constraints() -> None:
    schema = {"type": "object"}
    assert chat_body(ChatRequest(format="json"), "", Options())["response_format"] == {"type": "json_object"}
    body = chat_body(ChatRequest(format=schema), "", Options())
    assert body["response_format"]["json_schema"] == {"schema": schema}
    assert completion_body(GenerateRequest(format="json"), [1], Options())["json_schema"] == {"type": "object"}
    assert completion_body(GenerateRequest(format={"type": "array"}), [1], Options())["json_schema"] == {
        "type": "array"
    }


def test_think_tools_and_logprobs_are_passed_on() -> None:
    request = ChatRequest(tools=({"type": "function"},), think="high", logprobs=True)
    body = chat_body(request, "", Options())
    assert body["tools"] == [{"type": "function"}]
    assert body["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 1)
    assert completion_body(GenerateRequest(logprobs=True, top_logprobs=5), [1], Options())["n_probs"] == 5
    infill = infill_body(GenerateRequest("a", suffix="b", format="json", logprobs=True), Options())
    assert (infill["input_suffix"], infill["json_schema"], infill["n_probs"]) == ("b", {"type": "object"}, 1)


def test_ids_of_tool_calls_have_ollamas_form() -> None:
    assert re.fullmatch("call_[a-z0-9]{8}", new_call_id())
    assert new_call_id() != new_call_id()


def choice(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **more}]}


def test_a_chat_is_read_to_its_end() -> None:
    reader = ChatReader(0)
    assert reader.on_chunk(choice({"role": "assistant", "content": None})) is None
    assert reader.on_chunk(choice({"reasoning_content": "hm"})) == Delta(thinking="hm")
    assert reader.on_chunk(choice({"content": "Hi"})) == Delta("Hi")
    assert reader.on_chunk(choice({}, "length")) is None
    timings = {"cache_n": 24, "prompt_n": 8, "prompt_ms": 40.0, "predicted_n": 5, "predicted_ms": 100.0}
    assert reader.on_chunk({"choices": [], "usage": {"prompt_tokens": 32}, "timings": timings}) is None
    finish = reader.finish()
    assert (finish.done_reason, finish.prompt_tokens, finish.cached_tokens, finish.output_tokens) == (
        "length",
        32,
        24,
        5,
    )
    assert (finish.prompt_s, finish.output_s) == pytest.approx((0.04, 0.1))
    assert reader.text == "Hi"


def test_an_answer_that_just_ends_is_no_finished_one() -> None:
    for reader, chunk in ((ChatReader(0), choice({"content": "Hi"})), (CompletionReader(0), {"content": "Hi"})):
        assert reader.on_chunk(chunk) == Delta("Hi")
        with pytest.raises(EngineCrashed, match="before it was finished"):
            reader.finish()


def test_tool_calls_are_put_together_from_their_pieces() -> None:
    reader = ChatReader(0)
    reader.on_chunk(choice({"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a"'}}]}))
    reader.on_chunk(choice({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}))
    reader.on_chunk(choice({"tool_calls": [{"index": 1, "id": "y", "function": {"name": "g", "arguments": "no"}}]}))
    assert reader.tool_calls() == (ToolCall("f", {"a": 1}, "x"), ToolCall("g", {}, "y"))


def test_tool_calls_of_one_answer_are_bounded() -> None:
    reader = ChatReader(0)
    reader.on_chunk(choice({"tool_calls": [{"index": index} for index in range(MAX_TOOL_CALLS + 9)]}))
    assert len(reader.tool_calls()) == MAX_TOOL_CALLS


def test_logprobs_have_ollamas_shape_and_as_many_alternatives_as_asked() -> None:
    entry = {
        "id": 1,
        "token": "a",
        "bytes": [97],
        "logprob": -1.0,
        "top_logprobs": [{"id": 1, "token": "a", "logprob": -1.0}] * 3,
    }
    chunk = choice({"content": "a"}, logprobs={"content": [entry]})
    none, two = ChatReader(0).on_chunk(chunk), ChatReader(2).on_chunk(chunk)
    assert none is not None
    assert two is not None
    assert none.logprobs == ({"token": "a", "logprob": -1.0, "bytes": [97]},)
    assert two.logprobs[0]["top_logprobs"] == [{"token": "a", "logprob": -1.0}] * 2


def test_a_completion_is_read_to_its_end() -> None:
    reader = CompletionReader(0)
    assert reader.on_chunk({"content": " Paris", "stop": False}) == Delta(" Paris")
    last = {"content": "", "stop": True, "stop_type": "limit", "tokens_evaluated": 5, "timings": {"predicted_n": 1}}
    assert reader.on_chunk(last) is None
    finish = reader.finish()
    assert (finish.done_reason, finish.prompt_tokens, finish.output_tokens) == ("length", 5, 1)
    assert reader.tool_calls() == ()


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (
            400,
            b'{"error":{"type":"exceed_context_size_error","n_prompt_tokens":9,"n_ctx":5}}',
            ContextTooLong,
            "9 tokens",
        ),
        (501, b'{"error":{"type":"not_supported_error","message":"no infill"}}', CapabilityMissing, "no infill"),
        (503, b'{"error":{"type":"unavailable_error","message":"Loading"}}', EngineUnavailable, "Loading"),
        (400, b'{"error":{"type":"invalid_request_error","message":"bad"}}', InvalidRequest, "bad"),
        (500, b'{"error":{"type":"server_error","message":"oops"}}', EngineError, "oops"),
        (500, b"<html>", EngineError, "HTTP status 500"),
        (500, b'{"error":"text"}', EngineError, "HTTP status 500"),
        (500, b"[]", EngineError, "HTTP status 500"),
    ],
)
def test_errors_of_the_server_become_errors_of_our_tree(
    status: int, body: bytes, error: type[MeshmaxError], says: str
) -> None:
    found = error_of(status, body)
    assert type(found) is error
    assert says in found.message


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "0.00.1 I x: y\n0.00.2 E llama_model_load: error loading model: unknown architecture: 'x'\nz",
            "unknown architecture: 'x'",
        ),
        (
            "0.1 E llama_model_load: error loading model: error loading model hyperparameters: key not found: a.b\n",
            "key not found: a.b",
        ),
        ("0.1 E srv init: exiting\n", ""),
        (
            "0.1 E gguf_init: invalid magic\n0.2 E load: error loading model: x: failed to load model from /a\n",
            "invalid magic",
        ),
        ("0.2 E l: error loading model: x: failed to load model from /a/b\n", "its file cannot be read"),
        ("0.1 E load: error loading model: \x1b[31m" + "x" * 500, "[31m" + "x" * 196),
    ],
)
def test_why_a_model_was_not_loaded_is_read_from_the_log(log: str, reason: str) -> None:
    assert reason_in_log(log) == reason


def test_a_chunk_that_holds_several_tokens_counts_them() -> None:
    chat = ChatReader(0)
    texts = [("a", 1), ("\U0001f98a", 5), ("b", None), ("c", 6)]
    found = [
        chat.on_chunk({"choices": [{"delta": {"content": text}}], **({"timings": {"predicted_n": n}} if n else {})})
        for text, n in texts
    ]
    assert [delta.tokens for delta in found if delta] == [1, 4, 1, 1]
    bare = CompletionReader(0, "said ")
    delta = bare.on_chunk({"content": "more", "timings": {"predicted_n": 3}})
    assert delta == Delta("more", tokens=3)
    assert bare.text == "said more"


@pytest.mark.parametrize(("trained", "helps"), [(0, True), (5, False), (4, False), (6, True)])
def test_a_larger_context_is_advised_only_where_the_model_takes_one(trained: int, helps: bool) -> None:
    body = b'{"error":{"type":"exceed_context_size_error","n_prompt_tokens":9,"n_ctx":5}}'
    said = error_of(400, body, trained).message
    assert ("larger num_ctx" in said, "the model takes no more, shorten the prompt" in said) == (helps, not helps)
