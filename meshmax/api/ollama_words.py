"""Prompts in Ollama's JSON: requests into `base.inference` words, events into reply objects.

Pure translation, field by field after Ollama's api/types.go: the order of reply fields is that of its structs, what is
zero is left out (not load_duration, which Ollama always has and clients calculate with), durations are integer nanoseconds.
Requests are typed loosely where Ollama is (null and "" mean not given) and bounded everywhere. Not here: lists and facts of
models (ollama_models), HTTP (ollama_routes).
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import Annotated, Any, Final

import msgspec

from meshmax.api.bodies import check_depth
from meshmax.api.options import parse_options
from meshmax.api.stamps import nanoseconds, rfc3339
from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import (
    MAX_INPUTS,
    MAX_MESSAGES,
    MAX_PROMPT_BYTES,
    ChatRequest,
    Delta,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Message,
    Role,
    Think,
    ToolCall,
)
from meshmax.base.units import MIB, parse_duration_s

MAX_TOOLS: Final = 512
MAX_IMAGES: Final = 256  # of one message
MAX_TOOL_CALLS: Final = 256  # of one message
MAX_CONTEXT: Final = MIB  # tokens of an earlier conversation; the longest contexts have a million
MAX_DIMENSIONS: Final = 65536
THINK_LEVELS: Final = ("high", "medium", "low", "max")
_ROLES: Final[dict[str, Role]] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_FOR_EVER_S: Final = float((1 << 63) - 1) / 1e9  # Go's longest duration

Name = Annotated[str, msgspec.Meta(max_length=1000)]
Images = Annotated[list[str], msgspec.Meta(max_length=MAX_IMAGES)] | None
KeepAlive = float | str | None


class GenerateBody(msgspec.Struct):
    """The body of POST /api/generate."""

    model: Name = ""
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: Annotated[list[int], msgspec.Meta(max_length=MAX_CONTEXT)] | None = None
    stream: bool | None = None
    raw: bool | None = None
    format: Any = None
    keep_alive: KeepAlive = None
    images: Images = None
    options: dict[str, Any] | None = None
    think: Any = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    debug_render_only: bool | None = msgspec.field(default=None, name="_debug_render_only")


class FunctionBody(msgspec.Struct):
    """A call of a function; ``arguments`` is an object."""

    name: str
    arguments: dict[str, Any] | None = None
    index: int | None = None


class ToolCallBody(msgspec.Struct):
    """A call in a message."""

    function: FunctionBody
    id: str | None = None


class MessageBody(msgspec.Struct):
    """One turn of a conversation."""

    role: str = ""
    content: str | None = None
    thinking: str | None = None
    images: Images = None
    tool_calls: Annotated[list[ToolCallBody], msgspec.Meta(max_length=MAX_TOOL_CALLS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(msgspec.Struct):
    """The body of POST /api/chat."""

    model: Name = ""
    messages: Annotated[list[MessageBody], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    stream: bool | None = None
    format: Any = None
    keep_alive: KeepAlive = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    options: dict[str, Any] | None = None
    think: Any = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    debug_render_only: bool | None = msgspec.field(default=None, name="_debug_render_only")


class EmbedBody(msgspec.Struct):
    """The body of POST /api/embed."""

    model: Name = ""
    input: Any = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


class EmbeddingsBody(msgspec.Struct):
    """The body of POST /api/embeddings, the older interface."""

    model: Name = ""
    prompt: str | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


# --- requests ------------------------------------------------------------------------------------------------------


def keep_alive_s(given: KeepAlive) -> float | None:
    """Seconds to keep the model: None the node's default, negative for ever. Raises InvalidRequest."""
    if given is None:
        return None
    seconds = parse_duration_s(given) if isinstance(given, str) else float(given)
    if not math.isfinite(seconds):
        raise InvalidRequest("keep_alive must be a number of seconds or a duration like 5m")
    return -1.0 if seconds < 0 or seconds > _FOR_EVER_S else seconds


def parse_format(given: Any) -> str | dict[str, Any] | None:
    """None, "json" or a JSON schema. Raises InvalidRequest."""
    if given in (None, ""):
        return None
    if given == "json":
        return "json"
    if isinstance(given, dict):
        check_depth(given, "format")
        return given
    shown = msgspec.json.encode(given).decode()[:100]
    raise InvalidRequest(f'invalid format: {shown}; expected "json" or a valid JSON Schema object')


def parse_think(given: Any) -> Think:
    """None, a bool or a level. Raises InvalidRequest."""
    if given is None or isinstance(given, bool):
        return given
    if given in THINK_LEVELS:
        return given  # type: ignore[no-any-return]
    shown = msgspec.json.encode(given).decode()[:100]
    raise InvalidRequest(f'invalid think value: {shown} (must be "high", "medium", "low", "max", true, or false)')


def decode_images(given: list[str] | None) -> tuple[bytes, ...]:
    """The bytes of base64 images. Raises InvalidRequest."""
    try:
        return tuple(base64.b64decode(text, validate=True) for text in given or ())
    except (binascii.Error, ValueError):
        raise InvalidRequest("illegal base64 data: images are base64 texts without a prefix") from None


def generate_request(body: GenerateBody) -> tuple[GenerateRequest, list[str]]:
    """The request and the names of ignored options. Raises InvalidRequest."""
    if body.raw and (body.template or body.system or body.context):
        raise InvalidRequest("raw mode does not support template, system, or context")
    options, ignored = parse_options(body.options or {})
    _check_debug(body.debug_render_only)
    request = GenerateRequest(
        prompt=body.prompt or "",
        suffix=body.suffix or "",
        system=body.system or None,
        template=body.template or None,
        raw=bool(body.raw),
        images=decode_images(body.images),
        context=_context(body.context or []),
        format=parse_format(body.format),
        think=parse_think(body.think),
        logprobs=bool(body.logprobs),
        top_logprobs=top_logprobs(body.top_logprobs),
        options=options,
    )
    check_prompt_size((request.prompt, request.suffix, body.system or "", body.template or ""), request.images)
    return request, ignored


def chat_request(body: ChatBody) -> tuple[ChatRequest, list[str]]:
    """The request and the names of ignored options. Raises InvalidRequest."""
    options, ignored = parse_options(body.options or {})
    _check_debug(body.debug_render_only)
    tools = tuple(body.tools or ())
    check_depth(list(tools), "tools")
    messages = tuple(_message(message) for message in body.messages or ())
    check_prompt_size(
        [message.content for message in messages], [image for message in messages for image in message.images]
    )
    return ChatRequest(
        messages=messages,
        tools=tools,
        format=parse_format(body.format),
        think=parse_think(body.think),
        logprobs=bool(body.logprobs),
        top_logprobs=top_logprobs(body.top_logprobs),
        options=options,
    ), ignored


def embed_request(body: EmbedBody) -> tuple[EmbedRequest, list[str]]:
    """The request and the names of ignored options; no inputs where there is nothing to embed. Raises InvalidRequest."""
    options, ignored = parse_options(body.options or {})
    return EmbedRequest(
        inputs=embed_inputs(body.input),
        truncate=body.truncate is not False,
        dimensions=dimensions(body.dimensions),
        options=options,
    ), ignored


def embeddings_request(body: EmbeddingsBody) -> tuple[EmbedRequest, list[str]]:
    """The older interface's request: one text, the vector as the model gives it. Raises InvalidRequest."""
    options, ignored = parse_options(body.options or {})
    return EmbedRequest(inputs=embed_inputs(body.prompt), normalize=False, options=options), ignored


def embed_inputs(given: Any, refusal: str = "invalid input type") -> tuple[str, ...]:
    """The texts of a string, a list of strings or null. Raises InvalidRequest with ``refusal`` for anything else."""
    if given in (None, ""):
        return ()
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(refusal)
    if len(texts) > MAX_INPUTS:
        raise InvalidRequest(f"input: at most {MAX_INPUTS} texts in one request")
    check_prompt_size(texts, ())
    return tuple(texts)


def dimensions(given: int | None) -> int | None:
    """How many dimensions to keep, None for all, which are also meant by a negative number. Raises InvalidRequest."""
    if not given or given < 0:
        return None
    if given > MAX_DIMENSIONS:
        raise InvalidRequest(f"dimensions must be between 1 and {MAX_DIMENSIONS}")
    return given


def top_logprobs(given: int | None) -> int:
    """How many alternatives a token is shown with. Raises InvalidRequest."""
    if not 0 <= (given or 0) <= 20:
        raise InvalidRequest("top_logprobs must be between 0 and 20")
    return given or 0


def check_prompt_size(texts: Any, images: Any) -> None:
    """Hold a prompt to MAX_PROMPT_BYTES. Raises InvalidRequest."""
    size = sum(len(text.encode()) for text in texts) + sum(len(image) for image in images)
    if size > MAX_PROMPT_BYTES:
        raise InvalidRequest(f"the prompt has {size} bytes with its images, at most {MAX_PROMPT_BYTES} are accepted")


def _check_debug(given: bool | None) -> None:
    if given:
        raise InvalidRequest("_debug_render_only is not offered by this version of meshmax")


def _context(given: list[int]) -> tuple[int, ...]:
    if not all(0 <= token < 1 << 31 for token in given):
        raise InvalidRequest("context must hold the tokens of an earlier answer")
    return tuple(given)


def _message(body: MessageBody) -> Message:
    return Message(
        role=parse_role(body.role),
        content=body.content or "",
        thinking=body.thinking or "",
        images=decode_images(body.images),
        tool_calls=tuple(_tool_call(call) for call in body.tool_calls or ()),
        tool_name=body.tool_name or "",
        tool_call_id=body.tool_call_id or "",
    )


def parse_role(given: str) -> Role:
    """A role in any case. Raises InvalidRequest."""
    if (role := _ROLES.get(given.lower())) is not None:
        return role
    raise InvalidRequest(f'invalid role: {given[:64]!r}; must be one of "system", "user", "assistant", or "tool"')


def _tool_call(body: ToolCallBody) -> ToolCall:
    arguments = body.function.arguments or {}
    check_depth(arguments, "arguments")
    return ToolCall(name=body.function.name, arguments=arguments, id=body.id or "")


# --- replies -------------------------------------------------------------------------------------------------------


class Remote(msgspec.Struct, frozen=True):
    """Where a model answers that is not here: the peer's name and the model's name there."""

    host: str
    model: str


class ReplyWriter:
    """Makes the reply objects of one prompt. ``chat`` chooses /api/chat's shape over /api/generate's."""

    def __init__(self, model: str, chat: bool, remote: Remote | None = None) -> None:
        self._model = model
        self._chat = chat
        self._remote = remote

    def on_moved(self, remote: Remote | None) -> None:
        """From the next line on ``remote`` answers."""
        self._remote = remote

    def delta(self, event: Delta, now_s: float) -> dict[str, Any]:
        """One line of a stream."""
        reply = self._head(now_s)
        calls = [tool_call_json(call, index) for index, call in enumerate(event.tool_calls)]
        if self._chat:
            reply["message"] = _assistant(event.text, event.thinking, calls)
        else:
            reply["response"] = event.text
            if event.thinking:
                reply["thinking"] = event.thinking
        reply["done"] = False
        if calls and not self._chat:
            reply["tool_calls"] = calls
        if event.logprobs:
            reply["logprobs"] = event.logprobs
        return reply

    def finish(self, event: Finish, now_s: float, whole: Delta | None = None) -> dict[str, Any]:
        """The last line of a stream, or with ``whole`` (everything joined) the one object of a reply that is not streamed."""
        reply = self.delta(whole or Delta(), now_s)
        tail: dict[str, Any] = {name: reply.pop(name) for name in ("tool_calls", "logprobs") if name in reply}
        reply["done"] = True
        # Ollama tells of tool calls by their presence alone; its reason stays "stop".
        reply["done_reason"] = "stop" if event.done_reason == "tool_calls" else event.done_reason
        if event.done_reason in ("load", "unload"):
            return reply
        if event.context and not self._chat:
            reply["context"] = event.context
        return {**reply, **measures(event), **tail} if not self._chat else {**reply, **tail, **measures(event)}

    def _head(self, now_s: float) -> dict[str, Any]:
        head: dict[str, Any] = {"model": self._model}
        if self._remote:
            head |= {"remote_model": self._remote.model, "remote_host": self._remote.host}
        head["created_at"] = rfc3339(now_s)
        return head


def measures(event: Finish) -> dict[str, int]:
    """Ollama's metrics of an answer; what is zero is left out, but for ``load_duration``: Ollama's is never quite zero."""
    found = {
        "total_duration": nanoseconds(event.total_s),
        "load_duration": nanoseconds(event.load_s),
        "prompt_eval_count": event.prompt_tokens,
        "prompt_eval_duration": nanoseconds(event.prompt_s),
        "eval_count": event.output_tokens,
        "eval_duration": nanoseconds(event.output_s),
    }
    return {name: value for name, value in found.items() if value or name == "load_duration"}


def tool_call_json(call: ToolCall, index: int) -> dict[str, Any]:
    """A call as Ollama writes it; arguments are an object."""
    shown: dict[str, Any] = {"id": call.id} if call.id else {}
    return shown | {"function": {"index": index, "name": call.name, "arguments": call.arguments}}


def join(deltas: list[Delta]) -> Delta:
    """Everything that ``deltas`` carry, as one."""
    return Delta(
        text="".join(delta.text for delta in deltas),
        thinking="".join(delta.thinking for delta in deltas),
        tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        tokens=sum(delta.tokens for delta in deltas),
    )


def _assistant(content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message
