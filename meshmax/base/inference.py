"""A prompt and its answer, as they cross between faces, router, peers and engines.

A request is one of three words (Generate, Chat, Embed); an answer is a stream of events: Delta* Finish, or Vector* Finish.
A request whose ``said`` is set asks for the rest of an answer. To a face, the router's stream may also hold Moved.
Fields follow the Ollama interface, which is the richer one; the OpenAI face translates. Model names were resolved to a
digest before a request is made. Bounds are checked where bytes come in (api, wire.infer). Not here: JSON shapes of the faces.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256

MAX_MESSAGES: Final = 4096
MAX_INPUTS: Final = 2048  # texts of one embedding request, as OpenAI's limit
MAX_STOP: Final = 64
MAX_PROMPT_BYTES: Final = 16 << 20  # text and images of one request
MAX_SAID_CHARACTERS: Final = 1 << 20  # of an answer that another peer goes on with; some 250,000 tokens, hours of work

Role = Literal["system", "user", "assistant", "tool"]
DoneReason = Literal["stop", "length", "load", "unload", "tool_calls"]
Priority = Literal["interactive", "batch"]
Think = bool | Literal["low", "medium", "high", "max"] | None


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling and runtime options (ollama-api 1.4). None means: the model's own parameter, else the engine's default.

    ``num_predict`` -1 is unlimited; ``seed`` -1 random; ``num_ctx`` tokens of context to load the model with.
    """

    num_ctx: int | None = None
    num_predict: int | None = None
    num_keep: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None


def merge_options(asked: Options, model: Options) -> Options:
    """The options that were asked for, with the model's own parameters where nothing was."""
    given = {name: value for name in Options.__struct_fields__ if (value := getattr(asked, name)) is not None}
    return msgspec.structs.replace(model, **given)


class ToolCall(msgspec.Struct, frozen=True):
    """A function that the model wants called; ``arguments`` is a JSON object, order kept."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """What of an answer was given already, by another peer: the engine goes on right after it and repeats none of it.

    ``tokens``: how many that was, taken off ``num_predict``.
    """

    text: str = ""
    thinking: str = ""
    tokens: int = 0


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation. ``images`` are raw bytes (not base64)."""

    role: Role
    content: str = ""
    thinking: str = ""
    images: tuple[bytes, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="generate"):
    """A completion. ``raw``: no template. ``format``: None, "json" or a JSON schema. ``context``: tokens of earlier turns.

    ``system`` and ``template`` None mean the model's own. Empty ``prompt`` without ``suffix`` or images only loads the model.
    """

    prompt: str = ""
    suffix: str = ""
    system: str | None = None
    template: str | None = None
    raw: bool = False
    images: tuple[bytes, ...] = ()
    context: tuple[int, ...] = ()
    format: str | dict[str, Any] | None = None
    think: Think = None
    logprobs: bool = False
    top_logprobs: int = 0
    options: Options = Options()
    said: Said | None = None


class ChatRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="chat"):
    """The next turn of a conversation. ``tools`` as the Ollama interface has them. No messages only loads the model."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    format: str | dict[str, Any] | None = None
    think: Think = None
    logprobs: bool = False
    top_logprobs: int = 0
    options: Options = Options()
    said: Said | None = None


class EmbedRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="embed"):
    """Vectors for ``inputs``. ``truncate`` cuts a text that is too long, else ContextTooLong. ``normalize``: to L2 length 1.

    ``dimensions`` None keeps all.
    """

    inputs: tuple[str, ...] = ()
    truncate: bool = True
    dimensions: int | None = None
    normalize: bool = True
    options: Options = Options()


InferRequest = GenerateRequest | ChatRequest | EmbedRequest


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, tag="delta"):
    """More of the answer. ``tokens``: how many tokens this carries (coalesced ones count each)."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    tokens: int = 1


class Vector(msgspec.Struct, frozen=True, tag="vector"):
    """The embedding of input ``index``: little-endian float32."""

    index: int
    values: bytes


class Finish(msgspec.Struct, frozen=True, omit_defaults=True, tag="finish"):
    """The end of an answer. Durations are seconds on the serving peer; ``context`` only for a Generate that is not raw.

    ``cached_tokens`` of the ``prompt_tokens`` were there from an earlier prompt, so ``prompt_s`` is of the others.
    """

    done_reason: DoneReason = "stop"
    prompt_tokens: int = 0
    output_tokens: int = 0
    total_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    output_s: float = 0.0
    context: tuple[int, ...] = ()
    cached_tokens: int = 0


Event = Delta | Vector | Finish


class Moved(msgspec.Struct, frozen=True):
    """From here on ``peer_id`` gives the answer. Made by the router alone, for faces; it never crosses to a peer.

    ``exact``: what follows is what the peer before would have said, as far as can be told.
    """

    peer_id: PeerId
    exact: bool = True


RoutedEvent = Event | Moved


def is_load_only(request: InferRequest) -> bool:
    """Whether the request asks for no answer, only that the model be loaded (or, with keep_alive 0, unloaded)."""
    if isinstance(request, GenerateRequest):
        return not (request.prompt or request.suffix or request.images)
    return isinstance(request, ChatRequest) and not request.messages


class Ask(msgspec.Struct, frozen=True):
    """A request on its way to an engine. ``keep_alive_s``: None the node's default, negative for ever, 0 unload after.

    ``digest`` names the model; ``name`` is what the person typed, for messages. ``priority``: a "batch" request waits for
    those that somebody waits for.
    """

    request_id: str
    digest: Sha256
    name: str
    request: InferRequest
    keep_alive_s: float | None = None
    priority: Priority = "interactive"
