"""Between our words and OpenAI's HTTP interface, as vLLM, llama-server, LM Studio and others speak it.

Pure. Only what the interface itself has is sent to a server that is not known; of vLLM and llama-server (told by who owns
their models) also what they add: more ways of sampling, thinking on or off, an answer that goes on where another ended.
What is asked for and cannot be said raises CapabilityMissing; how a model is loaded (num_ctx and the like) is the server's
to decide and is left out. A model is called by its id, and has no digest there: `digest_of` makes one of the id alone, so
that two servers with one id are one model to the mesh. Not here: connections (openai_compat), bounds of text (server_words).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import msgspec

from meshmax.base.catalog import InMemory, OfferedModel
from meshmax.base.errors import CapabilityMissing, EngineCrashed, EngineError
from meshmax.base.ids import Sha256
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    DoneReason,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Message,
    Options,
    Said,
)
from meshmax.base.model import ModelDetails
from meshmax.engine import server_words as shared
from meshmax.engine.openai_message import message_words

DIGEST_DOMAIN: Final = b"meshmax-openai-model-v1\x00"
MAX_ARGUMENTS: Final = 1 << 20  # characters of the arguments of one call

NO_GOING_ON: Final = "an answer that broke off cannot go on there"
_BUT_ANEW: Final = "; with temperature 0 or a seed it could be asked for anew and checked (`meshmax docs settings`)"

Server = Literal["vllm", "llama-server", ""]  # '' one that is not known

_PLAIN: Final = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_MORE: Final[dict[Server, dict[str, str]]] = {
    "vllm": {"top_k": "top_k", "min_p": "min_p", "repeat_penalty": "repetition_penalty"},
    "llama-server": {
        "top_k": "top_k",
        "min_p": "min_p",
        "typical_p": "typical_p",
        "repeat_last_n": "repeat_last_n",
        "repeat_penalty": "repeat_penalty",
    },
    "": {},
}


class Meta(msgspec.Struct):
    """What llama-server tells of its model's file."""

    n_ctx: int = 0
    n_ctx_train: int = 0
    n_embd: int = 0
    n_params: int = 0
    size: int = 0


class ListedModel(msgspec.Struct):
    """A model in /v1/models."""

    id: str
    created: int | None = None
    owned_by: str | None = None
    max_model_len: int | None = None  # vLLM's
    meta: Meta | None = None  # llama-server's


class Listing(msgspec.Struct):
    """The reply of /v1/models."""

    data: list[ListedModel] | None = None


class Function(msgspec.Struct):
    """A piece of a function's call."""

    name: str | None = None
    arguments: str | None = None


class CallPiece(msgspec.Struct):
    """A piece of a call."""

    index: int | None = None
    id: str | None = None
    function: Function | None = None


class Piece(msgspec.Struct):
    """What a chunk adds; servers differ in what they call thinking."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPiece] | None = None


class Choice(msgspec.Struct):
    """One answer of a chunk: ``delta`` of a chat, ``text`` of a completion."""

    delta: Piece | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Any = None


class Cached(msgspec.Struct):
    """Of the prompt's tokens, those that were there from before."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The counts at the end."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Cached | None = None


class Chunk(msgspec.Struct):
    """One event of a streamed answer."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class Embedding(msgspec.Struct):
    """One vector."""

    embedding: list[float]
    index: int = 0


class Embeddings(msgspec.Struct):
    """The reply of /v1/embeddings."""

    data: list[Embedding]
    usage: Usage | None = None


# --- what it has ---------------------------------------------------------------------------------------------------


def digest_of(model_id: str) -> Sha256:
    """The digest under which the mesh knows the model with this id, of whatever server."""
    return Sha256(hashlib.sha256(DIGEST_DOMAIN + model_id.encode()).hexdigest())


def server_of(model: ListedModel) -> Server:
    """Whose server it is, by what it says of its models."""
    if model.owned_by == "vllm":
        return "vllm"
    return "llama-server" if model.owned_by == "llamacpp" else ""


def chosen(listing: Listing, patterns: Sequence[str]) -> list[ListedModel]:
    """The models that are taken, each id once."""
    wanted: dict[str, ListedModel] = {}
    for model in listing.data or ():
        fits = not patterns or any(fnmatchcase(model.id.lower(), pattern.lower()) for pattern in patterns)
        if fits and 0 < len(model.id) <= shared.MAX_TEXT and model.id.isprintable() and shared.name_of(model.id):
            wanted.setdefault(model.id, model)
    return list(wanted.values())[: shared.MAX_OFFERED]


def offer_of(model: ListedModel, origin: str) -> OfferedModel:
    """A model of a server, which has it ready, and on a GPU where that is what such servers are for."""
    meta = model.meta or Meta()
    context = model.max_model_len or meta.n_ctx or meta.n_ctx_train
    details = ModelDetails(
        format="",
        parameter_size=f"{meta.n_params / 1e9:.1f}B" if 0 < meta.n_params < 1 << 50 else "",
        context_length=min(max(context, 0), 1 << 40),
        embedding_length=min(max(meta.n_embd, 0), 1 << 40),
    )
    size, created = min(max(meta.size, 0), 1 << 50), min(max(model.created or 0, 0), 1 << 40)
    gpu = server_of(model) == "vllm"
    return OfferedModel(
        shared.name_of(model.id),
        digest_of(model.id),
        "openai",
        origin,
        size,
        details,
        float(created),
        InMemory(size, size if gpu else 0, details.context_length),
        "gpu" if gpu else "cpu",
    )


# --- requests ------------------------------------------------------------------------------------------------------


def chat_body(request: ChatRequest | GenerateRequest, model: str, server: Server) -> dict[str, Any]:
    """The body for /chat/completions. Raises CapabilityMissing."""
    if isinstance(request, GenerateRequest):
        _refuse(request.context, "'context' of an earlier answer")
        _refuse(request.template is not None, "a template of the request's own")
        turns: tuple[Message, ...] = (Message("user", request.prompt, images=request.images),)
        messages = (Message("system", request.system), *turns) if request.system else turns
    else:
        messages = request.messages
    said = request.said if request.said and (request.said.text or request.said.thinking) else None
    body = _common(request.options, request.said, model, server)
    body["messages"] = [_message(message) for message in (*messages, *_begun(said))]
    if said:
        body |= _going_on(request, said, server)
    if isinstance(request, ChatRequest) and request.tools:
        body["tools"] = list(request.tools)
    if request.format == "json":
        body["response_format"] = {"type": "json_object"}
    elif isinstance(request.format, dict):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": request.format}}
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body | _thinking(request, server)


def completion_body(request: GenerateRequest, model: str, server: Server) -> dict[str, Any]:
    """The body for /completions, of a raw prompt or one with a suffix. Raises CapabilityMissing."""
    _refuse(request.images, "images beside a raw prompt")
    _refuse(request.format is not None, "a format for a raw prompt")
    _refuse(request.context, "'context' of an earlier answer")
    _refuse(request.template is not None, "a template of the request's own")
    _refuse(request.said and request.suffix, "going on with an answer that has a suffix")
    body = _common(request.options, request.said, model, server)
    body["prompt"] = request.prompt + (request.said.text if request.said else "")
    if request.suffix:
        body["suffix"] = request.suffix
    if request.logprobs:
        body["logprobs"] = max(1, request.top_logprobs)
    return body


def is_bare(request: GenerateRequest | ChatRequest) -> bool:
    """Whether the prompt goes to /completions, without a template."""
    return isinstance(request, GenerateRequest) and (request.raw or bool(request.suffix))


def embed_body(request: EmbedRequest, texts: Sequence[str], model: str, server: Server) -> dict[str, Any]:
    """The body for /embeddings; cutting to ``dimensions`` is done here."""
    body: dict[str, Any] = {"model": model, "input": list(texts), "encoding_format": "float"}
    if server == "vllm" and request.truncate:
        body["truncate_prompt_tokens"] = -1
    return body


def _common(options: Options, said: Said | None, model: str, server: Server) -> dict[str, Any]:
    given = shared.sampling(options)
    if given.get("num_predict", -1) < 0:
        given.pop("num_predict", None)
    elif said:
        given["num_predict"] = max(1, given["num_predict"] - said.tokens)
    if given.get("seed", -1) < 0:
        given.pop("seed", None)
    if given.get("top_k", 1) <= 0:
        given.pop("top_k", None)
    names = _PLAIN | _MORE[server]
    body = {names[key]: value for key, value in given.items() if key in names}
    return {"model": model, "stream": True, "stream_options": {"include_usage": True}, **body}


def _going_on(request: ChatRequest | GenerateRequest, said: Said, server: Server) -> dict[str, Any]:
    """What lets the last message, an assistant's, go on. Raises CapabilityMissing."""
    _refuse(request.format is not None, "going on with an answer in a given format")
    _refuse(isinstance(request, ChatRequest) and request.tools, "going on with an answer that may call tools")
    _refuse(said.thinking and not said.text, "going on in the middle of thinking")
    if server == "vllm":
        return {"add_generation_prompt": False, "continue_final_message": True}
    if server != "llama-server":
        sure = request.options.temperature == 0 or request.options.seed is not None
        raise CapabilityMissing(NO_GOING_ON + ("" if sure else _BUT_ANEW))
    return {}


def _thinking(request: ChatRequest | GenerateRequest, server: Server) -> dict[str, Any]:
    think = request.think
    if think is None:
        return {}
    if server:
        kwargs: dict[str, Any] = {"enable_thinking": bool(think)}
        if isinstance(think, str):
            kwargs["reasoning_effort"] = think
        return {"chat_template_kwargs": kwargs}
    if isinstance(think, str):
        return {"reasoning_effort": "high" if think == "max" else think}
    return {"reasoning_effort": "medium" if think else "none"}


def _begun(said: Said | None) -> tuple[Message, ...]:
    return (Message("assistant", said.text, said.thinking),) if said else ()


def _message(message: Message) -> dict[str, Any]:
    words = message_words(message)
    if message.images:
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in message.images]
        words["content"] = [{"type": "text", "text": message.content}, *pictures]
    if message.role == "tool":
        words.setdefault("tool_call_id", "call_0")
    else:
        words.pop("tool_call_id", None)
    return words


def _data_url(image: bytes) -> str:
    kind = "jpeg"
    if image.startswith(b"\x89PNG"):
        kind = "png"
    elif image[8:12] == b"WEBP":
        kind = "webp"
    elif image.startswith(b"GIF8"):
        kind = "gif"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _refuse(asked: object, what: str) -> None:
    if asked:
        raise CapabilityMissing(f"{what} is not possible with the server that runs this model")


# --- answers -------------------------------------------------------------------------------------------------------


class ChunkReader:
    """Reads the chunks of one answer. Tool calls come whole, at the end."""

    def __init__(
        self, request: ChatRequest | GenerateRequest, make_id: Callable[[], str], hide: Callable[[str], str]
    ) -> None:
        self._request = request
        self._make_id, self._hide = make_id, hide
        self._calls: dict[int, list[str]] = {}
        self._reason = ""
        self._usage = Usage()
        self._tokens = 0

    def on_chunk(self, chunk: Chunk) -> Delta | None:
        """What the chunk adds to the answer, if anything. Raises EngineError for what went wrong over there."""
        if chunk.error is not None:
            raise EngineError(self._hide(_sentence(chunk.error))[: shared.MAX_MESSAGE])
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return None
        choice = chunk.choices[0]
        self._reason = choice.finish_reason or self._reason
        piece = choice.delta or Piece(choice.text)
        self._collect(piece.tool_calls or [])
        text, thinking = piece.content or "", piece.reasoning_content or piece.reasoning or ""
        if not text and not thinking:
            return None
        self._tokens += 1
        return Delta(text, thinking, logprobs=self._logprobs(choice.logprobs))

    def end(self, prompt_s: float, output_s: float) -> tuple[Delta | None, Finish]:
        """The calls, if there are any, and the end of the answer. Raises EngineCrashed where it has none."""
        if not self._reason:
            raise EngineCrashed(shared.CUT_OFF)
        calls = tuple(
            shared.tool_call(name, _arguments(text), id_, self._make_id)
            for id_, name, text in self._calls.values()
            if name
        )
        reason: DoneReason = "length" if self._reason == "length" else "stop"
        cached = self._usage.prompt_tokens_details or Cached()
        prompt_tokens = max(self._usage.prompt_tokens or 0, 0)
        return Delta(tool_calls=calls, tokens=0) if calls else None, Finish(
            reason,
            prompt_tokens=prompt_tokens,
            output_tokens=max(self._usage.completion_tokens or 0, 0) or self._tokens,
            total_s=prompt_s + output_s,
            prompt_s=prompt_s,
            output_s=output_s,
            cached_tokens=min(max(cached.cached_tokens or 0, 0), prompt_tokens),
        )

    def _logprobs(self, told: Any) -> tuple[dict[str, Any], ...]:
        if not self._request.logprobs or not isinstance(told, dict):
            return ()
        if isinstance(told.get("content"), list):
            return shared.logprobs(told["content"], self._request.top_logprobs)
        return shared.logprobs(_of_completion(told), self._request.top_logprobs)

    def _collect(self, pieces: list[CallPiece]) -> None:
        for piece in pieces:
            index = piece.index or 0
            if index not in self._calls and len(self._calls) >= shared.MAX_TOOL_CALLS:
                continue
            call = self._calls.setdefault(index, ["", "", ""])
            function = piece.function or Function()
            call[0] = call[0] or piece.id or ""
            call[1] += function.name or ""
            call[2] += function.arguments or ""
            if len(call[2]) > MAX_ARGUMENTS or len(call[1]) > shared.MAX_TEXT:
                raise EngineError("the server calls a function with a name or arguments that are too long")


def _of_completion(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The older shape: lists side by side, alternatives by token."""
    tokens, values = told.get("tokens"), told.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        return []
    others = told.get("top_logprobs")
    tops = others if isinstance(others, list) else []
    shown = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=False)):
        top = tops[index] if index < len(tops) and isinstance(tops[index], dict) else {}
        listed = [{"token": other, "logprob": logprob} for other, logprob in top.items()]
        shown.append({"token": token, "logprob": value, "top_logprobs": listed})
    return shown


def _arguments(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _sentence(error: Any) -> str:
    told = error.get("message") if isinstance(error, dict) else error
    return told if isinstance(told, str) and told else "the server could not answer"
