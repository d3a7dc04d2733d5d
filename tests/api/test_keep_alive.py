"""A stream is never silent for long: what leaves while a model is fetched, a slot is waited for or a prompt is read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from starlette.types import Message
from trio.testing import MockClock

from meshmax.api.exchange import KEEP_ALIVE_S, Emit, Form, OpenAnswers, PromptReply, WorkReply
from meshmax.api.ollama_routes import OllamaForm
from meshmax.api.ollama_words import ReplyWriter
from meshmax.api.openai_routes import CompletionForm
from meshmax.api.openai_words import ChatWriter, CompletionWriter
from meshmax.api.replies import Dialect
from meshmax.base.errors import Busy, MeshmaxError, NoProviders
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Delta, Finish
from meshmax.base.route import Route

ROUTE = Route("r", Sha256("ab" * 32), PeerId("b"), "asking b first")
FORMS: dict[str, tuple[Dialect, Callable[[], Form]]] = {
    "generate": ("ollama", lambda: OllamaForm(ReplyWriter("m", False), lambda: 0.0, lambda _peer: None)),
    "chat": ("ollama", lambda: OllamaForm(ReplyWriter("m", True), lambda: 0.0, lambda _peer: None)),
    "completions": ("openai", lambda: CompletionForm(CompletionWriter("m", 1, 0), False)),
    "chat/completions": ("openai", lambda: CompletionForm(ChatWriter("m", 1, 0), False)),
}
Step = float | str | MeshmaxError  # a pause, a token, an end


class Client:
    """What it hears, and when."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, Message]] = []
        self.hang_up = trio.Event()
        self.answers = OpenAnswers()
        self._began = trio.current_time()

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.heard.append((trio.current_time() - self._began, message))

    async def receive(self) -> Message:
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for _, message in self.heard)

    @property
    def head(self) -> Message:
        (start,) = [message for _, message in self.heard if message["type"] == "http.response.start"]
        return start

    def gaps(self) -> list[float]:
        times = [0.0, *(at for at, message in self.heard if message.get("body") or "status" in message)]
        return [later - earlier for earlier, later in pairwise(times)]

    def pieces(self) -> list[Any]:
        """The objects of the stream, as the parsers of either format read them."""
        text = self.body.decode()
        lines = [line for line in text.split("\n") if line]
        if text.lstrip().startswith((":", "data:")):
            lines = [line.removeprefix("data: ") for line in lines if not line.startswith(":") and "[DONE]" not in line]
        return [json.loads(line) for line in lines]


async def reply(
    form: str,
    before_s: float,
    steps: list[Step],
    *,
    stream: bool = True,
    known: Route | None = ROUTE,
    client: Client,
    closing_s: float = 0.0,
) -> None:
    dialect, form_for = FORMS[form]

    async def play(left: list[Step]) -> AsyncIterator[Any]:
        for step in left:
            if isinstance(step, float):
                await trio.sleep(step)
            elif isinstance(step, str):
                yield Delta(step)
            else:
                raise step
        yield Finish("stop")

    @asynccontextmanager
    async def open_answer() -> AsyncIterator[Any]:
        await trio.sleep(before_s)
        first, *rest = steps or [0.0]
        if isinstance(first, MeshmaxError):
            raise first
        events = play([first, *rest])
        try:
            yield SimpleNamespace(route=ROUTE, events=events)
            await trio.sleep(closing_s)
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    made = PromptReply(
        open_answer,
        lambda _route: form_for(),
        stream,
        dialect,
        client.answers,
        known_route=lambda: known,
    )
    await made({"type": "http"}, client.receive, client.send)


@pytest.mark.parametrize("form", FORMS)
async def test_while_an_answer_waits_the_client_hears_something_that_means_nothing(
    form: str, autojump_clock: MockClock
) -> None:
    quiet, waited = Client(), Client()
    await reply(form, 0.0, ["one ", "two"], client=quiet)
    await reply(form, 65.0, [50.0, "one ", 33.0, "two", 12.0], client=waited)
    assert max(quiet.gaps()) < 1
    assert max(waited.gaps()) <= KEEP_ALIVE_S + 0.1
    assert waited.pieces() == quiet.pieces()
    assert len(waited.body) > len(quiet.body)
    headers = dict(waited.head["headers"])
    assert headers[b"x-meshmax-route"] == b"asking b first"
    assert b"x-meshmax-peer" not in headers  # nobody had begun to answer
    assert dict(quiet.head["headers"])[b"x-meshmax-peer"] == b"b"
    assert headers[b"content-type"] == dict(quiet.head["headers"])[b"content-type"]


@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_that_fails_after_its_headers_left_ends_with_a_line_and_before_that_with_a_status(
    form: str, autojump_clock: MockClock
) -> None:
    early, late = Client(), Client()
    await reply(form, KEEP_ALIVE_S - 1, [Busy("too many", 5.0)], client=early)
    assert early.head["status"] == 503
    await reply(form, KEEP_ALIVE_S + 25, [NoProviders("nobody has it")], client=late)
    assert late.head["status"] == 200
    (piece,) = late.pieces()
    assert "nobody has it" in json.dumps(piece["error"])
    assert not late.heard[-1][1]["more_body"]


async def test_an_answer_that_is_not_streamed_says_nothing_before_its_end(autojump_clock: MockClock) -> None:
    client = Client()
    await reply("chat", 60.0, ["hello", 60.0], stream=False, client=client)
    assert len(client.heard) == 2
    assert json.loads(client.body)["message"]["content"] == "hello"


async def test_where_nothing_is_known_of_the_request_yet_its_status_waits(autojump_clock: MockClock) -> None:
    client = Client()
    await reply("chat", 60.0, [Busy("too many")], known=None, client=client)
    assert client.head["status"] == 503


async def test_a_stream_that_speaks_is_not_interrupted(autojump_clock: MockClock) -> None:
    client = Client()
    await reply("chat", 0.0, [step for _ in range(100) for step in ("x", 4.0)], client=client)
    assert not any(line.startswith(b" ") for line in client.body.split(b"\n"))


@pytest.mark.parametrize("after_s", [5.0, 25.0, 70.0])
async def test_a_client_that_goes_away_while_it_waits_ends_everything(
    after_s: float, autojump_clock: MockClock
) -> None:
    client = Client()
    async with trio.open_nursery() as nursery:

        async def leave() -> None:
            await trio.sleep(after_s)
            client.hang_up.set()

        nursery.start_soon(leave)
        with trio.fail_after(after_s + 1):
            await reply("chat", 60.0, ["x", 1000.0], client=client)


@asynccontextmanager
async def client_of_a_node_that_ends(after_s: float) -> AsyncIterator[Client]:
    client = Client()
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await trio.sleep(after_s)
            client.answers.end_all()

        nursery.start_soon(end)
        yield client


async def test_a_node_that_ends_says_so_in_a_stream_whose_headers_have_left(autojump_clock: MockClock) -> None:
    async with client_of_a_node_that_ends(30) as client:
        await reply("chat", 1000.0, ["x"], client=client)
    assert client.head["status"] == 200
    assert "shutting down" in client.pieces()[0]["error"]


@pytest.mark.parametrize("form", FORMS)
async def test_a_node_that_ends_says_so_once_in_the_middle_of_an_answer(form: str, autojump_clock: MockClock) -> None:
    async with client_of_a_node_that_ends(5) as client:
        with trio.fail_after(6):
            await reply(form, 0.0, ["one", 3.0, "two", 1000.0, "three"], client=client)
    *said, last = client.pieces()
    assert len(said) == 2
    assert "shutting down" in json.dumps(last["error"])
    assert client.heard[-1][1]["more_body"] is False


async def test_a_node_that_ends_adds_nothing_to_an_answer_that_is_whole(autojump_clock: MockClock) -> None:
    async with client_of_a_node_that_ends(5) as client:
        await reply("chat", 0.0, ["one"], client=client, closing_s=7.0)
    assert [piece["done"] for piece in client.pieces()] == [False, True]


async def test_a_pull_that_waits_keeps_its_client(autojump_clock: MockClock) -> None:
    client = Client()

    async def work(emit: Emit) -> None:
        await emit({"status": "pulling manifest"})
        await trio.sleep(100)
        await emit({"status": "success"})

    await WorkReply(work, OpenAnswers())({"type": "http"}, client.receive, client.send)
    assert max(client.gaps()) <= KEEP_ALIVE_S + 0.1
    assert client.pieces() == [{"status": "pulling manifest"}, {"status": "success"}]
