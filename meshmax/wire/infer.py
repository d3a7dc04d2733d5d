"""The inference protocol /meshmax/infer/1.0.0: one request and its answer a stream.

The requester sends the Ask, MessagePack in AskParts of at most PART_BYTES, then leaves its direction open and silent: to
close or reset it means to want no answer any more. The server sends Accepted (the request is whole and has its place),
then Events, KeepAlive whenever nothing else was sent for a while, and at the end an Events whose last one is a Finish,
or at any time a Failure. Bounds of base.inference are checked here, and that what engines take for JSON is JSON; what
a field means is checked by the engine. Not here: deadlines (services.infer_client, services.infer_server).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from meshmax.base.errors import InvalidRequest, LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import parse_sha256
from meshmax.base.inference import (
    MAX_INPUTS,
    MAX_MESSAGES,
    MAX_PROMPT_BYTES,
    MAX_SAID_CHARACTERS,
    MAX_STOP,
    Ask,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Said,
    Vector,
)
from meshmax.base.names import MAX_NAME
from meshmax.base.units import KIB, MIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec

PART_BYTES: Final = 512 * KIB  # half a frame, so that a slow link shows progress between two parts
# The texts and images, what was said already (a character has up to 4 bytes), and the fields around them.
MAX_ASK_BYTES: Final = MAX_PROMPT_BYTES + 4 * MAX_SAID_CHARACTERS + MIB
MAX_EVENTS: Final = 256  # of one frame; what an engine makes while a frame is under way is far less
MAX_REQUEST_ID: Final = 128  # characters
MAX_VECTOR_BYTES: Final = 256 * KIB  # 65536 dimensions; the largest models in use have 8192
MAX_DEPTH: Final = 64  # of nested JSON; engines and their parsers recurse
MAX_JSON_NODES: Final = 200_000  # values in one schema, tool or argument; checking them takes well under a second
MAX_TOOLS: Final = 1024


class AskPart(msgspec.Struct, frozen=True, tag="ask"):
    """A piece of an encoded Ask, in order: PART_BYTES of it, the last one fewer but not none. ``last``: the Ask is whole."""

    data: bytes
    last: bool


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The request is whole and is being worked on (or waits in the queue)."""


class Events(msgspec.Struct, frozen=True, tag="events"):
    """1 to MAX_EVENTS events that were ready together, in order."""

    events: tuple[Event, ...]


class KeepAlive(msgspec.Struct, frozen=True, tag="keep_alive"):
    """Still at it (loading, queued, or thinking)."""


Reply = Accepted | Events | KeepAlive | Failure

ASK_PART: Final[Codec[AskPart]] = Codec(AskPart, PART_BYTES + KIB)
REPLY: Final[Codec[Reply]] = Codec(Reply)

_ask_decoder: Final = msgspec.msgpack.Decoder(Ask)
_encoder: Final = msgspec.msgpack.Encoder()


def ask_parts(ask: Ask) -> Iterator[AskPart]:
    """``ask`` as it is sent. Raises InvalidRequest at once if it breaks a bound, so that nothing is sent in vain."""
    try:
        check_ask(ask)
        data = _encoder.encode(ask)
    except (ValueError, OverflowError, TypeError) as error:  # lone surrogates, integers over 64 bits, foreign objects
        raise InvalidRequest(f"the request cannot be sent to a peer: {str(error)[:200]}") from None
    if len(data) > MAX_ASK_BYTES:
        raise InvalidRequest(f"the request has {len(data)} bytes; at most {MAX_ASK_BYTES} can be sent to a peer")
    return _split(data)


def _split(data: bytes) -> Iterator[AskPart]:
    for start in range(0, len(data), PART_BYTES):
        yield AskPart(data[start : start + PART_BYTES], start + PART_BYTES >= len(data))


class AskAssembly:
    """An Ask on its way in. ``held_bytes``: what it holds so far, at most MAX_ASK_BYTES."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def held_bytes(self) -> int:
        """Bytes received so far."""
        return len(self._data)

    def on_part(self, part: AskPart) -> Ask | None:
        """Take a part in; the Ask once it is whole. Raises RemoteProtocolError for one that is too large or not valid."""
        # Whole pieces only: a request that comes byte by byte would hold its place for as long as the sender likes.
        fits = 0 < len(part.data) <= PART_BYTES and (part.last or len(part.data) == PART_BYTES)
        if not fits or len(self._data) + len(part.data) > MAX_ASK_BYTES:
            raise RemoteProtocolError("the peer sent a request that is too large, or in pieces of a wrong size")
        self._data += part.data
        return decode_ask(self._data) if part.last else None


def decode_ask(data: bytes | bytearray) -> Ask:
    """The Ask in ``data``, every bound checked. Raises RemoteProtocolError."""
    try:
        ask = _ask_decoder.decode(data)
        check_ask(ask)
    except (msgspec.DecodeError, ValueError, RecursionError, InvalidRequest) as error:
        raise RemoteProtocolError(f"the peer sent a request that is not valid: {str(error)[:200]}") from None
    return ask


def check_ask(ask: Ask) -> None:
    """Every bound of an Ask. Raises InvalidRequest, which never quotes the prompt."""
    parse_sha256("sha256:" + ask.digest)
    _require(len(ask.name) <= MAX_NAME + 72, "the model's name is too long")  # '@' and a digest may follow it
    _require(
        0 < len(ask.request_id) <= MAX_REQUEST_ID and ask.request_id.isascii() and ask.request_id.isprintable(),
        f"a request id has 1 to {MAX_REQUEST_ID} printable ASCII characters",
    )
    _require(ask.keep_alive_s is None or math.isfinite(ask.keep_alive_s), "keep_alive is not a finite number")
    _require(ask.priority in ("interactive", "batch"), "a priority is interactive or batch")
    request = ask.request
    _check_options(request)
    size = _check_shape(request)
    _require(size <= MAX_PROMPT_BYTES, f"text and images of a request have at most {MAX_PROMPT_BYTES} bytes together")


def _check_options(request: InferRequest) -> None:
    options = request.options
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if isinstance(value, float):
            _require(math.isfinite(value), f"{name} is not a finite number")
        elif isinstance(value, int):
            _require(-(1 << 63) <= value < 1 << 64, f"{name} has more than 64 bits")
    _require(len(options.stop or ()) <= MAX_STOP, f"at most {MAX_STOP} stop words are taken")


def _check_shape(request: InferRequest) -> int:
    """The bytes of text and images (characters stand for bytes: UTF-8 is bounded by MAX_ASK_BYTES)."""
    size = sum(map(len, request.options.stop or ()))
    if isinstance(request, EmbedRequest):
        _require(len(request.inputs) <= MAX_INPUTS, f"at most {MAX_INPUTS} inputs are taken at once")
        return size + sum(map(len, request.inputs))
    check_json(request.format)
    if request.said is not None:
        _check_said(request.said)
    if isinstance(request, GenerateRequest):
        size += len(request.prompt) + len(request.suffix) + len(request.system or "") + len(request.template or "")
        return size + sum(map(len, request.images))
    _require(len(request.messages) <= MAX_MESSAGES, f"at most {MAX_MESSAGES} messages are taken")
    _require(len(request.tools) <= MAX_TOOLS, f"at most {MAX_TOOLS} tools are taken")
    check_json(request.tools)
    for message in request.messages:
        size += len(message.content) + len(message.thinking) + sum(map(len, message.images))
        for call in message.tool_calls:
            check_json(call.arguments)
    return size


def _check_said(said: Said) -> None:
    length = len(said.text) + len(said.thinking)
    _require(length <= MAX_SAID_CHARACTERS, f"what was said already has at most {MAX_SAID_CHARACTERS} characters")
    _require(0 <= said.tokens <= 1 << 32, "the count of tokens said already is out of bounds")


def check_json(value: Any) -> None:
    """Whether ``value`` is JSON, at most MAX_DEPTH deep: MessagePack can carry more than that. Raises InvalidRequest."""
    pending: list[tuple[Any, int]] = [(value, 0)]
    seen = 0
    while pending:
        item, depth = pending.pop()
        seen += 1
        _require(seen <= MAX_JSON_NODES and depth <= MAX_DEPTH, "a JSON value is too large or nested too deeply")
        if isinstance(item, dict):
            _require(all(isinstance(key, str) for key in item), "a key of a JSON object is not a text")
            pending += ((child, depth + 1) for child in item.values())
        elif isinstance(item, list | tuple):
            pending += ((child, depth + 1) for child in item)
        elif isinstance(item, float):
            _require(math.isfinite(item), "a number in a JSON value is not finite")
        else:
            _require(item is None or isinstance(item, str | int), "a value is not JSON")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise InvalidRequest(otherwise)


# --- answers -----------------------------------------------------------------------------------------------------------


def events_frames(events: Sequence[Event]) -> list[bytes]:
    """``events`` (at least one) in as few frames as they fit in; a text that fits in none goes in pieces.

    A Finish whose context fits in no frame goes without it. Raises LocalProtocolError for another event that fits in none.
    """
    if len(events) <= MAX_EVENTS:
        try:
            return [REPLY.encode(Events(tuple(events)))]
        except LocalProtocolError:
            if len(events) == 1:
                events = _smaller(events[0])
                if not events:
                    raise
                if len(events) == 1:
                    return events_frames(events)
    middle = len(events) // 2
    return events_frames(events[:middle]) + events_frames(events[middle:])


def _smaller(event: Event) -> list[Event]:
    """The same in pieces or cut, [] if that cannot be done."""
    if isinstance(event, Finish) and event.context:
        return [msgspec.structs.replace(event, context=())]
    if isinstance(event, Delta) and len(event.text) > 1:
        middle = len(event.text) // 2
        rest = msgspec.structs.replace(event, text=event.text[middle:])
        return [Delta(event.text[:middle], tokens=0), rest]
    return []


def check_reply(reply: Reply) -> None:
    """Every bound of a Reply. Raises RemoteProtocolError."""
    if not isinstance(reply, Events):
        return
    if not 1 <= len(reply.events) <= MAX_EVENTS:
        raise RemoteProtocolError(
            f"the peer sent {len(reply.events)} events in one frame; allowed are 1 to {MAX_EVENTS}"
        )
    for event in reply.events:
        if isinstance(event, Delta):
            _check_delta(event)
        elif isinstance(event, Vector):
            if not 0 <= event.index < MAX_INPUTS or len(event.values) % 4 or len(event.values) > MAX_VECTOR_BYTES:
                raise RemoteProtocolError("the peer sent a vector that is out of bounds")
        else:
            _check_finish(event)
    if any(isinstance(event, Finish) for event in reply.events[:-1]):
        raise RemoteProtocolError("the peer went on after the end of its answer")


def _check_delta(delta: Delta) -> None:
    # No engine sends these; a peer that does would seem to speak, for ever, and say nothing.
    if not (delta.text or delta.thinking or delta.tool_calls):
        raise RemoteProtocolError("the peer sent a piece of an answer with nothing in it")
    if not 0 <= delta.tokens <= 1 << 32:
        raise RemoteProtocolError("the peer sent a count of tokens that is out of bounds")
    try:
        check_json(delta.logprobs)
        for call in delta.tool_calls:
            check_json(call.arguments)
    except InvalidRequest as error:
        raise RemoteProtocolError(f"the peer sent an answer that is not valid: {error.message}") from None


def _check_finish(finish: Finish) -> None:
    counts = (finish.prompt_tokens, finish.cached_tokens, finish.output_tokens)
    times = (finish.total_s, finish.load_s, finish.prompt_s, finish.output_s)
    if not (all(0 <= n <= 1 << 32 for n in counts) and all(math.isfinite(t) and 0 <= t <= 1e9 for t in times)):
        raise RemoteProtocolError("the peer sent figures of an answer that are out of bounds")
