"""The engine `ollama`: a daemon that is there already. Its models become this peer's; prompts and texts pass through it.

What is loaded, for how long and on which device is the daemon's to decide; a request's keep_alive is told to it. An address
at which a meshmax peer answers is refused, also where that peer calls itself Ollama: peers of one mesh are joined, and a
prompt must not go in circles. Leaving an answer closes its connection, which ends the daemon's work. Not here: the wording
(ollama_words), when the daemon is looked at (services.backends).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Final, TypeVar

import msgspec
import trio

from meshmax.base.catalog import ModelDescription, ModelFile, OfferedModel
from meshmax.base.errors import CapabilityMissing, EngineUnavailable, MeshmaxError
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
from meshmax.base.model import ModelDetails
from meshmax.base.status import Device, Gpu
from meshmax.engine import ollama_words as words
from meshmax.engine import server_words as shared
from meshmax.engine.call_ids import new_call_id
from meshmax.engine.server_http import Reply, ServerHttp, open_prompt, read_out, shared_place
from meshmax.engine.vectors import finished_vector
from meshmax.ports import LoadedFacts

DEFAULT_URL: Final = "http://127.0.0.1:11434"
PARALLEL: Final = 16  # prompts sent to it at once; it has a queue of its own and answers as many as it was told to
EMBED_TEXTS: Final = 16  # texts a call: vectors come soon, and leaving costs at most these
ASKED_AT_ONCE: Final = 8  # models whose details are asked for in one look; the others' turn comes with the next
LOAD_S: Final = 600.0  # as long as the longest load may take

T = TypeVar("T")


class OllamaEngine:
    """A Backend. ``http`` leads to the daemon."""

    name = "ollama"

    def __init__(self, http: ServerHttp, parallel: int = PARALLEL, strangers: Callable[[], list[int]] = list) -> None:
        """``strangers``: user ids of other people whose program it may be: then it is left alone. Cheap."""
        self._http, self._parallel, self._strangers = http, parallel, strangers
        self._places = trio.CapacityLimiter(parallel)
        self._gpu = False
        self._where = f"the Ollama at {http.url}"
        self._names: dict[Sha256, str] = {}  # what the daemon calls its models
        self._details: OrderedDict[Sha256, ModelDetails] = OrderedDict()
        self._goes_on: OrderedDict[Sha256, bool] = OrderedDict()

    async def devices(self) -> tuple[Gpu, ...]:
        """None that are ours to tell of."""
        await trio.lowlevel.checkpoint()
        return ()

    async def look(self) -> tuple[OfferedModel, ...]:
        """See ports.Backend."""
        if others := self._strangers():
            raise EngineUnavailable(
                f"{self._where} is another user's (uid {others[0]}), who would read every prompt: set engine.ollama to"
                " its URL to use it all the same"
            )
        await self._call("GET", "/api/version", words.Version)
        tags = await self._call("GET", "/api/tags", words.Tags)
        running = await self._call("GET", "/api/ps", words.Tags)
        await self._learn(tags)
        found = words.offers(tags, running, self._where, dict(self._details))
        self._names = {
            Sha256(tag.digest): tag.model or tag.name
            for tag in tags.models or ()
            if any(offer.digest == tag.digest for offer in found)
        }
        self._gpu = self._gpu or any(offer.loaded and offer.loaded.size_vram for offer in found)
        return tuple(msgspec.structs.replace(o, parallel=self._parallel, device=self._device(o)) for o in found)

    def _device(self, offer: OfferedModel) -> Device:
        """Where it runs; of one that is not in memory, where any did that was."""
        gpu = offer.loaded.size_vram > 0 if offer.loaded else self._gpu
        return "gpu" if gpu else "cpu"

    async def _learn(self, tags: words.Tags) -> None:
        """Ask for what the list does not tell; daemons of before 2026 tell no capabilities there."""
        unknown = [
            tag
            for tag in (tags.models or ())[: shared.MAX_OFFERED]
            if tag.capabilities is None and not tag.remote_host and tag.digest not in self._details
        ]
        for tag in unknown[:ASKED_AT_ONCE]:
            try:
                shown = await self._show(tag.model or tag.name)
            except MeshmaxError:
                continue  # it is listed without them
            _remember(self._details, Sha256(tag.digest), words.details_shown(shown))

    async def describe(self, digest: Sha256) -> ModelDescription:
        """See ports.Backend."""
        return words.description_of(digest, await self._show(self.name_of(digest)))

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """See ports.Backend."""
        body: dict[str, object] = {"model": self.name_of(digest), "stream": False}
        if keep_alive_s is not None:
            body["keep_alive"] = -1 if keep_alive_s < 0 else keep_alive_s
        with trio.move_on_after(LOAD_S):
            async with self._http.open_response("POST", "/api/generate", body) as response:
                reply = Reply(response.status, response.headers, await response.read())
            self._checked(reply)
            return
        raise EngineUnavailable(f"{self._where} did not load the model within {LOAD_S:g} s")

    @asynccontextmanager
    async def open_model(self, model: ModelFile) -> AsyncIterator[OllamaModel]:
        """Nothing is loaded: the daemon does that with the first prompt. Raises ModelNotFound."""
        await trio.lowlevel.checkpoint()
        self.name_of(model.digest)
        loaded = OllamaModel(self, self._http, model, self._where, self._places)
        try:
            yield loaded
        finally:
            loaded.alive = False
            self._http.drop_idle()

    async def goes_on(self, digest: Sha256) -> bool:
        """Whether the model's template lets an answer that was begun go on. Raises EngineError."""
        if digest not in self._goes_on:
            _remember(self._goes_on, digest, words.goes_on(await self._show(self.name_of(digest))))
        return self._goes_on[digest]

    def name_of(self, digest: Sha256) -> str:
        """What the daemon calls the model, as of the last look. Raises ModelNotFound."""
        if digest not in self._names:
            raise shared.no_model(digest[:12], self._where)
        return self._names[digest]

    async def _show(self, name: str) -> words.Shown:
        return await self._call("POST", "/api/show", words.Shown, {"model": name})

    async def _call(self, method: str, path: str, kind: type[T], body: object = None) -> T:
        reply = self._checked(await self._http.call(method, path, body))
        return shared.read(reply.body, kind, self._where)

    def _checked(self, reply: Reply) -> Reply:
        if reply.status != 200:
            raise shared.error_of(reply.status, reply.headers, reply.body, self._where, self._http.hidden)
        return reply


class OllamaModel:
    """A LoadedModel: one model of the daemon."""

    def __init__(
        self,
        engine: OllamaEngine,
        http: ServerHttp,
        model: ModelFile,
        where: str,
        places: trio.CapacityLimiter,
    ) -> None:
        self._engine, self._http, self._where = engine, http, where
        self._digest = model.digest
        self._capabilities = model.details.capabilities
        self.alive = True
        self.facts = LoadedFacts(model.size, 0, model.details.context_length, "cpu", int(places.total_tokens))
        self._places = places

    @property
    def _name(self) -> str:
        """Its name now: one that it had may mean another model by then."""
        return self._engine.name_of(self._digest)

    @asynccontextmanager
    async def answer(self, request: InferRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """See ports.LoadedModel. Busy where the daemon is. All models of a daemon share its places."""
        async with shared_place(self._places), await self._asked(request) as events:
            yield events

    async def _asked(self, request: InferRequest) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        if isinstance(request, EmbedRequest):
            return aclosing(self._vectors(request))
        words.refuse_continuing(request)
        words.refuse_images(request, self._name, self._capabilities)
        path, body = await self._route(request)
        return open_prompt(self._http, path, body, self._where, partial(self._events, request))

    async def _route(self, request: ChatRequest | GenerateRequest) -> tuple[str, dict[str, object]]:
        if isinstance(request, GenerateRequest):
            chat = words.as_chat(request) if request.said else None
            if chat is None:
                return "/api/generate", words.generate_body(request, self._name)
            request = chat
        if request.said and not await self._engine.goes_on(self._digest):
            raise CapabilityMissing("the template of this model does not let an answer that was begun go on")
        return "/api/chat", words.chat_body(request, self._name)

    async def _events(
        self, request: ChatRequest | GenerateRequest, lines: AsyncIterator[bytes]
    ) -> AsyncGenerator[Event, None]:
        reader = words.LineReader(request, new_call_id, self._http.hidden)
        with shared.named(self._where):
            async for line in lines:
                if not line.strip():
                    continue
                delta = reader.on_line(shared.read(line, words.Line, self._where))
                if delta is not None:
                    yield delta  # noqa: ASYNC119  `named` has nothing to clean up
                if reader.finish is not None:
                    break
            end = reader.end()
        yield end
        await read_out(lines)

    async def _vectors(self, request: EmbedRequest) -> AsyncGenerator[Event, None]:
        begun, tokens, step = trio.current_time(), 0, EMBED_TEXTS if request.normalize else 1
        for first in range(0, len(request.inputs), step):
            part = list(request.inputs[first : first + step])
            raws, counted = await self._embed(request, part)
            tokens += counted
            for index, raw in enumerate(raws, first):
                yield Vector(index, finished_vector(raw, request.dimensions, request.normalize))
        took_s = trio.current_time() - begun
        yield Finish(prompt_tokens=tokens, total_s=took_s, prompt_s=took_s)

    async def _embed(self, request: EmbedRequest, texts: list[str]) -> tuple[list[bytes], int]:
        options = shared.sampling(request.options)
        body: dict[str, object] = {"model": self._name, "options": options}
        if request.normalize:
            path, body = "/api/embed", body | {"input": texts, "truncate": request.truncate}
        else:  # the older interface is the one that leaves vectors as long as they are
            path, body = "/api/embeddings", body | {"prompt": texts[0]}
        async with self._http.open_response("POST", path, body) as response:
            content = await response.read()
        if response.status != 200:
            raise shared.error_of(response.status, response.headers, content, self._where, self._http.hidden)
        told = shared.read(content, words.Vectors, self._where)
        vectors = told.embeddings if request.normalize else [told.embedding or []]
        if vectors is None or len(vectors) != len(texts):
            raise EngineUnavailable(f"{self._where} answered with {len(vectors or ())} vectors for {len(texts)} texts")
        return [shared.vector_bytes(vector, self._where) for vector in vectors], max(told.prompt_eval_count, 0)


def _remember(known: OrderedDict[Sha256, T], digest: Sha256, value: T) -> None:
    known[digest] = value
    if len(known) > shared.MAX_OFFERED:
        known.popitem(last=False)
