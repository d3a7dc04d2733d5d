"""The echo engine: a model that says the last thing it was told, word by word, at a known rate. For tests and dry runs.

It decides nothing and is deterministic: the answer depends on the request alone, so ``seed`` and the sampling options have
no effect. A token is a word with the blanks before it. With ``format`` the answer is the JSON object {"echo": TEXT}, a
schema or not. A conversation that ends in an assistant's turn is continued: what that turn says already is not said
again. Vectors come from BLAKE3 of the text. Time is trio's, so under a MockClock rates are exact. Images, tools and
infilling are refused. No file is read: any ModelFile loads.
"""

from __future__ import annotations

import array
import math
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final

import msgspec
import trio
from blake3 import blake3

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import CapabilityMissing, ContextTooLong, EngineCrashed, InvalidRequest
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    DoneReason,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Options,
    Said,
    Vector,
    merge_options,
)
from meshmax.base.status import Gpu
from meshmax.core.memory import DEFAULT_CONTEXT_TOKENS
from meshmax.ports import LoadedFacts

DIMENSIONS: Final = 64  # of the vectors; small, since only their identity matters

_WORD: Final = re.compile(r"\s*\S+|\s+$")


class EchoEngine:
    """An Engine. ``load_s``: how long a load takes. ``models``: those open now, so that a test can look at them or crash them."""

    name = "echo"

    def __init__(self, config: EngineConfig, load_s: float = 0.0) -> None:
        self._config = config
        self._load_s = load_s
        self.models: list[EchoModel] = []

    async def devices(self) -> tuple[Gpu, ...]:
        """None: it computes nothing."""
        await trio.lowlevel.checkpoint()
        return ()

    @asynccontextmanager
    async def open_model(self, model: ModelFile) -> AsyncIterator[EchoModel]:
        """A loaded model. Never fails."""
        await trio.sleep(self._load_s)
        loaded = EchoModel(self._config, model)
        self.models.append(loaded)
        try:
            yield loaded
        finally:
            loaded.alive = False
            self.models.remove(loaded)


class EchoModel:
    """A LoadedModel. ``produced`` counts the tokens and vectors ever made, whoever took them."""

    def __init__(self, config: EngineConfig, model: ModelFile) -> None:
        self._model = model
        self._token_s = 1.0 / config.echo_tokens_per_s
        self.alive = True
        self.produced = 0
        self.facts = LoadedFacts(
            size=model.size,
            size_vram=0,
            context_length=model.parameters.num_ctx or config.context_tokens or DEFAULT_CONTEXT_TOKENS,
            device="cpu",
            parallel=config.parallel,
        )

    def crash(self) -> None:
        """Behave from now on as an engine whose process has ended: answers under way fail at their next token."""
        self.alive = False

    @asynccontextmanager
    async def answer(self, request: InferRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """The answer's events, one token each. Leaving stops the work at once."""
        await trio.lowlevel.checkpoint()
        self._check_alive()
        if isinstance(request, EmbedRequest):
            events = self._vectors(request)
        else:
            self._refuse_what_is_missing(request)
            events = self._tokens(request)
        async with aclosing(events):
            yield events

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineCrashed

    def _refuse_what_is_missing(self, request: GenerateRequest | ChatRequest) -> None:
        if isinstance(request, GenerateRequest):
            images, lacks = request.images, "insert" if request.suffix else ""
        else:
            images = tuple(image for message in request.messages for image in message.images)
            lacks = "tools" if request.tools else ""
        if images or lacks:
            raise CapabilityMissing(f"{self._model.name} does not support {'vision' if images else lacks}")
        if (needed := len(_words(_prompt(request)))) >= self.facts.context_length:
            raise ContextTooLong(
                f"the prompt has {needed} tokens, the model's context {self.facts.context_length}: shorten the prompt",
                needed,
            )

    async def _tokens(self, request: GenerateRequest | ChatRequest) -> AsyncGenerator[Event, None]:
        options = merge_options(request.options, self._model.parameters)
        words, reason = _cut(_reply(request), options, request.said)
        begun = trio.current_time()
        for count, word in enumerate(words, 1):
            await trio.sleep_until(begun + count * self._token_s)
            self._check_alive()
            self.produced += 1
            yield Delta(text=word)
        took_s = trio.current_time() - begun
        prompt_words = _words(_prompt(request))
        context: tuple[int, ...] = ()
        if isinstance(request, GenerateRequest) and not request.raw:
            said = request.said.text if request.said else ""
            context = (*request.context, *map(_token_id, prompt_words), *map(_token_id, _words(said + "".join(words))))
        yield Finish(reason, len(prompt_words), len(words), took_s, output_s=took_s, context=context)

    async def _vectors(self, request: EmbedRequest) -> AsyncGenerator[Event, None]:
        begun = trio.current_time()
        tokens = 0
        for index, text in enumerate(request.inputs):
            count = len(_words(text))
            if count > self.facts.context_length and not request.truncate:
                raise ContextTooLong("the input length exceeds the context length")
            tokens += min(count, self.facts.context_length)
            await trio.sleep(self._token_s)
            self._check_alive()
            self.produced += 1
            yield Vector(index, unit_vector(text, request.dimensions))
        took_s = trio.current_time() - begun
        yield Finish(prompt_tokens=tokens, total_s=took_s, prompt_s=took_s)


def unit_vector(text: str, dimensions: int | None = None) -> bytes:
    """A vector of L2 length 1 that depends on ``text`` alone, little-endian float32. Raises InvalidRequest."""
    if dimensions is not None and not 1 <= dimensions <= DIMENSIONS:
        raise InvalidRequest(f"dimensions must be between 1 and {DIMENSIONS}")
    raw = array.array("i", blake3(text.encode()).digest(length=4 * DIMENSIONS))
    if sys.byteorder == "big":
        raw.byteswap()
    values = raw[:dimensions]
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    vector = array.array("f", (value / length for value in values))
    if sys.byteorder == "big":
        vector.byteswap()
    return vector.tobytes()


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _token_id(word: str) -> int:
    return int.from_bytes(blake3(word.encode()).digest(length=3), "little")


def _prompt(request: GenerateRequest | ChatRequest) -> str:
    if isinstance(request, GenerateRequest):
        return " ".join(filter(None, (request.system, request.prompt)))
    return " ".join(message.content for message in request.messages)


def _reply(request: GenerateRequest | ChatRequest) -> str:
    said = ""
    if isinstance(request, GenerateRequest):
        text = request.prompt
    else:
        text = next((m.content for m in reversed(request.messages) if m.role in ("user", "tool")), "")
        if request.messages and request.messages[-1].role == "assistant":
            said = request.messages[-1].content
    if request.format is not None:
        text = msgspec.json.encode({"echo": text}).decode()
    return text.removeprefix(said)


def _cut(text: str, options: Options, said: Said | None) -> tuple[list[str], DoneReason]:
    """``text`` in words, up to the first stop word (not included) or ``num_predict`` words, after what was said."""
    stops = [position for stop in options.stop or () if stop and (position := text.find(stop)) >= 0]
    text = text[: min(stops)] if stops else text
    limit = options.num_predict
    if said is not None:
        if said.thinking or not text.startswith(said.text):
            raise CapabilityMissing("the echo engine cannot go on from what it would not have said")
        text = text[len(said.text) :]
        limit = max(0, limit - said.tokens) if limit is not None and limit >= 0 else limit
    words = _words(text)
    if limit is not None and 0 <= limit < len(words):
        return words[:limit], "length"
    return words, "stop"
