"""Prompts in OpenAI's JSON as Ollama speaks it: requests into `base.inference` words, events into reply objects.

Rules (ollama-api 1.6): temperature and top_p default to 1.0; images come as data URIs only; a call's arguments are a JSON
string on this side and an object inside; a stream says the role once and its reason in a chunk of its own; what OpenAI has
and Ollama does not (tool_choice, n, logit_bias, user) is ignored. Not here: HTTP (openai_routes).
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Final, Literal

import msgspec

from meshmax.api.bodies import check_depth
from meshmax.api.ollama_words import (
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    Name,
    check_prompt_size,
    dimensions,
    embed_inputs,
    parse_format,
    parse_role,
    top_logprobs,
)
from meshmax.api.options import check_stop, parse_options
from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import (
    MAX_MESSAGES,
    ChatRequest,
    Delta,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Message,
    Options,
    Think,
    ToolCall,
)

MAX_PARTS: Final = 1024  # of one message's content
_IMAGE_PREFIXES: Final = tuple(
    f"data:{kind};base64," for kind in ("image/jpeg", "image/jpg", "image/png", "image/webp", "")
)
_EFFORTS: Final[dict[str, Think]] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "max": "max",
    "xhigh": "max",
    "ultra": "max",
}


class StreamOptions(msgspec.Struct):
    """``include_usage``: one more chunk with the counts."""

    include_usage: bool | None = None


class FunctionText(msgspec.Struct):
    """A call of a function; ``arguments`` is JSON text."""

    name: str
    arguments: str = ""


class CallBody(msgspec.Struct):
    """A call in an assistant's message."""

    function: FunctionText
    id: str | None = None


class TurnBody(msgspec.Struct):
    """One message; ``content`` is a text, a list of parts, or null beside tool calls."""

    role: str
    content: Any = None
    reasoning: str | None = None
    tool_calls: Annotated[list[CallBody], msgspec.Meta(max_length=MAX_TOOL_CALLS)] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class Reasoning(msgspec.Struct):
    """How hard to think."""

    effort: str | None = None


class _Sampling(msgspec.Struct):
    model: Name = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionBody(_Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[TurnBody], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(_Sampling):
    """The body of POST /v1/completions."""

    prompt: Any = None
    suffix: str | None = None
    logprobs: int | None = None


class EmbeddingBody(msgspec.Struct):
    """The body of POST /v1/embeddings."""

    model: Name = ""
    input: Any = None
    dimensions: int | None = None
    encoding_format: str | None = None


# --- requests ------------------------------------------------------------------------------------------------------


def chat_request(body: ChatCompletionBody) -> ChatRequest:
    """The request. Raises InvalidRequest."""
    if not body.messages:
        raise InvalidRequest("[] is too short - 'messages'")
    tools = tuple(body.tools or ())
    check_depth(list(tools), "tools")
    names: dict[str, str] = {}
    messages = tuple(_message(turn, names) for turn in body.messages)
    check_prompt_size(
        [message.content for message in messages], [image for message in messages for image in message.images]
    )
    return ChatRequest(
        messages=messages,
        tools=tools,
        format=_response_format(body.response_format),
        think=_think(body),
        logprobs=bool(body.logprobs),
        top_logprobs=top_logprobs(body.top_logprobs),
        options=_options(body),
    )


def completion_request(body: CompletionBody) -> GenerateRequest:
    """The request. Raises InvalidRequest."""
    if not isinstance(body.prompt, str):
        raise InvalidRequest("prompt must be a string")
    check_prompt_size((body.prompt, body.suffix or ""), ())
    return GenerateRequest(
        prompt=body.prompt,
        suffix=body.suffix or "",
        think=False,  # a plain completion has no place for thoughts
        logprobs=bool(body.logprobs),
        top_logprobs=top_logprobs(body.logprobs),
        options=_options(body),
    )


def embed_request(body: EmbeddingBody) -> EmbedRequest:
    """The request. Raises InvalidRequest."""
    inputs = embed_inputs(body.input, "invalid input")
    if not inputs:
        raise InvalidRequest("invalid input")
    if body.encoding_format not in (None, "", "float", "base64"):
        raise InvalidRequest("encoding_format must be 'float' or 'base64'")
    return EmbedRequest(inputs=inputs, dimensions=dimensions(body.dimensions))


def _options(body: _Sampling) -> Options:
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    given = {
        "num_predict": limit,
        "seed": body.seed,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
    }
    options, _ = parse_options(given)
    return msgspec.structs.replace(options, stop=_stop(body.stop))


def _stop(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InvalidRequest("stop must be a string or a list of strings")
    return check_stop(tuple(words))


def _response_format(given: dict[str, Any] | None) -> str | dict[str, Any] | None:
    kind = (given or {}).get("type")
    if kind in (None, "", "text"):
        return None
    if kind == "json_object":
        return "json"
    schema = (given or {}).get("json_schema")
    if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return parse_format(schema["schema"])
    raise InvalidRequest("response_format must be text, json_object, or json_schema with a schema")


def _think(body: ChatCompletionBody) -> Think:
    effort = body.reasoning.effort if body.reasoning and body.reasoning.effort else body.reasoning_effort
    if not effort:
        return None
    if effort not in _EFFORTS:
        raise InvalidRequest(f"invalid reasoning effort: {effort[:64]!r}; use one of {', '.join(_EFFORTS)}")
    return _EFFORTS[effort]


def _message(turn: TurnBody, names: dict[str, str]) -> Message:
    """``names`` maps ids of calls seen so far to their functions, since a tool's answer carries only the id."""
    text, images = _content(turn.content)
    calls = tuple(_tool_call(call) for call in turn.tool_calls or ())
    names.update({call.id: call.name for call in calls if call.id})
    call_id = turn.tool_call_id or ""
    role = "system" if turn.role == "developer" else parse_role(turn.role)
    return Message(
        role=role,
        content=text,
        thinking=turn.reasoning or "",
        images=images,
        tool_calls=calls,
        tool_name=(names.get(call_id, "") or turn.name or "") if role == "tool" else "",
        tool_call_id=call_id,
    )


def _content(given: Any) -> tuple[str, tuple[bytes, ...]]:
    if given is None or isinstance(given, str):
        return given or "", ()
    if not isinstance(given, list) or len(given) > MAX_PARTS or not all(isinstance(part, dict) for part in given):
        raise InvalidRequest(f"invalid message content type: a text, or a list of at most {MAX_PARTS} parts")
    texts: list[str] = []
    images: list[bytes] = []
    for part in given:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image_url":
            images.append(_image(part.get("image_url")))
        else:
            raise InvalidRequest("invalid message format: parts are of type text or image_url")
    return "\n".join(texts), tuple(images)


def _image(given: Any) -> bytes:
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise InvalidRequest("invalid image input")
    if url.startswith(("http://", "https://")):
        raise InvalidRequest("image URLs are not currently supported, please use base64 encoded data instead")
    prefix = next((prefix for prefix in _IMAGE_PREFIXES if url.startswith(prefix)), None)
    if prefix is None:
        raise InvalidRequest("invalid image input: a data URI of a jpeg, png or webp image in base64")
    try:
        return base64.b64decode(url[len(prefix) :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("invalid image input: not base64") from None


def _tool_call(body: CallBody) -> ToolCall:
    try:
        arguments = msgspec.json.decode(body.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("invalid tool call arguments: a JSON object as text") from None
    check_depth(arguments, "arguments")
    return ToolCall(name=body.function.name, arguments=arguments, id=body.id or "")


# --- replies -------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "tool_calls"]


def usage(event: Finish) -> dict[str, int]:
    """The counts of an answer."""
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.output_tokens,
        "total_tokens": event.prompt_tokens + event.output_tokens,
    }


def finish_reason(event: Finish, called: bool) -> FinishReason:
    """Why the answer ended; ``called``: it asked for tools."""
    if event.done_reason == "length":
        return "length"
    return "tool_calls" if called or event.done_reason == "tool_calls" else "stop"


def tool_call_json(call: ToolCall, index: int) -> dict[str, Any]:
    """A call as OpenAI writes it; arguments are JSON text."""
    arguments = msgspec.json.encode(call.arguments).decode()
    return {
        "id": call.id,
        "index": index,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


class ChatWriter:
    """Makes the objects of one chat completion. ``number`` is the id's, ``created_s`` Unix time."""

    def __init__(self, model: str, number: int, created_s: int) -> None:
        self._id = f"chatcmpl-{number}"
        self._model = model
        self._created = created_s
        self._spoken = False
        self._calls = 0

    def chunks(self, event: Delta) -> list[dict[str, Any]]:
        """The chunks of one event: thoughts in a chunk of their own."""
        deltas: list[dict[str, Any]] = []
        if event.thinking:
            deltas.append({"reasoning": event.thinking})
        if event.text or event.tool_calls or not event.thinking:
            delta: dict[str, Any] = {"content": event.text}
            if event.tool_calls:
                calls = enumerate(event.tool_calls, self._calls)
                delta["tool_calls"] = [tool_call_json(call, index) for index, call in calls]
                self._calls += len(event.tool_calls)
            deltas.append(delta)
        if not self._spoken:
            deltas[0] = {"role": "assistant", **deltas[0]}
            self._spoken = True
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        if event.logprobs:
            choices[-1]["logprobs"] = {"content": event.logprobs}
        return [self._object("chat.completion.chunk", [choice]) for choice in choices]

    def last_chunks(self, event: Finish, include_usage: bool) -> list[dict[str, Any]]:
        """The chunk with the reason and, if wanted, the one with the counts."""
        delta = {} if self._spoken else {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason(event, self._calls > 0)}
        found = [self._object("chat.completion.chunk", [choice])]
        if include_usage:
            found.append(self._object("chat.completion.chunk", []) | {"usage": usage(event)})
        return found

    def whole(self, joined: Delta, event: Finish) -> dict[str, Any]:
        """The one object of a reply that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": joined.text}
        if joined.thinking:
            message["reasoning"] = joined.thinking
        if joined.tool_calls:
            message["tool_calls"] = [tool_call_json(call, index) for index, call in enumerate(joined.tool_calls)]
        choice: dict[str, Any] = {"index": 0, "message": message}
        if joined.logprobs:
            choice["logprobs"] = {"content": joined.logprobs}
        choice["finish_reason"] = finish_reason(event, bool(joined.tool_calls))
        return self._object("chat.completion", [choice]) | {"usage": usage(event)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": "fp_ollama",
            "choices": choices,
        }


class CompletionWriter:
    """Makes the objects of one text completion."""

    def __init__(self, model: str, number: int, created_s: int) -> None:
        self._id = f"cmpl-{number}"
        self._model = model
        self._created = created_s

    def chunks(self, event: Delta) -> list[dict[str, Any]]:
        """The chunk of one event."""
        return [self._object([self._choice(event, None)])]

    def last_chunks(self, event: Finish, include_usage: bool) -> list[dict[str, Any]]:
        """The chunk with the reason and, if wanted, the one with the counts."""
        found = [self._object([self._choice(Delta(), finish_reason(event, called=False))])]
        if include_usage:
            found.append(self._object([]) | {"usage": usage(event)})
        return found

    def whole(self, joined: Delta, event: Finish) -> dict[str, Any]:
        """The one object of a reply that is not streamed."""
        choice = self._choice(joined, finish_reason(event, called=False))
        return self._object([choice]) | {"usage": usage(event)}

    def _choice(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": delta.text, "index": 0, "finish_reason": reason}
        if delta.logprobs:
            choice["logprobs"] = {"content": delta.logprobs}
        return choice

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": "fp_ollama",
            "choices": choices,
        }
