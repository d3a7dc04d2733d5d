"""OpenAI's interface over HTTP, as far as Ollama offers it (ollama-api 1.6)."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api import ollama_models, openai_words
from meshmax.api.bodies import PROMPT_BODY_BYTES, read_words
from meshmax.api.exchange import Form, PromptReply
from meshmax.api.moved import Marker
from meshmax.api.ollama_routes import EmbedForm, floats
from meshmax.api.ollama_words import join
from meshmax.api.openai_words import (
    ChatCompletionBody,
    ChatWriter,
    CompletionBody,
    CompletionWriter,
    EmbeddingBody,
)
from meshmax.api.prompts import Prompts
from meshmax.api.replies import error_body, json_reply
from meshmax.api.table import route
from meshmax.base.catalog import CatalogEntry
from meshmax.base.errors import InvalidName, InvalidRequest, MeshmaxError
from meshmax.base.inference import Delta, Event, Finish, InferRequest, Moved, Vector
from meshmax.base.names import DEFAULT_NAMESPACE, parse_name

EVENT_STREAM = "text/event-stream"
_ID_NUMBERS = 999  # Ollama numbers its completions 0 to 998 at random


class CompletionForm:
    """Writes one answer as server-sent events, or as one object."""

    stream_type = EVENT_STREAM
    nothing = b": waiting\n\n"  # a comment

    def __init__(self, writer: ChatWriter | CompletionWriter, include_usage: bool) -> None:
        self._writer = writer
        self._include_usage = include_usage
        self._marker = Marker()

    def on_moved(self, event: Moved) -> None:
        """Mark the next chunk and the last."""
        self._marker.on_moved(event)

    def line(self, event: Event) -> bytes:
        """One ``data:`` line a chunk; ``[DONE]`` after the last."""
        if isinstance(event, Vector):
            return b""
        if isinstance(event, Finish):
            chunks = self._writer.last_chunks(event, self._include_usage)
            self._marker.mark_last(chunks[-1])
            return _data(chunks) + b"data: [DONE]\n\n"
        chunks = self._writer.chunks(event)
        self._marker.mark_next(chunks[0])
        return _data(chunks)

    def failure(self, error: MeshmaxError) -> bytes:
        """The event that ends a broken stream."""
        return _data([error_body(error, "openai")])

    def whole(self, deltas: list[Delta], _vectors: list[Vector], finish: Finish) -> Any:
        """The texts joined."""
        shown = self._writer.whole(join(deltas), finish)
        self._marker.mark_last(shown)
        return shown


class VectorForm(EmbedForm):
    """Writes vectors as OpenAI does; ``packed``: little-endian float32 in base64."""

    def __init__(self, model: str, packed: bool) -> None:
        super().__init__(model, legacy=False)
        self._packed = packed

    def _shown(self, vectors: list[Vector], finish: Finish) -> dict[str, Any]:
        data = [
            {
                "object": "embedding",
                "embedding": base64.b64encode(vector.values).decode() if self._packed else floats(vector.values),
                "index": vector.index,
            }
            for vector in sorted(vectors, key=lambda vector: vector.index)
        ]
        counts = {"prompt_tokens": finish.prompt_tokens, "total_tokens": finish.prompt_tokens}
        return {"object": "list", "data": data, "model": self._model, "usage": counts}


class OpenAiFace:
    """The routes of OpenAI's interface for one node."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._node = prompts.node

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        return [
            route("/v1/models", self.models, ("GET",)),
            route("/v1/models/{model:path}", self.model, ("GET",)),
            route("/v1/chat/completions", self.chat, ("POST",)),
            route("/v1/completions", self.completion, ("POST",)),
            route("/v1/embeddings", self.embeddings, ("POST",)),
        ]

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        listed = ollama_models.listed(self._node.catalog.entries())
        return json_reply({"object": "list", "data": [self._model_json(name, entry) for name, entry in listed]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/:model."""
        name = request.path_params["model"]
        resolved = await self._prompts.find(name)
        return json_reply(self._model_json(name, resolved.entry))

    def _model_json(self, name: str, entry: CatalogEntry) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": int(entry.modified_at_s),
            "owned_by": _namespace(entry.name),
        }
        return shown if entry.is_here else shown | ollama_models.remote_fields(entry, self._prompts.peer_name)

    async def chat(self, request: Request) -> PromptReply:
        """POST /v1/chat/completions."""
        body = await read_words(request, ChatCompletionBody, PROMPT_BODY_BYTES)
        prompt = openai_words.chat_request(body)
        writer = ChatWriter(body.model, random.randrange(_ID_NUMBERS), int(self._node.now()))
        form = CompletionForm(writer, body.include_usage)
        return await self._reply(request, body.model, prompt, lambda: form, bool(body.stream))

    async def completion(self, request: Request) -> PromptReply:
        """POST /v1/completions."""
        body = await read_words(request, CompletionBody, PROMPT_BODY_BYTES)
        prompt = openai_words.completion_request(body)
        writer = CompletionWriter(body.model, random.randrange(_ID_NUMBERS), int(self._node.now()))
        form = CompletionForm(writer, body.include_usage)
        return await self._reply(request, body.model, prompt, lambda: form, bool(body.stream))

    async def embeddings(self, request: Request) -> PromptReply:
        """POST /v1/embeddings."""
        body = await read_words(request, EmbeddingBody, PROMPT_BODY_BYTES)
        prompt = openai_words.embed_request(body)
        form = VectorForm(body.model, body.encoding_format == "base64")
        return await self._reply(request, body.model, prompt, lambda: form, stream=False)

    async def _reply(
        self, http: Request, model: str, prompt: InferRequest, form: Callable[[], Form], stream: bool
    ) -> PromptReply:
        if not model:
            raise InvalidRequest("model is required")
        resolved = await self._prompts.find_to_answer(model, http)
        return self._prompts.reply(
            http, resolved, model, prompt, lambda _route: form(), stream=stream, dialect="openai"
        )


def _data(objects: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(value) + b"\n\n" for value in objects)


def _namespace(name: str) -> str:
    try:
        return parse_name(name).namespace
    except InvalidName:
        return DEFAULT_NAMESPACE
