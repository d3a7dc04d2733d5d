"""A server that says what a test wants it to, and an engine that speaks to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.config import OpenAiServer
from meshmax.base.ids import Sha256
from meshmax.base.inference import ChatRequest, Delta, Event, InferRequest, Message
from meshmax.base.model import ModelDetails
from meshmax.engine.ollama import OllamaEngine
from meshmax.engine.openai_compat import OpenAiEngine
from meshmax.engine.openai_words import digest_of
from meshmax.engine.server_http import ServerHttp
from meshmax.ports import LoadedModel
from meshmax.testing.asgi_front import Scripted, answer

URL = "http://127.0.0.1:11434"
KEY = "sk-very-secret"
DIGEST = Sha256("d" * 64)
HELLO = ChatRequest((Message("user", "hello"),))
Reply = bytes | Callable[[trio.abc.Stream], Awaitable[None]]

TAGS = {
    "models": [{"name": "m:latest", "model": "m:latest", "digest": DIGEST, "size": 9, "capabilities": ["completion"]}]
}
MODELS = {"object": "list", "data": [{"id": "org/m", "object": "model", "owned_by": "somebody"}]}


def json(value: object, status: int = 200, *headers: str) -> bytes:
    return answer(status, msgspec.json.encode(value), *headers)


def stream(*lines: str, status: int = 200) -> bytes:
    return answer(status, "".join(line + "\n" for line in lines).encode())


class Server:
    """``replies``: by the end of the path, what is answered; its defaults list one model."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {
            "/api/version": json({"version": "0.33.0"}),
            "/api/tags": json(TAGS),
            "/api/ps": json({"models": []}),
            "/v1/models": json(MODELS),
        }
        self.scripted: Scripted

    async def script(self, request: bytes, stream: trio.abc.Stream) -> None:
        path = request.split(b" ", 2)[1].decode()
        reply = self.replies.get(path, answer(404, b'{"error":"model \'m\' not found"}'))
        if callable(reply):
            await reply(stream)
        else:
            await stream.send_all(reply)

    def body(self) -> dict[str, Any]:
        """The body of the last request."""
        told: dict[str, Any] = msgspec.json.decode(self.scripted.requests[-1].partition(b"\r\n\r\n")[2])
        return told


@asynccontextmanager
async def open_server() -> AsyncIterator[Server]:
    server = Server()
    async with trio.open_nursery() as nursery:
        server.scripted = Scripted(server.script, nursery)
        yield server
        nursery.cancel_scope.cancel()


def http(server: Server, url: str = URL, key: str = KEY) -> ServerHttp:
    return ServerHttp(url, key, server.scripted.connect)


@asynccontextmanager
async def open_ollama(server: Server) -> AsyncIterator[LoadedModel]:
    engine = OllamaEngine(http(server))
    await engine.look()
    async with engine.open_model(ModelFile(DIGEST, "m:latest", "", 9, ModelDetails(context_length=512))) as model:
        yield model


@asynccontextmanager
async def open_openai(server: Server, owned_by: str = "somebody") -> AsyncIterator[LoadedModel]:
    server.replies["/v1/models"] = json({"data": [{"id": "org/m", "owned_by": owned_by}]})
    engine = OpenAiEngine(OpenAiServer(URL), http(server, URL + "/v1"))
    await engine.look()
    async with engine.open_model(ModelFile(digest_of("org/m"), "org/m:latest", "", 0)) as model:
        yield model


async def answered(model: LoadedModel, request: InferRequest = HELLO) -> list[Event]:
    async with model.answer(request) as events:
        return [event async for event in events]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))
