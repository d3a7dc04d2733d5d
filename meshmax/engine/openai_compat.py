"""The engine `openai`: any server with OpenAI's interface, by URL and key: vLLM, llama-server, LM Studio and others.

Its models become this peer's; prompts and texts pass through it. The key goes to that host and nowhere else: redirects are
not followed, and no error, log line or status quotes it. A meshmax peer at that address is refused (base.loop_guard).
Leaving an answer closes its connection, which ends the server's work. Not here: the wording (openai_words), when the server
is looked at (services.backends).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshmax.base.catalog import ModelDescription, ModelFile, OfferedModel
from meshmax.base.config import EngineConfig, OpenAiServer
from meshmax.base.errors import ConfigError, EngineError, InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.inference import (
    ChatRequest,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Vector,
)
from meshmax.base.status import Gpu
from meshmax.engine import openai_words as words
from meshmax.engine import server_words as shared
from meshmax.engine.call_ids import new_call_id
from meshmax.engine.server_http import ServerHttp, open_prompt, read_out, shared_place
from meshmax.engine.vectors import finished_vector
from meshmax.ports import LoadedFacts

EMBED_TEXTS: Final = 16  # texts a call: vectors come soon, and leaving costs at most these
MAX_KEY_BYTES: Final = 4096  # of a key's file; keys have about a hundred

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"


class OpenAiEngine:
    """A Backend. ``http`` leads to the server, its URL's path to where /models is."""

    name = "openai"

    def __init__(self, server: OpenAiServer, http: ServerHttp) -> None:
        self._http = http
        self._patterns = server.models
        self._places = trio.CapacityLimiter(server.parallel)
        self._where = f"the server at {http.url}"
        self._models: dict[Sha256, words.ListedModel] = {}

    async def devices(self) -> tuple[Gpu, ...]:
        """None that are ours to tell of."""
        await trio.lowlevel.checkpoint()
        return ()

    async def look(self) -> tuple[OfferedModel, ...]:
        """See ports.Backend."""
        reply = await self._http.call("GET", "/models")
        if reply.status != 200:
            raise shared.error_of(reply.status, reply.headers, reply.body, self._where, self._http.hidden)
        listed = words.chosen(shared.read(reply.body, words.Listing, self._where), self._patterns)
        # Some servers call now the time at which each was made: what is told first counts, so that nothing seems to change.
        known, now_s = {model.id: model.created for model in self._models.values()}, int(time.time())
        listed = [
            msgspec.structs.replace(model, created=known.get(model.id, model.created or now_s)) for model in listed
        ]
        self._models = {words.digest_of(model.id): model for model in listed}
        offers = (words.offer_of(model, self._where) for model in listed)
        return tuple(msgspec.structs.replace(offer, parallel=int(self._places.total_tokens)) for offer in offers)

    async def describe(self, digest: Sha256) -> ModelDescription:
        """What its list told: the interface has no more."""
        await trio.lowlevel.checkpoint()
        offer = words.offer_of(self._model(digest), self._where)
        return ModelDescription(digest, offer.details, modified_at_s=offer.modified_at_s)

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """Such a server keeps its models itself. Raises InvalidRequest where one is to be unloaded."""
        await trio.lowlevel.checkpoint()
        name = self._model(digest).id
        if keep_alive_s == 0:
            raise InvalidRequest(
                f"'{name}' stays in memory: {self._where} keeps its models itself; it is stopped there"
            )

    @asynccontextmanager
    async def open_model(self, model: ModelFile) -> AsyncIterator[OpenAiModel]:
        """Nothing is loaded here. Raises ModelNotFound."""
        await trio.lowlevel.checkpoint()
        loaded = OpenAiModel(self._http, model, self._model(model.digest), self._where, self._places)
        try:
            yield loaded
        finally:
            loaded.alive = False
            self._http.drop_idle()

    def _model(self, digest: Sha256) -> words.ListedModel:
        if digest not in self._models:
            raise shared.no_model(digest[:12], self._where)
        return self._models[digest]


class OpenAiModel:
    """A LoadedModel: one model of the server."""

    def __init__(
        self, http: ServerHttp, model: ModelFile, listed: words.ListedModel, where: str, places: trio.CapacityLimiter
    ) -> None:
        self._http, self._where = http, where
        self._name, self._server = listed.id, words.server_of(listed)
        self.alive = True
        self.facts = LoadedFacts(model.size, 0, model.details.context_length, "cpu", int(places.total_tokens))
        self._places = places

    @asynccontextmanager
    async def answer(self, request: InferRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """See ports.LoadedModel. Busy where the server is. All models of a server share its places."""
        async with shared_place(self._places), self._asked(request) as events:
            yield events

    def _asked(self, request: InferRequest) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        if isinstance(request, EmbedRequest):
            return aclosing(self._vectors(request))
        with shared.named(self._where):
            path, body = self._route(request)
        return open_prompt(self._http, path, body, self._where, partial(self._events, request))

    def _route(self, request: ChatRequest | GenerateRequest) -> tuple[str, dict[str, object]]:
        if isinstance(request, GenerateRequest) and words.is_bare(request):
            return "/completions", words.completion_body(request, self._name, self._server)
        return "/chat/completions", words.chat_body(request, self._name, self._server)

    async def _events(
        self, request: ChatRequest | GenerateRequest, lines: AsyncIterator[bytes]
    ) -> AsyncGenerator[Event, None]:
        reader = words.ChunkReader(request, new_call_id, self._http.hidden)
        begun = first = trio.current_time()
        with shared.named(self._where):
            async for line in lines:
                data = line.removeprefix(_DATA).strip()
                if data == _DONE:
                    break
                if not line.startswith(_DATA) or not data:
                    continue
                delta = reader.on_chunk(shared.read(data, words.Chunk, self._where))
                if delta is not None:
                    first = trio.current_time() if first == begun else first
                    yield delta  # noqa: ASYNC119  `named` has nothing to clean up
            calls, finish = reader.end(first - begun, trio.current_time() - first)
        if calls is not None:
            yield calls
        yield finish
        await read_out(lines)

    async def _vectors(self, request: EmbedRequest) -> AsyncGenerator[Event, None]:
        begun, tokens = trio.current_time(), 0
        for at in range(0, len(request.inputs), EMBED_TEXTS):
            texts = request.inputs[at : at + EMBED_TEXTS]
            body = words.embed_body(request, texts, self._name, self._server)
            async with self._http.open_response("POST", "/embeddings", body) as response:
                content = await response.read()
            if response.status != 200:
                raise shared.error_of(response.status, response.headers, content, self._where, self._http.hidden)
            told = shared.read(content, words.Embeddings, self._where)
            rows = {row.index: row.embedding for row in told.data}
            if rows.keys() != set(range(len(texts))):
                raise EngineError(f"{self._where} answered with other vectors than those asked for")
            tokens += max((told.usage.prompt_tokens or 0) if told.usage else 0, 0)
            for index in range(len(texts)):
                raw = shared.vector_bytes(rows[index], self._where)
                yield Vector(at + index, finished_vector(raw, request.dimensions, request.normalize))
        took_s = trio.current_time() - begun
        yield Finish(prompt_tokens=tokens, total_s=took_s, prompt_s=took_s)


def api_url(url: str) -> str:
    """Where the interface begins: the URL that was given, with /v1 where it has no path."""
    url = url.rstrip("/")
    return url if url.count("/") > 2 else f"{url}/v1"


def key_of(server: OpenAiServer, config: EngineConfig) -> str:
    """The key for ``server``, '' for none. Raises ConfigError; blocks briefly."""
    if not server.key_file:
        return server.key or config.openai_key
    path = Path(server.key_file).expanduser()
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"engine.openai: the key file {path} cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"engine.openai: others can read the key file {path}: `chmod 600 {path}`")
    key = data.decode("ascii", "replace").strip()
    if not key or len(data) > MAX_KEY_BYTES or not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"engine.openai: the key file {path} holds no key: one line of printable characters")
    return key
