"""Ollama's interface over HTTP (ollama-api 1.2): each route reads its words, calls one part of the node, writes its reply."""

from __future__ import annotations

import array
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, TypeVar

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route as HttpRoute

from meshmax.api import ollama_models, ollama_words
from meshmax.api.bodies import PROMPT_BODY_BYTES, read_words
from meshmax.api.exchange import BLANK, NDJSON, Emit, PromptReply, WorkReply
from meshmax.api.moved import Marker
from meshmax.api.ollama_words import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody, Name, Remote, ReplyWriter, join
from meshmax.api.prompts import Prompts
from meshmax.api.replies import InternalError, error_body, json_reply, model_not_found
from meshmax.api.table import route
from meshmax.base.catalog import Resolved
from meshmax.base.errors import (
    BlobNotFound,
    InvalidName,
    InvalidRequest,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    NotFound,
    error_for,
)
from meshmax.base.ids import PeerId, parse_sha256
from meshmax.base.inference import Delta, EmbedRequest, Event, Finish, InferRequest, Moved, Vector
from meshmax.base.names import ACCEPTED, parse_name, split_digest
from meshmax.base.route import Route

OLLAMA_VERSION: Final = "0.33.0"  # the interface that is spoken here; clients compare it with the oldest they know
KEPT_HEADER: Final = "x-meshmax-kept"

Asked = TypeVar("Asked", GenerateBody, ChatBody)


class ManifestMissing(NoProviders):
    """pull model manifest: file does not exist"""

    http_status = 500  # Ollama's


class NameBody(msgspec.Struct):
    """A model by ``model``, or by ``name`` as older clients write it."""

    model: Name = ""
    name: Name = ""

    @property
    def given(self) -> str:
        """The name that was given, '' if none."""
        return self.model or self.name


class ShowBody(NameBody):
    """The body of POST /api/show; ``system`` and ``template`` override the model's. ``verbose``: arrays and tensors too."""

    verbose: bool | None = None

    system: Annotated[str, msgspec.Meta(max_length=1 << 20)] = ""
    template: Annotated[str, msgspec.Meta(max_length=1 << 20)] = ""


class PullBody(NameBody):
    """The body of POST /api/pull."""

    stream: bool | None = None


class CopyBody(msgspec.Struct):
    """The body of POST /api/copy."""

    source: Name = ""
    destination: Name = ""


class OllamaForm:
    """Writes one answer as /api/generate or /api/chat does."""

    stream_type = NDJSON
    nothing = BLANK

    def __init__(
        self, writer: ReplyWriter, now: Callable[[], float], remote: Callable[[PeerId], Remote | None]
    ) -> None:
        """``remote``: what to tell of a peer that answers."""
        self._writer = writer
        self._now = now
        self._remote = remote
        self._marker = Marker()

    def on_moved(self, event: Moved) -> None:
        """Mark the next line and the last; from there on ``remote_host`` is the peer that goes on."""
        self._marker.on_moved(event)
        self._writer.on_moved(self._remote(event.peer_id))

    def line(self, event: Event) -> bytes:
        """One JSON object and a line feed; nothing for a vector, which these answers do not have."""
        if isinstance(event, Vector):
            return b""
        now_s = self._now()
        if isinstance(event, Finish):
            shown = self._writer.finish(event, now_s)
            self._marker.mark_last(shown)
        else:
            shown = self._writer.delta(event, now_s)
            self._marker.mark_next(shown)
        return msgspec.json.encode(shown) + b"\n"

    def failure(self, error: MeshmaxError) -> bytes:
        """The line that ends a broken stream."""
        return msgspec.json.encode(error_body(error, "ollama")) + b"\n"

    def whole(self, deltas: list[Delta], _vectors: list[Vector], finish: Finish) -> Any:
        """The texts joined."""
        shown = self._writer.finish(finish, self._now(), join(deltas))
        self._marker.mark_last(shown)
        return shown


class EmbedForm:
    """Writes vectors as /api/embed does, or with ``legacy`` as /api/embeddings."""

    stream_type = NDJSON
    nothing = BLANK

    def __init__(self, model: str, legacy: bool) -> None:
        self._model = model
        self._legacy = legacy
        self._marker = Marker()

    def on_moved(self, event: Moved) -> None:
        """Mark the one object."""
        self._marker.on_moved(event)

    def line(self, event: Event) -> bytes:
        """These answers are not streamed."""
        raise InternalError(f"vectors are not streamed: {type(event).__name__}")

    def failure(self, error: MeshmaxError) -> bytes:
        """These answers are not streamed."""
        raise error

    def whole(self, _deltas: list[Delta], vectors: list[Vector], finish: Finish) -> Any:
        """The vectors in the order of their inputs."""
        shown = self._shown(vectors, finish)
        self._marker.mark_last(shown)
        return shown

    def _shown(self, vectors: list[Vector], finish: Finish) -> dict[str, Any]:
        rows = [floats(vector.values) for vector in sorted(vectors, key=lambda vector: vector.index)]
        if self._legacy:
            return {"embedding": rows[0] if rows else []}
        measures = ollama_words.measures(finish)
        kept = ("total_duration", "load_duration", "prompt_eval_count")
        return {"model": self._model, "embeddings": rows} | {name: measures[name] for name in kept if name in measures}


def floats(values: bytes) -> list[float]:
    """The numbers of little-endian float32 ``values``."""
    numbers = array.array("f")
    numbers.frombytes(values[: len(values) // 4 * 4])
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


class OllamaFace:
    """The routes of Ollama's interface for one node."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._node = prompts.node

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        both = ("GET", "HEAD")
        return [
            route("/", self.alive, both),
            route("/api/version", self.version, both),
            route("/api/tags", self.tags, both),
            route("/api/ps", self.ps, ("GET",)),
            route("/api/status", self.cloud_status, ("GET",)),
            route("/api/show", self.show, ("POST",)),
            route("/api/generate", self.generate, ("POST",)),
            route("/api/chat", self.chat, ("POST",)),
            route("/api/embed", self.embed, ("POST",)),
            route("/api/embeddings", self.embeddings, ("POST",)),
            route("/api/pull", self.pull, ("POST",)),
            route("/api/copy", self.copy, ("POST",)),
            route("/api/delete", self.delete, ("DELETE",)),
            route("/api/blobs/{digest}", self.blob, ("HEAD",)),
            route("/api/v1/generate", self.generate, ("POST",)),
            route("/api/v1/chat", self.chat, ("POST",)),
            route("/api/v1/embeddings", self.embed, ("POST",)),
        ]

    async def alive(self, _request: Request) -> Response:
        """GET /: what people and clients look for to see that somebody listens."""
        return PlainTextResponse("Ollama is running")

    async def version(self, _request: Request) -> Response:
        """GET /api/version: the version of the interface, not of meshmax (/api/v1/version)."""
        return json_reply({"version": OLLAMA_VERSION})

    async def cloud_status(self, _request: Request) -> Response:
        """GET /api/status: there is no cloud here."""
        return json_reply({"cloud": {"disabled": True, "source": "config"}})

    async def tags(self, _request: Request) -> Response:
        """GET /api/tags."""
        return json_reply(ollama_models.tags_json(self._node.catalog.entries(), self._prompts.peer_name))

    async def ps(self, _request: Request) -> Response:
        """GET /api/ps: models in this node's memory."""
        return json_reply(ollama_models.ps_json(self._node.residency.loaded(), self._node.now()))

    async def show(self, request: Request) -> Response:
        """POST /api/show: from our store or asked of a holder."""
        body = await read_words(request, ShowBody)
        if not body.given:
            raise InvalidRequest("model is required")
        with self._prompts.shown(body.given, request):
            resolved = await self._prompts.find_to_show(body.given, request)
            try:
                described = await self._node.catalog.describe(body.given, bool(body.verbose))
            except (InvalidName, ModelNotFound):
                raise model_not_found(body.given) from None
        described = msgspec.structs.replace(
            described, system=body.system or described.system, template=body.template or described.template
        )
        entry = resolved.entry
        remote = {} if entry.is_here else ollama_models.remote_fields(entry, self._prompts.peer_name)
        shown = ollama_models.show_json(resolved.name, described, remote, bool(body.verbose))
        offer = self._node.backends.by_digest(resolved.digest) if entry.served and not entry.local else None
        return json_reply(shown | ollama_models.served_by(offer.origin if offer else ""))

    async def generate(self, request: Request) -> PromptReply:
        """POST /api/generate."""
        body = await read_words(request, GenerateBody, PROMPT_BODY_BYTES)
        return await self._answer(request, body, ollama_words.generate_request, chat=False)

    async def chat(self, request: Request) -> PromptReply:
        """POST /api/chat."""
        body = await read_words(request, ChatBody, PROMPT_BODY_BYTES)
        if not body.model:
            raise InvalidRequest("model is required")
        return await self._answer(request, body, ollama_words.chat_request, chat=True)

    async def _answer(
        self, http: Request, body: Asked, read: Callable[[Asked], tuple[InferRequest, list[str]]], *, chat: bool
    ) -> PromptReply:
        resolved = await self._prompts.find_to_answer(body.model, http)
        prompt, ignored = read(body)
        remote = partial(self._prompts.remote, resolved)

        def form(served: Route) -> OllamaForm:
            writer = ReplyWriter(body.model, chat, remote(served.peer_id))
            return OllamaForm(writer, self._node.now, remote)

        return self._prompts.reply(
            http,
            resolved,
            body.model,
            prompt,
            form,
            stream=body.stream is not False,
            dialect="ollama",
            keep_alive_s=ollama_words.keep_alive_s(body.keep_alive),
            ignored=ignored,
        )

    async def embed(self, request: Request) -> PromptReply | Response:
        """POST /api/embed."""
        body = await read_words(request, EmbedBody, PROMPT_BODY_BYTES)
        prompt, ignored = ollama_words.embed_request(body)
        return await self._vectors(request, body, prompt, ignored, legacy=False)

    async def embeddings(self, request: Request) -> PromptReply | Response:
        """POST /api/embeddings: the older interface."""
        body = await read_words(request, EmbeddingsBody, PROMPT_BODY_BYTES)
        if not body.model:
            raise InvalidRequest("model is required")
        prompt, ignored = ollama_words.embeddings_request(body)
        return await self._vectors(request, body, prompt, ignored, legacy=True)

    async def _find_to_embed(self, name: str, http: Request) -> Resolved:
        """As `find_to_answer`. Ollama has another sentence here for a model that is not known, and clients look for it."""
        try:
            return await self._prompts.find_to_answer(name, http)
        except NotFound as error:
            plain = model_not_found(name).message
            if type(error) is not NotFound or not error.message.startswith(plain):
                raise
            more = error.message.removeprefix(plain)
        raise NotFound(f'model "{name[:200]}" not found, try pulling it first{more}')

    async def _vectors(
        self, http: Request, body: EmbedBody | EmbeddingsBody, prompt: EmbedRequest, ignored: list[str], *, legacy: bool
    ) -> PromptReply | Response:
        resolved = await self._find_to_embed(body.model, http)
        keep_alive_s = ollama_words.keep_alive_s(body.keep_alive)
        if not prompt.inputs:
            return json_reply({"embedding": []} if legacy else {"model": body.model, "embeddings": []})
        form = EmbedForm(body.model, legacy)
        return self._prompts.reply(
            http,
            resolved,
            body.model,
            prompt,
            lambda _route: form,
            stream=False,
            dialect="ollama",
            keep_alive_s=keep_alive_s,
            ignored=ignored,
        )

    async def pull(self, request: Request) -> WorkReply:
        """POST /api/pull: over the mesh, with Ollama's progress lines."""
        body = await read_words(request, PullBody)
        if not body.given:
            raise InvalidRequest("model is required")
        parse_name(split_digest(body.given)[0])
        stream = body.stream is not False
        return WorkReply(lambda emit: self._pull(body.given, emit), self._prompts.open_answers, stream=stream)

    async def _pull(self, name: str, emit: Emit) -> None:
        lines = ollama_models.PullLines()
        for line in lines.first():
            await emit(line)
        failure: MeshmaxError | None = None
        try:
            async with self._node.pulls.open_pull(name) as transfers:
                asked = False
                async for transfer in transfers:
                    # Who asks for it wants it; one that is paused while somebody watches stays so.
                    if not asked and transfer.state == "paused":
                        transfer = await self._node.pulls.steer(transfer.id, "resume")
                    asked = True
                    for line in lines.on_transfer(transfer, trio.current_time()):
                        await emit(line)
                    if transfer.state in ("failed", "cancelled"):
                        failure = error_for(transfer.error_code, transfer.reason or f"the pull was {transfer.state}")
        except (NoProviders, ModelNotFound) as error:
            sentence = ManifestMissing.sentence()
            text = error.message.removeprefix(f"{sentence}: ") + self._prompts.who_had(name)
            raise ManifestMissing(f"{sentence}: {text}") from None
        if failure:
            raise failure

    async def copy(self, request: Request) -> Response:
        """POST /api/copy: local models only, the source also as NAME@DIGEST.

        The header X-Meshmax-Kept names what the destination meant before, where that is kept as the last copy.
        """
        body = await read_words(request, CopyBody)
        for what, name in (("source", body.source), ("destination", body.destination)):
            if not _is_name(name.partition("@")[0] if what == "source" else name):
                raise InvalidRequest(f'{what} "{name[:200]}" is invalid: {ACCEPTED}')
        try:
            stored = await self._node.catalog.copy(body.source, body.destination)
        except ModelNotFound:
            where = self._prompts.elsewhere(body.source)
            raise NotFound(f'model "{body.source[:200]}" not found{where}') from None
        return Response(status_code=200, headers={KEPT_HEADER: stored.kept} if stored.kept else None)

    async def delete(self, request: Request) -> Response:
        """DELETE /api/delete: local names only; memory that held the model is freed."""
        body = await read_words(request, NameBody)
        if not _is_name(body.given):
            raise InvalidRequest(f'name "{body.given[:200]}" is invalid: {ACCEPTED}')
        await delete_model(self._prompts, body.given)
        return Response(status_code=200)

    async def blob(self, request: Request) -> Response:
        """HEAD /api/blobs/:digest."""
        given = request.path_params["digest"]
        if not given.startswith(("sha256:", "sha256-")):
            raise InvalidRequest("invalid digest format")
        try:
            await self._node.store.blobs.path(parse_sha256(given))
        except BlobNotFound:
            raise NotFound(f'blob "{given[:100]}" not found') from None
        return Response(status_code=200)


async def delete_model(prompts: Prompts, name: str) -> None:
    """Forget a local name, and unload the model when no other local name means it; free what an interrupted pull left.

    Raises NotFound.
    """
    node = prompts.node
    if await node.leftovers.drop(name) and not _is_here(prompts, name):
        return
    digest = prompts.resolve(name).digest
    try:
        await node.catalog.delete(name)
    except ModelNotFound:
        raise NotFound(model_not_found(name).message + prompts.elsewhere(name)) from None
    if not any(entry.local and entry.digest == digest for entry in node.catalog.entries()):
        await node.residency.unload(digest)


def _is_here(prompts: Prompts, name: str) -> bool:
    try:
        return prompts.node.catalog.resolve(name).entry.local
    except ModelNotFound:
        return False


def _is_name(name: str) -> bool:
    try:
        parse_name(name)
    except InvalidName:
        return False
    return True
