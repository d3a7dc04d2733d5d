"""The llama.cpp engine: one supervised process per loaded model, spoken to over HTTP on loopback with a random key.

It decides how a model is loaded (context, threads, batch) and which of llama.cpp's endpoints answers which request:
chat and templated prompts go to /v1/chat/completions (which finds thinking and tool calls in the text), raw prompts and
those with `context` to /completion, those with a suffix to /infill, texts to /v1/embeddings. The context is fixed at
load: the model's num_ctx, which is the requests' where they name one (core.context), else the configured size, else 4096,
never more than the model was trained for. Images and template overrides are refused.
Not here: the process itself (llamacpp_process), the wording (llamacpp_words).
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import (
    CapabilityMissing,
    ContextTooLong,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    MeshmaxError,
)
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Vector,
)
from meshmax.base.status import Gpu
from meshmax.core.memory import context_tokens, need_of
from meshmax.engine import llamacpp_words as words
from meshmax.engine.call_ids import new_call_id
from meshmax.engine.gpu import Driver, EngineDevice, usable_gpus
from meshmax.engine.llamacpp_process import EngineProcess, open_process
from meshmax.engine.llamacpp_rest import Asking, rest_of, tokens_of
from meshmax.engine.loopback_http import LoopbackHttp
from meshmax.engine.vectors import finished_vector
from meshmax.ports import LoadedFacts
from meshmax.telemetry.log import get_logger

CONTEXT_DEADLINE_S: Final = 5.0  # tokenising takes milliseconds; a process that hangs must not hold a whole answer back
MAX_GPU_LAYERS: Final = 10_000  # as options take it: more than any model has, so all of them
BATCH_TOKENS: Final = 512  # Ollama's num_batch; the compute buffer grows with it
MAX_EMBED_TOKENS: Final = 8192  # one batch of an embedding model holds a whole text, and its buffer a whole batch
EMBED_TEXTS: Final = 16  # texts a call to the engine: vectors come soon, and leaving costs at most these
CRASH_SEEN_S: Final = 2.0  # after a broken connection, how long the process may take to be seen dead

_log = get_logger("engine")


class LlamaCppEngine:
    """An Engine. ``folder`` takes one log file per model, of bounded size."""

    name = "llamacpp"

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._devices: tuple[EngineDevice, ...] | None = None
        self._looking = trio.Lock()
        self._driver = Driver()

    async def devices(self) -> tuple[Gpu, ...]:
        """The GPUs that llama.cpp can use here, with the driver's figures of now; () is an answer. Never raises."""
        async with self._looking:
            if self._devices is None:
                self._devices = await self._look()
        if not self._devices:
            return ()
        return usable_gpus(self._devices, await self._driver.gpus())

    async def _look(self) -> tuple[EngineDevice, ...]:
        try:
            async with open_process({"devices": True}, self._folder / "engine-devices.log") as process:
                return msgspec.convert(process.words["devices"], tuple[EngineDevice, ...], strict=False)
        except (EngineUnavailable, msgspec.ValidationError, KeyError):
            return ()

    @asynccontextmanager
    async def open_model(self, model: ModelFile) -> AsyncIterator[LlamaCppModel]:
        """Load ``model`` in a process of its own, which ends with the block. Raises EngineUnavailable."""
        key = secrets.token_urlsafe(32)
        wanted = load_words(model, self._config)
        log = self._folder / f"engine-{model.digest[:12]}.log"
        async with open_process({**wanted, "key": key}, log) as process:
            http = LoopbackHttp(process.words["address"], key)
            memory = GpuMemory(need_of(model, self._config).total, sum(d.memory_total for d in self._devices or ()))
            loaded = LlamaCppModel(model, process, http, wanted, memory)
            await loaded.learn_facts()
            yield loaded


class GpuMemory(msgspec.Struct, frozen=True):
    """What a model is thought to take in all, and what all GPUs have, in bytes; 0: not known."""

    needed_bytes: int = 0
    total_bytes: int = 0


def load_words(model: ModelFile, config: EngineConfig) -> dict[str, Any]:
    """How ``model`` is to be loaded, as the engine process reads it."""
    own = model.parameters
    # One core is left to everything else: threads wait for each other at every layer, so one core that is busy with
    # something else stalls them all (measured: from 100 tokens a second to one).
    cores = config.threads or max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 1) - 1)
    context = context_tokens(model, config)
    layers = config.gpu_layers if own.num_gpu is None else max(-1, min(own.num_gpu, MAX_GPU_LAYERS))
    embeds = "embedding" in model.details.capabilities
    return {
        "model": model.path,
        "name": model.name,
        "context_tokens": context,
        "parallel": config.parallel,
        "threads": max(1, min(own.num_thread, cores)) if own.num_thread else cores,
        "gpu_layers": layers,
        "batch_tokens": min(context, MAX_EMBED_TOKENS) if embeds else min(BATCH_TOKENS, context),
        "own_pooling": embeds,
    }


class LlamaCppModel:
    """A LoadedModel: a client of its process. ``gpu_memory``: used where it runs on GPUs."""

    def __init__(
        self,
        model: ModelFile,
        process: EngineProcess,
        http: LoopbackHttp,
        wanted: dict[str, Any],
        gpu_memory: GpuMemory = GpuMemory(),  # noqa: B008  frozen
    ) -> None:
        self._gpu_memory = gpu_memory
        self._model = model
        self._process = process
        self._http = http
        self._wanted = wanted
        self.facts = LoadedFacts(model.size, 0, wanted["context_tokens"], "cpu", wanted["parallel"])

    @property
    def alive(self) -> bool:
        """False once the process has ended."""
        return self._process.alive

    @property
    def pid(self) -> int:
        """The process that holds the model."""
        return self._process.pid

    async def learn_facts(self) -> None:
        """Ask the process how it loaded the model. Raises EngineCrashed."""
        settings = (await self._call("GET", "/props"))["default_generation_settings"]
        gpu = bool(self._process.words.get("offload"))
        # On a GPU the driver does not tell what is ours in every setting, so that what was thought stands.
        thought, total = self._gpu_memory.needed_bytes, self._gpu_memory.total_bytes
        size = thought if gpu else self._model.size + _private_bytes(self._process.pid)
        self.facts = LoadedFacts(
            size=size,
            size_vram=min(size, total or size) if gpu else 0,
            context_length=int(settings["n_ctx"]),
            device="gpu" if gpu else "cpu",
            parallel=self.facts.parallel,
        )

    async def busy_slots(self) -> int:
        """Answers that the process works on now. Raises EngineCrashed."""
        return sum(bool(slot["is_processing"]) for slot in await self._call("GET", "/slots"))

    @asynccontextmanager
    async def answer(self, request: InferRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """The answer's events; the last is a Finish. Leaving closes the connection, and llama.cpp frees the slot.

        Raises CapabilityMissing, ContextTooLong, InvalidRequest before the first event, EngineCrashed at any time.
        """
        self._refuse_what_is_missing(request)
        if isinstance(request, EmbedRequest):
            async with aclosing(self._vectors(request)) as events:
                yield events
            return
        asked = await self._route(request)
        if asked.over:
            async with aclosing(self._nothing_more(request, asked)) as events:
                yield events
            return
        try:
            async with self._http.open_response("POST", asked.path, asked.body) as response:
                if response.status != 200:
                    raise words.error_of(response.status, await response.read(), self._model.details.context_length)
                async with aclosing(response.lines()) as lines, aclosing(_chunks(lines)) as chunks:
                    async with aclosing(self._events(request, chunks, asked)) as events:
                        yield events
        except EngineCrashed as error:
            raise await self._explained(error) from None

    def _refuse_what_is_missing(self, request: InferRequest) -> None:
        has = self._model.details.capabilities
        lacks = ""
        if isinstance(request, ChatRequest):
            lacks = "vision" if any(message.images for message in request.messages) else ""
            lacks = lacks or ("tools" if request.tools and has and "tools" not in has else "")
        elif isinstance(request, GenerateRequest):
            lacks = "vision" if request.images else ""
            if request.template is not None:
                raise CapabilityMissing("templates of a request are not supported: leave 'template' out, or use raw")
        if not isinstance(request, EmbedRequest):
            lacks = lacks or ("thinking" if request.think and has and "thinking" not in has else "")
            lacks = lacks or ("completion" if has and "completion" not in has else "")
        if lacks:
            raise CapabilityMissing(f'"{self._model.name}" does not support {lacks}')

    async def _route(self, request: GenerateRequest | ChatRequest) -> Asking:
        own, top, system = self._model.parameters, request.top_logprobs, self._model.system
        if request.said is not None:
            on_cpu = self.facts.device == "cpu"
            return await rest_of(request, request.said, self._call, system, own, on_cpu=on_cpu)
        reader: words.ChatReader | words.CompletionReader = words.CompletionReader(top)
        if isinstance(request, GenerateRequest) and request.suffix:
            path, body = "/infill", words.infill_body(request, own)
        elif isinstance(request, GenerateRequest) and (request.raw or request.context):
            text = request.prompt if request.raw else await self._templated(request)
            tokens = [*request.context, *await self._tokens(text, first=not request.context)]
            path, body = "/completion", words.completion_body(request, tokens, own)
        else:
            path, body, reader = "/v1/chat/completions", words.chat_body(request, system, own), words.ChatReader(top)
        return Asking(path, body, reader, None, over=False)

    async def _events(
        self, request: GenerateRequest | ChatRequest, chunks: AsyncIterator[dict[str, Any]], asked: Asking
    ) -> AsyncGenerator[Event, None]:
        reader = asked.reader
        async for chunk in chunks:
            delta = reader.on_chunk(chunk)
            if delta is not None:
                yield delta
        if calls := reader.tool_calls():
            yield Delta(tool_calls=tuple(msgspec.structs.replace(call, id=new_call_id()) for call in calls))
        yield await self._finished(request, reader.finish(), asked)

    async def _nothing_more(self, request: GenerateRequest | ChatRequest, asked: Asking) -> AsyncGenerator[Event, None]:
        """The end of an answer that has as many tokens as it may have."""
        yield await self._finished(request, Finish("length"), asked)

    async def _finished(self, request: GenerateRequest | ChatRequest, finish: Finish, asked: Asking) -> Finish:
        if asked.prompt_tokens is not None:
            cached = min(finish.cached_tokens, asked.prompt_tokens)
            finish = msgspec.structs.replace(finish, prompt_tokens=asked.prompt_tokens, cached_tokens=cached)
        if isinstance(request, GenerateRequest) and not request.raw and not request.suffix:
            finish = msgspec.structs.replace(finish, context=await self._try_context(request, asked.reader.text))
        return finish

    async def _try_context(self, request: GenerateRequest, answer: str) -> tuple[int, ...]:
        """The conversation in tokens, () where it cannot be had in time: the answer is whole without it."""
        with trio.move_on_after(CONTEXT_DEADLINE_S):
            try:
                return await self._context(request, answer)
            except MeshmaxError as error:
                _log.warning("an answer goes without its context", error=error.message)
        return ()

    async def _context(self, request: GenerateRequest, answer: str) -> tuple[int, ...]:
        """The conversation in tokens. The answer is tokenised anew: chunks leave out tokens that are half a character."""
        prompt = await self._tokens(await self._templated(request), first=not request.context)
        return (*request.context, *prompt, *await self._tokens(answer, first=False))

    async def _templated(self, request: GenerateRequest) -> str:
        body = words.template_body(request, self._model.system)
        return str((await self._call("POST", "/apply-template", body))["prompt"])

    async def _tokens(self, text: str, first: bool) -> list[int]:
        return await tokens_of(self._call, text, first)

    async def _vectors(self, request: EmbedRequest) -> AsyncGenerator[Event, None]:
        begun = trio.current_time()
        limit = min(self.facts.context_length, self._wanted["batch_tokens"])
        texts = [await self._embeddable(text, limit, request.truncate) for text in request.inputs]
        done = 0
        while done < len(texts):
            part = texts[done : done + EMBED_TEXTS]
            body = {"input": part, "encoding_format": "base64", "embd_normalize": -1}
            for entry in (await self._call("POST", "/v1/embeddings", body))["data"]:
                raw = base64.b64decode(entry["embedding"])
                yield Vector(done + int(entry["index"]), finished_vector(raw, request.dimensions, request.normalize))
            done += len(part)
        took_s = trio.current_time() - begun
        yield Finish(prompt_tokens=sum(map(len, texts)), total_s=took_s, prompt_s=took_s)

    async def _embeddable(self, text: str, limit: int, truncate: bool) -> list[int]:
        tokens = await self._tokens(text, first=True)
        if len(tokens) <= limit:
            return tokens
        if not truncate:
            raise ContextTooLong("the input length exceeds the context length")
        return tokens[:limit]

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        try:
            async with self._http.open_response(method, path, body) as response:
                content = await response.read()
        except EngineCrashed as error:
            raise await self._explained(error) from None
        if response.status != 200:
            raise words.error_of(response.status, content)
        return _decoded(content)

    async def _explained(self, error: EngineCrashed) -> EngineCrashed:
        """What a broken connection to the process means: it has ended, or is as good as ended."""
        with trio.move_on_after(CRASH_SEEN_S) as waiting:
            await self._process.wait()
        if waiting.cancelled_caught:
            return error
        status, log = self._process.status, self._process.log.name
        return EngineCrashed(f"the engine's process ended (exit status {status}); its log is {log}")


def _private_bytes(pid: int) -> int:
    """What a process has in memory that is no file's, in bytes; 0 if it is gone. Where the system does not tell: all it has."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return max(0, int(memory.rss) - int(getattr(memory, "shared", 0)))


def _decoded(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise EngineError("the engine answered with something that is not JSON") from None


async def _chunks(lines: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, Any], None]:
    """The server-sent events of a streamed answer."""
    async for line in lines:
        kind, _, data = line.partition(b": ")
        if not data or data == b"[DONE]":
            continue
        if kind == b"error":
            raise words.error_of(500, b'{"error":' + data + b"}")
        chunk = _decoded(data)
        if "error" in chunk:
            raise words.error_of(500, data)
        yield chunk
