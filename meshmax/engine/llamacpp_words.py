"""Between our words and llama.cpp's HTTP interface: requests to JSON bodies, streamed chunks to events, errors to our tree.

Pure. What the person did not ask for is the model's own parameter, else Ollama's default (SAMPLING_DEFAULTS), never
llama.cpp's. A request with a seed of its own gets no cached prompt: a cached prefix changes the shape of the
arithmetic and with it the last bits, and the same seed is to give the same answer. Not here: connections (llamacpp),
templates (llama.cpp's own).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from meshmax.base.errors import (
    CapabilityMissing,
    ContextTooLong,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    MeshmaxError,
)
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    DoneReason,
    Finish,
    GenerateRequest,
    Message,
    Options,
    ToolCall,
    merge_options,
)
from meshmax.engine.openai_message import message_words

# Ollama's defaults; llama.cpp's own differ (top_p 0.95, min_p 0.05)
SAMPLING_DEFAULTS: Final = Options(
    num_predict=-1,
    num_keep=4,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.0,
    typical_p=1.0,
    repeat_last_n=64,
    repeat_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
)
# Tokens back for which repetition is punished where all of the context is meant (-1), which llama.cpp does not take; it keeps
# four bytes for each of them.
LONGEST_LOOK_BACK: Final = 1 << 17
MAX_TOOL_CALLS: Final = 128  # of one answer; a model that calls more is in a loop
_MS: Final = 1e-3
_MORE_CONTEXT: Final = (
    "shorten the prompt, ask with a larger num_ctx, or set engine.context_tokens of the peer that answers higher"
)
_CUT_OFF: Final = "the engine's answer ended before it was finished"

MAX_REASON: Final = 200  # characters of llama.cpp's own words on why it did not load a model
_CAUSE: Final = re.compile(r"^\S* E \S+: +(?:error loading model(?: [a-z]+)?: )+(.+)$", re.MULTILINE)

_NO_CAUSE: Final = "failed to load model from"
_BAD_FILE: Final = re.compile(r"^\S* E gguf_\S+: +(.+)$", re.MULTILINE)


def sampling(asked: Options, model: Options) -> dict[str, Any]:
    """The sampling part of a body."""
    options = merge_options(merge_options(asked, model), SAMPLING_DEFAULTS)
    seed = options.seed if options.seed is not None and options.seed >= 0 else None
    body: dict[str, Any] = {
        "n_predict": options.num_predict,
        "n_keep": options.num_keep,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "typical_p": options.typical_p,
        "repeat_last_n": LONGEST_LOOK_BACK if (options.repeat_last_n or 0) < 0 else options.repeat_last_n,
        "repeat_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "stop": [stop for stop in options.stop or () if stop],
        "cache_prompt": seed is None,
        "stream": True,
        "timings_per_token": True,  # so that every chunk tells how many tokens it holds
    }
    if seed is not None:
        body["seed"] = seed & 0xFFFFFFFF
    return body


def is_greedy(body: Mapping[str, Any]) -> bool:
    """Whether a body asks for the likeliest token each time."""
    return bool(body["temperature"] <= 0 or body["top_k"] == 1)


def messages_of(request: GenerateRequest | ChatRequest, system: str) -> list[dict[str, Any]]:
    """The conversation as llama.cpp takes it, with the model's ``system`` text if the request has none."""
    if isinstance(request, GenerateRequest):
        own = request.system if request.system is not None else system
        turns: tuple[Message, ...] = (Message("user", request.prompt),)
    else:
        own = "" if any(message.role == "system" for message in request.messages) else system
        turns = request.messages
    return list(map(message_words, (Message("system", own), *turns) if own else turns))


def chat_body(request: GenerateRequest | ChatRequest, system: str, model: Options) -> dict[str, Any]:
    """The body for /v1/chat/completions."""
    body = sampling(request.options, model)
    body["messages"] = messages_of(request, system)
    body["stream_options"] = {"include_usage": True}
    if isinstance(request, ChatRequest) and request.tools:
        body["tools"] = list(request.tools)
    if request.format == "json":
        body["response_format"] = {"type": "json_object"}
    elif isinstance(request.format, dict):
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": request.format}}
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": max(1, request.top_logprobs)}
    return body | _thinking(request)


def template_body(request: GenerateRequest | ChatRequest, system: str) -> dict[str, Any]:
    """The body for /apply-template."""
    return {"messages": messages_of(request, system)} | _thinking(request)


def _thinking(request: GenerateRequest | ChatRequest) -> dict[str, Any]:
    if request.think is None:
        return {}
    kwargs: dict[str, Any] = {"enable_thinking": bool(request.think)}
    if isinstance(request.think, str):
        kwargs["reasoning_effort"] = request.think
    return {"chat_template_kwargs": kwargs}


def completion_body(request: GenerateRequest, tokens: list[int], model: Options) -> dict[str, Any]:
    """The body for /completion, of a prompt that is in tokens already."""
    return bare_body(request, model) | {"prompt": tokens}


def infill_body(request: GenerateRequest, model: Options) -> dict[str, Any]:
    """The body for /infill: what stands between prompt and suffix."""
    return bare_body(request, model) | {"input_prefix": request.prompt, "input_suffix": request.suffix}


def bare_body(request: GenerateRequest | ChatRequest, model: Options) -> dict[str, Any]:
    """A body for /completion or /infill that lacks only the prompt."""
    body = sampling(request.options, model)
    if request.format == "json":
        body["json_schema"] = {"type": "object"}
    elif isinstance(request.format, dict):
        body["json_schema"] = request.format
    if request.logprobs:
        body["n_probs"] = max(1, request.top_logprobs)
    return body


class _Count:
    """Counts the tokens of chunks: one may hold several, since half characters and begun stop words are held back."""

    def __init__(self) -> None:
        self._seen = 0

    def more(self, chunk: Mapping[str, Any]) -> int:
        """How many have come with ``chunk``."""
        now = (chunk.get("timings") or {}).get("predicted_n")
        if not isinstance(now, int):
            return 1
        new, self._seen = max(0, now - self._seen), max(now, self._seen)
        return new


class ChatReader:
    """Reads the chunks of /v1/chat/completions. Tool calls come whole, at the end; ``text`` is what was said so far."""

    def __init__(self, top_logprobs: int, said: str = "") -> None:
        """``said``: by another peer, before this begins."""
        self._top = top_logprobs
        self._count = _Count()
        self._calls: dict[int, list[str]] = {}
        self._reason = ""
        self._last: Mapping[str, Any] = {}
        self.text = said

    def on_chunk(self, chunk: Mapping[str, Any]) -> Delta | None:
        """What the chunk adds to the answer, if anything."""
        if "timings" in chunk or "usage" in chunk:
            self._last = {**self._last, **chunk}
        choices = chunk.get("choices") or ()
        if not choices:
            return None
        choice = choices[0]
        self._reason = choice.get("finish_reason") or self._reason
        delta = choice.get("delta") or {}
        self._collect(delta.get("tool_calls") or ())
        text, thinking = delta.get("content") or "", delta.get("reasoning_content") or ""
        if not text and not thinking:
            return None
        self.text += text
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        return Delta(text, thinking, logprobs=_logprobs(logprobs, self._top), tokens=self._count.more(chunk))

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The functions that the model wants called; arguments that are no JSON object are an empty one."""
        return tuple(ToolCall(name, _arguments(text), id_) for id_, name, text in self._calls.values())

    def finish(self) -> Finish:
        """The end of the answer, with llama.cpp's own counts and times. Raises EngineCrashed if there was none."""
        if not self._reason:
            raise EngineCrashed(_CUT_OFF)
        usage = self._last.get("usage") or {}
        reason: DoneReason = "length" if self._reason == "length" else "stop"
        return _finish(reason, self._last.get("timings") or {}, usage.get("prompt_tokens"))

    def _collect(self, parts: Any) -> None:
        for part in parts:
            index = int(part.get("index") or 0)
            if index not in self._calls and len(self._calls) >= MAX_TOOL_CALLS:
                continue
            call = self._calls.setdefault(index, ["", "", ""])
            function = part.get("function") or {}
            for place, piece in enumerate((part.get("id"), function.get("name"), function.get("arguments"))):
                call[place] += piece or ""


class CompletionReader:
    """Reads the chunks of /completion and /infill."""

    def __init__(self, top_logprobs: int, said: str = "") -> None:
        """``said``: by another peer, before this begins."""
        self._top = top_logprobs
        self._count = _Count()
        self._last: Mapping[str, Any] = {}
        self.text = said

    def on_chunk(self, chunk: Mapping[str, Any]) -> Delta | None:
        """What the chunk adds to the answer, if anything."""
        if chunk.get("stop"):
            self._last = chunk
        text = chunk.get("content") or ""
        if not text:
            return None
        self.text += text
        logprobs = _logprobs(chunk.get("completion_probabilities") or (), self._top)
        return Delta(text, logprobs=logprobs, tokens=self._count.more(chunk))

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """None: a bare prompt knows no tools."""
        return ()

    def finish(self) -> Finish:
        """The end of the answer, with llama.cpp's own counts and times. Raises EngineCrashed if there was none."""
        if not self._last:
            raise EngineCrashed(_CUT_OFF)
        reason: DoneReason = "length" if self._last.get("stop_type") == "limit" else "stop"
        return _finish(reason, self._last.get("timings") or {}, self._last.get("tokens_evaluated"))


def error_of(status: int, body: bytes, trained: int = 0) -> MeshmaxError:
    """What llama.cpp's error answer means. ``trained``: tokens that the model takes at most; 0: it does not say."""
    try:
        told = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except msgspec.DecodeError:
        told = None
    error = told if isinstance(told, dict) else {}
    kind, message = str(error.get("type") or ""), str(error.get("message") or f"HTTP status {status}")[:2000]
    if kind == "exceed_context_size_error":
        tokens, context = error.get("n_prompt_tokens"), error.get("n_ctx")
        most = isinstance(context, int) and 0 < trained <= context
        remedy = "the model takes no more, shorten the prompt" if most else _MORE_CONTEXT
        return ContextTooLong(
            f"the prompt has {tokens} tokens, the model's context {context}: {remedy}",
            tokens if isinstance(tokens, int) and tokens > 0 else 0,
        )
    if status == 501 or kind == "not_supported_error":
        return CapabilityMissing(message)
    if status == 503 or kind == "unavailable_error":
        return EngineUnavailable(message)
    if status == 400 or kind == "invalid_request_error":
        return InvalidRequest(message)
    return EngineError(message)


def reason_in_log(text: str) -> str:
    """Why llama.cpp did not load a model, in its own words out of what it printed; '' if it does not say."""
    found = _CAUSE.search(text)
    if found is None:
        return ""
    if _NO_CAUSE in found[1]:  # that names a path of this machine, and the cause stands before it, if anywhere
        found = _BAD_FILE.search(text)
        if found is None:
            return "its file cannot be read"
    return "".join(c for c in found[1].strip() if c.isprintable())[:MAX_REASON]


def _arguments(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def _logprobs(entries: Any, top: int) -> tuple[dict[str, Any], ...]:
    """Ollama's shape: no token ids, and as many alternatives as were asked for."""
    read = []
    for entry in entries:
        words = {key: entry[key] for key in ("token", "logprob", "bytes") if key in entry}
        if top:
            others = entry.get("top_logprobs") or ()
            words["top_logprobs"] = [{k: o[k] for k in ("token", "logprob", "bytes") if k in o} for o in others[:top]]
        read.append(words)
    return tuple(read)


def _finish(reason: DoneReason, timings: Mapping[str, Any], prompt_tokens: Any) -> Finish:
    cached, read = int(timings.get("cache_n") or 0), int(timings.get("prompt_n") or 0)
    prompt_s = float(timings.get("prompt_ms") or 0.0) * _MS
    output_s = float(timings.get("predicted_ms") or 0.0) * _MS
    return Finish(
        reason,
        prompt_tokens=int(prompt_tokens) if prompt_tokens is not None else cached + read,
        output_tokens=int(timings.get("predicted_n") or 0),
        total_s=prompt_s + output_s,
        prompt_s=prompt_s,
        output_s=output_s,
        cached_tokens=cached,
    )
