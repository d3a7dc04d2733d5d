"""Between our words and Ollama's HTTP interface: requests to JSON bodies, its lines to events, its lists to offers.

Pure, nearly one to one: our words were made after Ollama's. A model's digest in /api/tags is the sha256 of its manifest, so
a model of an Ollama and the same model in the mesh are one. Models that Ollama itself runs elsewhere (``remote_host``) are
not offered: nobody asked for their prompts to leave this network. Not here: connections (ollama), bounds of text
(server_words).
"""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import msgspec

from meshmax.base.catalog import InMemory, ModelDescription, OfferedModel
from meshmax.base.errors import CapabilityMissing, EngineCrashed, EngineError
from meshmax.base.ids import HEX64, Sha256
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    DoneReason,
    Finish,
    GenerateRequest,
    Message,
    Said,
    ToolCall,
)
from meshmax.base.model import ModelDetails
from meshmax.engine import server_words as shared

MAX_DESCRIBED_BYTES: Final = 128 << 10  # of each text of a description, so that it fits a frame with the others
MAX_INFO_ITEMS: Final = 512  # key-values of a description
LONG_ARRAY: Final = 5  # items of one of its arrays that is kept
MAX_CONTEXT: Final = 1 << 20  # tokens of a conversation

_NS: Final = 1e-9
_FRACTION: Final = re.compile(r"(\.\d{6})\d+")
_PARAMETER: Final = re.compile(r"^(\S+)\s+(.+)$", re.MULTILINE)
_OPEN_END: Final = re.compile(r"\$last\b")  # a template that leaves the last turn open where it is the assistant's


class Details(msgspec.Struct):
    """``details`` of a model; Ollama writes null for an empty list."""

    format: str | None = None
    family: str | None = None
    families: list[str] | None = None
    parameter_size: str | None = None
    quantization_level: str | None = None
    context_length: int | None = None
    embedding_length: int | None = None


class Tag(msgspec.Struct):
    """A model in /api/tags and /api/ps."""

    name: str = ""
    model: str = ""
    digest: str = ""
    size: int = 0
    modified_at: str = ""
    details: Details | None = None
    capabilities: list[str] | None = None
    remote_host: str | None = None
    size_vram: int = 0
    context_length: int = 0
    expires_at: str = ""


class Tags(msgspec.Struct):
    """The reply of /api/tags and of /api/ps."""

    models: list[Tag] | None = None


class Version(msgspec.Struct):
    """The reply of /api/version."""

    version: str


class Shown(msgspec.Struct):
    """The reply of /api/show, as far as it is used."""

    license: str | None = None
    parameters: str | None = None
    template: str | None = None
    system: str | None = None
    renderer: str | None = None
    details: Details | None = None
    model_info: dict[str, Any] | None = None
    capabilities: list[str] | None = None
    modified_at: str = ""


class Function(msgspec.Struct):
    """The function of a call."""

    name: str = ""
    arguments: dict[str, Any] = {}


class Call(msgspec.Struct):
    """A call in a message."""

    function: Function
    id: str = ""


class Turn(msgspec.Struct):
    """The message of a chat's line."""

    content: str = ""
    thinking: str = ""
    tool_calls: list[Call] | None = None


class Line(msgspec.Struct):
    """A line of /api/chat or /api/generate."""

    message: Turn | None = None
    response: str = ""
    thinking: str = ""
    tool_calls: list[Call] | None = None
    logprobs: Any = None
    done: bool = False
    done_reason: str = ""
    error: str = ""
    context: list[int] | None = None
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class Vectors(msgspec.Struct):
    """The reply of /api/embed, and with ``embedding`` of /api/embeddings."""

    embeddings: list[list[float]] | None = None
    embedding: list[float] | None = None
    prompt_eval_count: int = 0


# --- what it has ---------------------------------------------------------------------------------------------------


def offers(tags: Tags, running: Tags, origin: str, known: dict[Sha256, ModelDetails]) -> tuple[OfferedModel, ...]:
    """The models of an Ollama. ``known``: details that were asked for one by one."""
    memory = {tag.digest: tag for tag in running.models or ()}
    found: list[OfferedModel] = []
    for tag in (tags.models or ())[: shared.MAX_OFFERED]:
        name = shared.name_of(tag.model or tag.name)
        if tag.remote_host or not name or not HEX64.fullmatch(tag.digest) or tag.size < 0:
            continue
        digest = Sha256(tag.digest)
        loaded = memory.get(tag.digest)
        found.append(
            OfferedModel(
                name,
                digest,
                "ollama",
                origin,
                tag.size,
                known.get(digest) or details_of(tag.details, tag.capabilities),
                _unix_s(tag.modified_at) or 0.0,
                in_memory(loaded) if loaded else None,
            )
        )
    return tuple(found)


def in_memory(tag: Tag) -> InMemory:
    """How a model of /api/ps is loaded."""
    expires_at_s = _unix_s(tag.expires_at)
    for_ever = expires_at_s is None
    return InMemory(
        max(tag.size, 0), max(tag.size_vram, 0), max(tag.context_length, 0), None if for_ever else expires_at_s
    )


def details_of(details: Details | None, capabilities: list[str] | None) -> ModelDetails:
    """Details as ours, bounded."""
    told = details or Details()
    return ModelDetails(
        format=shared.plain(told.format or ""),
        family=shared.plain(told.family or ""),
        families=tuple(map(shared.plain, (told.families or ())[:8])),
        parameter_size=shared.plain(told.parameter_size or ""),
        quantization_level=shared.plain(told.quantization_level or ""),
        context_length=max(told.context_length or 0, 0),
        embedding_length=max(told.embedding_length or 0, 0),
        capabilities=tuple(map(shared.plain, (capabilities or ())[:16])),
    )


def details_shown(shown: Shown) -> ModelDetails:
    """Details out of /api/show, whose model_info has the lengths."""
    details = details_of(shown.details, shown.capabilities)
    info = shown.model_info or {}
    lengths = {}
    for wanted in ("context_length", "embedding_length"):
        value = next((v for key, v in info.items() if key.endswith(f".{wanted}")), 0)
        lengths[wanted] = value if isinstance(value, int) and 0 <= value < 1 << 40 else 0
    return msgspec.structs.replace(details, **{key: value for key, value in lengths.items() if value})


def description_of(digest: Sha256, shown: Shown) -> ModelDescription:
    """What /api/show tells, bounded so that it fits a frame."""
    info = dict(list((shown.model_info or {}).items())[:MAX_INFO_ITEMS])
    return ModelDescription(
        digest,
        details_shown(shown),
        {shared.plain(key): _info(value) for key, value in info.items()},
        _cut(shown.template),
        _cut(shown.system),
        _cut(shown.license),
        {key: _number(value) for key, value in _PARAMETER.findall(_cut(shown.parameters))[:64]},
        _unix_s(shown.modified_at) or 0.0,
    )


def goes_on(shown: Shown) -> bool:
    """Whether this model's template leaves the last turn open, so that an assistant's turn that was begun goes on.

    Ollama cuts templates of the older kind (no .Messages) off at .Response; newer ones say so themselves, by $last.
    Models with a renderer built into Ollama have none to look at.
    """
    template = shown.template or ""
    if shown.renderer or not template:
        return False
    if ".Messages" not in template:
        return ".Response" in template
    return bool(_OPEN_END.search(template))


# --- requests ------------------------------------------------------------------------------------------------------


def chat_body(request: ChatRequest, model: str) -> dict[str, Any]:
    """The body for /api/chat; an answer that was begun is its last message."""
    messages = [*request.messages, *_begun(request.said)]
    body = _common(request, model) | {"messages": list(map(_message, messages))}
    if request.tools:
        body["tools"] = list(request.tools)
    return body


def generate_body(request: GenerateRequest, model: str) -> dict[str, Any]:
    """The body for /api/generate. An answer that was begun follows a raw prompt; others are asked as a chat."""
    prompt = request.prompt + (request.said.text if request.said else "")
    body = _common(request, model) | {"prompt": prompt, "raw": request.raw}
    for key in ("suffix", "system", "template"):
        if getattr(request, key):
            body[key] = getattr(request, key)
    if request.images:
        body["images"] = list(map(_base64, request.images))
    if request.context:
        body["context"] = list(request.context)
    return body


def as_chat(request: GenerateRequest) -> ChatRequest | None:
    """The chat that a templated prompt stands for, as Ollama makes it; None where there is none."""
    if request.raw or request.context or request.suffix or request.template is not None:
        return None
    system = (Message("system", request.system),) if request.system else ()
    turn = Message("user", request.prompt, images=request.images)
    return ChatRequest(
        (*system, turn),
        format=request.format,
        think=request.think,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        options=request.options,
        said=request.said,
    )


def refuse_continuing(request: GenerateRequest | ChatRequest) -> None:
    """Raises CapabilityMissing for an answer that cannot be gone on with, whatever the model's template."""
    said = request.said
    if said is None:
        return
    if request.format is not None:
        raise CapabilityMissing("an answer in a given format cannot be continued here: its grammar begins anew")
    if isinstance(request, ChatRequest) and request.tools:
        raise CapabilityMissing("an answer that may call tools cannot be continued here")
    if said.thinking and not said.text:
        raise CapabilityMissing("an answer cannot be continued here in the middle of its thinking")
    if isinstance(request, GenerateRequest) and not request.raw and as_chat(request) is None:
        raise CapabilityMissing("an answer to a prompt with context, suffix or template cannot be continued here")


def refuse_images(request: GenerateRequest | ChatRequest, model: str, capabilities: Collection[str]) -> None:
    """Raises CapabilityMissing for images that nobody would look at: a real Ollama answers as if they had not been there.

    A model whose capabilities are not known is left to the daemon.
    """
    turns: Iterable[Message | GenerateRequest] = request.messages if isinstance(request, ChatRequest) else (request,)
    if capabilities and "vision" not in capabilities and any(turn.images for turn in turns):
        raise CapabilityMissing(f'"{model}" does not support vision')


def _common(request: ChatRequest | GenerateRequest, model: str) -> dict[str, Any]:
    options = shared.sampling(request.options)
    if request.said and (limit := options.get("num_predict")) is not None and limit >= 0:
        options["num_predict"] = max(1, limit - request.said.tokens)
    body: dict[str, Any] = {"model": model, "stream": True, "options": options}
    if request.format is not None:
        body["format"] = request.format
    if request.think is not None:
        body["think"] = request.think
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body


def _begun(said: Said | None) -> tuple[Message, ...]:
    return (Message("assistant", said.text, said.thinking),) if said and (said.text or said.thinking) else ()


def _message(message: Message) -> dict[str, Any]:
    words: dict[str, Any] = {"role": message.role, "content": message.content}
    for key in ("thinking", "tool_name", "tool_call_id"):
        if getattr(message, key):
            words[key] = getattr(message, key)
    if message.images:
        words["images"] = list(map(_base64, message.images))
    if message.tool_calls:
        words["tool_calls"] = [
            {"id": call.id, "function": {"index": index, "name": call.name, "arguments": call.arguments}}
            for index, call in enumerate(message.tool_calls)
        ]
    return words


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- answers -------------------------------------------------------------------------------------------------------


class LineReader:
    """Reads the lines of one answer. ``finish`` is its end, None before that."""

    def __init__(
        self, request: ChatRequest | GenerateRequest, make_id: Callable[[], str], hide: Callable[[str], str]
    ) -> None:
        self._request = request
        self._make_id, self._hide = make_id, hide
        self._tokens = 0
        self._calls: tuple[ToolCall, ...] = ()
        self.finish: Finish | None = None

    def on_line(self, line: Line) -> Delta | None:
        """What the line adds to the answer, if anything. Raises EngineError for what went wrong over there."""
        if line.error:
            raise EngineError(self._hide(line.error)[: shared.MAX_MESSAGE])
        turn = line.message or Turn(line.response, line.thinking, line.tool_calls)
        self._calls += self._tool_calls(turn.tool_calls or [])
        calls = self._calls if line.done else ()  # together: an answer that breaks after one call would lack the others
        delta: Delta | None = None
        if turn.content or turn.thinking or calls:
            spoken = bool(turn.content or turn.thinking)
            self._tokens += spoken
            probabilities = shared.logprobs(line.logprobs, self._request.top_logprobs) if self._request.logprobs else ()
            delta = Delta(turn.content, turn.thinking, calls, probabilities, tokens=int(spoken))
        if line.done:
            self.finish = self._finish(line)
        return delta

    def end(self) -> Finish:
        """The end of the answer. Raises EngineCrashed where it has none."""
        if self.finish is None:
            raise EngineCrashed(shared.CUT_OFF)
        return self.finish

    def _tool_calls(self, calls: list[Call]) -> tuple[ToolCall, ...]:
        room = shared.MAX_TOOL_CALLS - len(self._calls)
        return tuple(
            shared.tool_call(call.function.name, call.function.arguments, call.id, self._make_id)
            for call in calls[: max(room, 0)]
        )

    def _finish(self, line: Line) -> Finish:
        reason: DoneReason = "length" if line.done_reason == "length" else "stop"
        templated = isinstance(self._request, GenerateRequest) and not self._request.raw
        return Finish(
            reason,
            prompt_tokens=_count(line.prompt_eval_count),
            output_tokens=_count(line.eval_count) or self._tokens,
            total_s=_seconds(line.total_duration),
            load_s=_seconds(line.load_duration),
            prompt_s=_seconds(line.prompt_eval_duration),
            output_s=_seconds(line.eval_duration),
            context=tuple(line.context[:MAX_CONTEXT]) if templated and line.context else (),
        )


def _count(number: int) -> int:
    return min(max(number, 0), 1 << 32)


def _seconds(nanoseconds: int) -> float:
    return min(max(nanoseconds, 0) * _NS, 1e6)


def _unix_s(text: str) -> float | None:
    """RFC 3339 as Unix time; None for what is none, or lies where no clock goes ("for ever" does)."""
    try:
        stamp = datetime.datetime.fromisoformat(_FRACTION.sub(r"\1", text))
    except ValueError:
        return None
    if stamp.tzinfo is None or not 1970 <= stamp.year < 2100:
        return None
    return stamp.timestamp()


def _cut(text: str | None) -> str:
    return (text or "").encode("utf-8", "replace")[:MAX_DESCRIBED_BYTES].decode("utf-8", "ignore")


def _info(value: Any) -> Any:
    if isinstance(value, list):
        return value if len(value) <= LONG_ARRAY and all(isinstance(v, str | int | float) for v in value) else []
    return value[: shared.MAX_TEXT * 5] if isinstance(value, str) else value if isinstance(value, int | float) else None


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip('"')
