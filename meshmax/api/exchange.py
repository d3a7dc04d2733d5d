"""One prompt between a client and the router: the answer as one object or as a stream of lines, and a clean end.

Rules: a client that goes away, before the first token too, cancels everything that was begun for it; a failure before
the first byte has its own status, later ones are a line of the stream. A stream is never silent for longer than KEEP_ALIVE_S:
while its model is fetched or loaded, a slot is waited for or a prompt read, its headers leave with what is known then,
after that bytes that mean nothing in its format. Not here: what lines look like, how they leave (lines).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Final, Protocol

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from meshmax.api.lines import Lines, open_lines
from meshmax.api.pauses import Pauses
from meshmax.api.replies import (
    ROUTE_HEADER,
    Dialect,
    ShuttingDown,
    error_body,
    error_reply,
    json_reply,
    not_routed,
    only_error,
)
from meshmax.base.errors import EngineError, MeshmaxError
from meshmax.base.inference import Delta, Event, Finish, Moved, RoutedEvent, Vector
from meshmax.base.route import Route
from meshmax.base.units import MIB
from meshmax.core.explain import header_line
from meshmax.ports import Answer
from meshmax.telemetry.log import get_logger

MAX_WHOLE_BYTES: Final = 32 * MIB  # of an answer that is sent as one object

KEEP_ALIVE_S: Final = 10.0  # of silence; proxies and clients give a silent reply up after 30 s or more
_LOOK_S: Final = KEEP_ALIVE_S / 2  # a silence is seen at the second look

NDJSON: Final = "application/x-ndjson"
BLANK: Final = b" "  # before a JSON object: parsers pass it over; an empty line is an error to Ollama's own clients

Emit = Callable[[Any], Awaitable[None]]  # sends one line of a stream

_log = get_logger("exchange")


class Form(Protocol):
    """How one interface writes one answer."""

    stream_type: str
    nothing: bytes  # that clients pass over between two lines

    def line(self, event: Event) -> bytes:
        """What ``event`` adds to the stream."""
        ...

    def on_moved(self, event: Moved) -> None:
        """Another peer goes on from here: the next line and the last one tell of it, or the one object."""
        ...

    def failure(self, error: MeshmaxError) -> bytes:
        """The end of a stream that failed."""
        ...

    def whole(self, deltas: list[Delta], vectors: list[Vector], finish: Finish) -> Any:
        """The answer as one object."""
        ...


class OpenAnswers:
    """Answers under way, so that a node that ends can end them with a word rather than in the middle of one."""

    def __init__(self) -> None:
        self.pauses = Pauses()
        self._scopes: set[trio.CancelScope] = set()
        self._ended = False

    @contextmanager
    def held(self) -> Iterator[trio.CancelScope]:
        """A scope that `end_all` cancels."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if self._ended:
                    scope.cancel()
                yield scope
            finally:
                self._scopes.discard(scope)

    def count(self) -> int:
        """How many there are."""
        return len(self._scopes)

    def release(self, scope: trio.CancelScope) -> None:
        """``scope`` is not for `end_all` any more: the last word of what is inside it was said."""
        self._scopes.discard(scope)

    def end_all(self) -> None:
        """End every answer, and those that are still to come."""
        self._ended = True
        for scope in self._scopes:
            scope.cancel()


class PromptReply:
    """An ASGI reply that gets its answer itself, so that it can watch the client from the first moment."""

    def __init__(
        self,
        open_answer: Callable[[], AbstractAsyncContextManager[Answer]],
        form_for: Callable[[Route], Form],
        stream: bool,
        dialect: Dialect,
        open_answers: OpenAnswers,
        reword: Callable[[MeshmaxError], MeshmaxError] = lambda error: error,
        known_route: Callable[[], Route | None] = lambda: None,
    ) -> None:
        """``reword`` turns an error into the sentence that clients of the interface know.

        ``known_route``: what came of the request, where it failed before there was an answer.
        """
        self._known_route = known_route
        self._reword = reword
        self._open_answer = open_answer
        self._form_for = form_for
        self._stream = stream
        self._dialect = dialect
        self._open_answers = open_answers
        self._begun = False
        self._route: Route | None = None
        self._form: Form | None = None
        self._lines: Lines | None = None
        self._over = False  # the line that ends the stream is on its way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; returns when the last byte is sent or the client is gone."""
        async with trio.open_nursery() as nursery:
            if self._stream:
                lines = self._lines = Lines(send, self._open_answers.count, self._open_answers.pauses)
                nursery.start_soon(lines.write)
                nursery.start_soon(watch_client, receive, nursery.cancel_scope, self._keep_alive)
                failed = await self._answer_in_lines(lines)
                await lines.end()
            else:
                nursery.start_soon(cancel_on_hang_up, receive, nursery.cancel_scope)
                failed = await self._answer_whole(scope, receive, send)
            if failed is not None:
                reply = error_reply(self._reword(failed), self._dialect)
                route = self._route or self._known_route()
                reply.headers.update(route_headers(route) if route else {ROUTE_HEADER: not_routed(failed)})
                await reply(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _answer_whole(self, scope: Scope, receive: Receive, send: Send) -> MeshmaxError | None:
        """The error that came before anything was sent, if any."""
        try:
            with self._open_answers.held() as waiting:
                async with self._open_answer() as answer:
                    self._route = answer.route
                    form = self._form_for(self._route)
                    await self._send_whole(answer, form, scope, receive, send)
            if waiting.cancelled_caught and not self._begun:
                raise ShuttingDown
        except (MeshmaxError, BaseExceptionGroup) as error:
            if (ours := only_error(error)) is None:
                raise
            if not self._begun:
                return ours
            _log.info("an answer's end failed after it was sent", code=ours.code, error=ours.message)
        return None

    async def _answer_in_lines(self, lines: Lines) -> MeshmaxError | None:
        """The error that came before anything was sent, if any."""
        try:
            with self._open_answers.held() as answering:
                async with self._open_answer() as answer:
                    self._route = answer.route
                    form = self._form = self._form_for(self._route)
                    if not lines.begun:
                        lines.begin(form.stream_type, route_headers(self._route))
                    await self._send_events(answer, form, lines)
                    self._open_answers.release(answering)
            if answering.cancelled_caught:
                raise ShuttingDown
        except (MeshmaxError, BaseExceptionGroup) as error:
            if (ours := only_error(error)) is None:
                raise
            if not lines.begun:
                return ours
            if self._form is not None and not self._over:
                await lines.send(self._form.failure(self._reword(ours)))
            else:
                _log.info("an answer's end failed after it was sent", code=ours.code, error=ours.message)
        return None

    async def _send_events(self, answer: Answer, form: Form, lines: Lines) -> None:
        try:
            async for event in answer.events:
                if isinstance(event, Moved):
                    form.on_moved(event)
                    continue
                self._over = isinstance(event, Finish)
                await lines.send(form.line(event))
                if self._over:
                    lines.flush()
        except (MeshmaxError, BaseExceptionGroup) as error:
            if (ours := only_error(error)) is None:
                raise
            self._over = True
            await lines.send(form.failure(self._reword(ours)))

    def _keep_alive(self) -> None:
        """Called every _LOOK_S: say something where nothing was said since then."""
        lines = self._lines
        if lines is None or not lines.is_silent():
            return
        if lines.begun and self._form is not None:
            lines.keep_alive(self._form.nothing)
        elif route := self._known_route():
            self._form = self._form_for(route)
            # Who will answer is not known yet; what goes on is.
            lines.begin(self._form.stream_type, {ROUTE_HEADER: route_headers(route)[ROUTE_HEADER]})

    async def _send_whole(self, answer: Answer, form: Form, scope: Scope, receive: Receive, send: Send) -> None:
        deltas, vectors, finish = await _collect(answer.events, form.on_moved)
        reply = json_reply(form.whole(deltas, vectors, finish), 200, route_headers(answer.route))
        self._begun = True
        await reply(scope, receive, send)


async def _collect(
    events: AsyncIterator[RoutedEvent], on_moved: Callable[[Moved], None]
) -> tuple[list[Delta], list[Vector], Finish]:
    deltas: list[Delta] = []
    vectors: list[Vector] = []
    finish: Finish | None = None
    size = 0
    async for event in events:  # to its very end, so that whoever made it can close its books
        if isinstance(event, Finish):
            finish = event
        elif isinstance(event, Vector):
            vectors.append(event)
            size += len(event.values)
        elif isinstance(event, Delta):
            deltas.append(event)
            size += len(msgspec.json.encode(event))  # with its logprobs, which are most of it where there are any
        else:
            on_moved(event)
        if size > MAX_WHOLE_BYTES:
            less = "for fewer texts at once" if vectors else "with stream true"
            raise EngineError(f"the answer is too long to be sent as one object: ask {less}")
    if finish is None:
        raise EngineError("the answer ended before it was finished")
    return deltas, vectors, finish


async def cancel_on_hang_up(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel ``scope`` when the client goes away. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def watch_client(receive: Receive, scope: trio.CancelScope, look: Callable[[], None]) -> None:
    """As `cancel_on_hang_up`, and call ``look`` every _LOOK_S, which costs no timer for each line."""
    while True:
        with trio.move_on_after(_LOOK_S) as patience:
            await cancel_on_hang_up(receive, scope)
        if not patience.cancelled_caught:
            return
        look()


def route_headers(route: Route) -> dict[str, str]:
    """Who serves the prompt and why, as headers."""
    line = header_line(route.line, route.request_id)
    return {"x-meshmax-peer": route.peer_id, ROUTE_HEADER: line} if route.peer_id else {ROUTE_HEADER: line}


class WorkReply:
    """An ASGI reply of what ``work`` tells while it goes on, for pulls and the like: every line, or the last as one object.

    ``work`` gets the function that tells a line. An error of our tree ends the stream as its last line, and is the whole
    reply where nothing is streamed; a client that goes away cancels ``work``.
    """

    def __init__(
        self,
        work: Callable[[Emit], Awaitable[None]],
        open_answers: OpenAnswers,
        dialect: Dialect = "ollama",
        *,
        stream: bool = True,
    ) -> None:
        self._work = work
        self._open_answers = open_answers
        self._dialect = dialect
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the work; returns when it has ended or the client is gone."""
        async with trio.open_nursery() as nursery:
            if self._stream:
                await self._send_lines(receive, send, nursery)
            else:
                nursery.start_soon(cancel_on_hang_up, receive, nursery.cancel_scope)
                await self._send_last(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _send_lines(self, receive: Receive, send: Send, nursery: trio.Nursery) -> None:
        async with open_lines(send, NDJSON, {}) as lines:

            def look() -> None:
                if lines.is_silent():
                    lines.keep_alive(BLANK)

            nursery.start_soon(watch_client, receive, nursery.cancel_scope, look)

            async def emit(value: Any) -> None:
                await lines.send(msgspec.json.encode(value) + b"\n")

            if error := await self._run(emit):
                await emit(error_body(error, self._dialect))

    async def _send_last(self, scope: Scope, receive: Receive, send: Send) -> None:
        last: Any = {}

        async def keep(value: Any) -> None:
            nonlocal last
            await trio.lowlevel.checkpoint()
            last = value

        error = await self._run(keep)
        reply = error_reply(error, self._dialect) if error else json_reply(last)
        await reply(scope, receive, send)

    async def _run(self, emit: Emit) -> MeshmaxError | None:
        """Do the work; the error of our tree that ended it, if any."""
        try:
            with self._open_answers.held() as working:
                await self._work(emit)
        except (MeshmaxError, BaseExceptionGroup) as error:
            if (ours := only_error(error)) is None:
                raise
            return ours
        return ShuttingDown() if working.cancelled_caught else None
