"""From a request's words to an answer under way: the name resolved, capabilities checked, the right door chosen.

A request that only loads or unloads a model acts on this node where an engine here runs the model; where none does, loading goes
to a peer and there is nothing to unload. Everything else goes through the router. Not here: JSON (the *_words modules).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Final

import msgspec
import trio
from starlette.requests import Request
from starlette.types import Receive

from meshmax.api.exchange import Form, OpenAnswers, PromptReply
from meshmax.api.node_view import ApiNode
from meshmax.api.ollama_words import Remote
from meshmax.api.replies import Dialect, ShuttingDown, model_not_found
from meshmax.api.until_back import UntilBack
from meshmax.api.wishes import asked_priority, asked_wishes, is_ahead
from meshmax.base.catalog import Resolved
from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ContextTooLong,
    Draining,
    InvalidName,
    InvalidRequest,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    NotFetched,
    NotFound,
)
from meshmax.base.ids import PeerId
from meshmax.base.inference import (
    Ask,
    ChatRequest,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    is_load_only,
)
from meshmax.base.names import parse_name, split_digest
from meshmax.base.route import RequestKind, Route, Wishes
from meshmax.base.status import NO_ENGINE
from meshmax.base.units import format_bytes
from meshmax.core.catalog import last_holder
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.core.entry import Entry
from meshmax.core.explain import kind_of
from meshmax.core.fair_queue import QUEUE_FULL
from meshmax.core.pull_first import PullPlan, not_here
from meshmax.core.refusal import TRY_AGAIN, LostJustNow, NobodyNow, lost_just_now
from meshmax.ports import Answer
from meshmax.services.early_records import Early, EarlyRecord, EarlyRecords
from meshmax.services.route_records import LoadRecords
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import SHED

REQUEST_ID: Final = "meshmax.request_id"  # key in an ASGI scope

SEEK_S: Final = (
    4.0  # a look-up, a dial and a status take less than one where all goes well; a person waits for the answer
)
LONG_S: Final = 120.0  # an absence that is told in minutes
INPUT_TOO_LONG: Final = "the input length exceeds the context length"

_log = get_logger("prompts")


class _Answered(msgspec.Struct):
    """An answer that did not come through the router."""

    route: Route
    events: AsyncIterator[Event]


class Prompts:
    """Turns requests into replies for all faces of one node."""

    def __init__(self, node: ApiNode) -> None:
        self.node = node
        self.open_answers = OpenAnswers()
        self.entry = Entry()
        self.loads = LoadRecords()
        self._early = EarlyRecords(node.now, trio.current_time)
        self._until_back = UntilBack(node.presence.watch, self.open_answers)

    def resolve(self, name: str) -> Resolved:
        """What ``name`` means. Raises NotFound with Ollama's sentence, and who had the model a moment ago."""
        try:
            return self.node.catalog.resolve(name)
        except InvalidName:
            raise model_not_found(name) from None
        except ModelNotFound as error:
            raise NotFound(error.message + self.who_had(name)) from None

    async def find(self, name: str, http: Request | None = None) -> Resolved:
        """As `resolve`; a node that has just started meets the others first; then it is looked for farther away, for SEEK_S.

        ``http``: whose client may leave, its body read. Raises LostJustNow where whoever has it may be back in a moment.
        """
        try:
            return self.node.catalog.resolve(name)
        except InvalidName:  # nothing that could be looked for
            return self.resolve(name)
        except ModelNotFound:
            pass
        if not await self._until_met(name, None if http is None else http.receive) or self._is_known(name):
            return self.resolve(name)
        return await self._seek(name)

    async def _until_met(self, name: str, receive: Receive | None) -> bool:
        """Until the model turns up or whoever is near was met, which takes no time but in a node's first moments.

        False: the client has gone. Raises ShuttingDown.
        """
        while not self._is_known(name) and (left_s := self.node.first_moments.left_s()):
            if self._until_back.is_full:
                break
            if not await self._until_back.wait(partial(self._is_known, name), receive, left_s):
                return False
        return True

    async def _seek(self, name: str) -> Resolved:
        """As `resolve`, after SEEK_S at most. Raises LostJustNow."""
        with trio.move_on_after(SEEK_S):
            await self.node.seek(name, lambda: self._is_known(name))
        if not self._is_known(name) and (away := self._lost_just_now(name)):
            raise away
        return self.resolve(name)

    def _lost_just_now(self, name: str) -> LostJustNow | None:
        view = last_holder(name, self.node.presence.lost())
        return lost_just_now(name, self.peer_name(view.peer_id), view, self.node.now()) if view else None

    async def find_to_answer(self, name: str, http: Request) -> Resolved:
        """As `find`, for the prompt ``http``, its body read: it waits PATIENCE_S in all for a holder that was lost just now.

        What can be fetched first will do. The NotFound says what it would take. Raises ShuttingDown, InvalidRequest too.
        """
        try:
            found = self.node.catalog.resolve(name)
        except (InvalidName, ModelNotFound):
            pass
        else:
            self._early.on_known(http.scope[REQUEST_ID])
            return found
        with self._early.begun(self._early_of(http, name)) as early:
            return await self._find_farther(name, http, early)

    async def _find_farther(self, name: str, http: Request, early: EarlyRecord) -> Resolved:
        try:
            return await self._find_back(name, http, early)
        except NotFound as error:
            nobody = error.message  # not the error, which knows this frame
        with early.waiting("nobody has the whole model, and a registry is asked for it"):
            found = await self.node.fetchable.find(name)
        if isinstance(found, str):
            raise NotFound(nobody + (f"; {found}" if found else ""))
        return found

    async def _find_back(self, name: str, http: Request, early: EarlyRecord) -> Resolved:
        try:
            settled = self._is_known(name)
        except InvalidName:
            settled = True
        if settled:  # there is nothing to wait for
            return self.resolve(name)
        local_only = (asked_wishes(http.headers).policy or self.node.config.routing.policy) == "local-only"
        began_s = trio.current_time()
        if not local_only:
            with early.waiting("this peer has just started, and has not met the others yet"):
                early.client_left = not await self._until_met(name, http.receive)
        if early.client_left or self._is_known(name):
            return self.resolve(name)
        try:
            with early.waiting("no peer near has the model, and it is looked for farther away"):
                return await self._seek(name)
        except LostJustNow as lost:
            why = lost.message.removesuffix(TRY_AGAIN)
        if local_only:
            raise NotFound(f"{not_here(PullPlan(), name[:200], 0)}{self.who_had(name)}")
        left_s = max(0.0, began_s + PATIENCE_S - trio.current_time())
        with early.waiting(why):
            early.client_left = not await self._until_back.wait(partial(self._is_known, name), http.receive, left_s)
        if not self._is_known(name) and (away := self._lost_just_now(name)):
            raise away
        return self.resolve(name)

    def _early_of(self, http: Request, name: str) -> Early:
        try:
            policy = asked_wishes(http.headers).policy
        except InvalidRequest:
            policy = None
        kind: RequestKind = "vectors" if "embed" in http.scope["path"] else "text"
        return Early(http.scope[REQUEST_ID], name, policy or self.node.config.routing.policy, kind)

    async def find_to_show(self, name: str, http: Request) -> Resolved:
        """As `find`. Raises NotFetched where a prompt would fetch it first."""
        try:
            return await self.find(name, http)
        except NotFound as error:
            nobody = error.message  # not the error, which knows this frame
        if isinstance(await self.node.fetchable.find(name), str):
            raise NotFound(nobody)
        raise NotFetched(f"{nobody}; a prompt fetches it first")

    @contextmanager
    def shown(self, name: str, http: Request) -> Iterator[None]:
        """A model is shown within the block. Where ``http`` says that a prompt follows, what refuses it refuses the prompt."""
        if not is_ahead(http.headers):
            yield
            return
        try:
            with self._early.begun(self._early_of(http, name)):
                yield
        except (NotFetched, Busy):  # which is left to the prompt
            self._early.on_known(http.scope[REQUEST_ID])
            raise

    def _is_known(self, name: str) -> bool:
        try:
            self.node.catalog.resolve(name)
        except ModelNotFound:
            return False
        return True

    def who_had(self, name: str) -> str:
        """The end of a sentence that tells which peer had the model and when it was last seen; '' where none is known."""
        view = last_holder(name, self.node.presence.lost())
        here, pulls = self._here_of(name)
        if view is None:
            how = "the pull" if pulls else f"`meshmax pull {name[:200]}`"
            return f": {here} are here, and {how} goes on when a peer that has the rest is back" if here else ""
        ago_s = max(0.0, self.node.now() - view.last_seen_s)
        ago = f"{ago_s:.0f} s" if ago_s < LONG_S else f"{ago_s / 60:.0f} min"
        gone = f"was stopped {ago} ago" if view.status and view.status.leaving else f"has been gone for {ago}"
        kept = f"; {here} are here" if here else ""
        return f": {self.peer_name(view.peer_id)} had it, and {gone}{kept}"

    def _here_of(self, name: str) -> tuple[str, bool]:
        """How much of a model its newest pull has brought, '' for none; whether that has not ended. Raises InvalidName."""
        key = parse_name(split_digest(name)[0]).key
        for transfer in self.node.pulls.transfers():
            if transfer.direction != "in" or parse_name(split_digest(transfer.model)[0]).key != key:
                continue
            if transfer.state == "done" or self.node.leftovers.freed(transfer.id):
                break
            if not transfer.bytes_done:
                continue
            going = transfer.state in ("running", "waiting", "paused")
            return f"{format_bytes(transfer.bytes_done)} of its {format_bytes(transfer.bytes_total)}", going
        return "", False

    def elsewhere(self, name: str) -> str:
        """The end of a sentence about a model that is not here: which peer has it, or had it; '' where none is known."""
        try:
            entry = self.node.catalog.resolve(name).entry
        except InvalidName:
            return ""
        except ModelNotFound:
            return self.who_had(name)
        return (
            "" if entry.is_here or not entry.anywhere else f" on this peer; {self.peer_name(entry.anywhere[0])} has it"
        )

    def peer_name(self, peer_id: PeerId) -> str:
        """A peer's name, or its id where it has told none."""
        view = self.node.presence.view(peer_id)
        return view.status.name if view and view.status and view.status.name else peer_id

    def remote(self, resolved: Resolved, peer_id: PeerId) -> Remote | None:
        """Where the model answers, if no engine here runs it: at ``peer_id``."""
        if self._runs_here(resolved) or peer_id == self.node.signer.peer_id:
            return None
        return Remote(self.peer_name(peer_id), resolved.entry.name)

    def _runs_here(self, resolved: Resolved) -> bool:
        """Whether an engine of this node runs the model: it may be here for others alone."""
        entry = resolved.entry
        return entry.served or (self._is_stored(resolved) and self.node.config.engine.kind != NO_ENGINE)

    def _is_stored(self, resolved: Resolved) -> bool:
        return resolved.stored is not None or resolved.entry.local

    def reply(
        self,
        http: Request,
        resolved: Resolved,
        typed: str,
        request: InferRequest,
        form_for: Callable[[Route], Form],
        *,
        stream: bool,
        dialect: Dialect,
        keep_alive_s: float | None = None,
        ignored: list[str] | None = None,
    ) -> PromptReply:
        """The reply to ``request``. Raises ShuttingDown, CapabilityMissing, InvalidRequest (of a header)."""
        try:
            if self.node.draining.ending:
                raise ShuttingDown
            request = with_capabilities(request, resolved, typed)
            priority, wishes = asked_priority(http.headers), asked_wishes(http.headers)
        except MeshmaxError as error:
            self._early.refused(self._early_of(http, typed), error)
            raise
        if ignored:
            _log.info("options without effect here were ignored", options=ignored[:20])
        ask = Ask(str(http.scope[REQUEST_ID]), resolved.digest, typed[:200], request, keep_alive_s, priority)
        if dialect == "ollama":  # answers a request that only loads with one object, whatever was asked
            stream = stream and not is_load_only(request)
        reword = partial(self._reword, typed=typed, embeds=isinstance(request, EmbedRequest))
        return PromptReply(
            lambda: self._open_bounded(ask, resolved, wishes),
            form_for,
            stream,
            dialect,
            self.open_answers,
            reword,
            lambda: self.route(ask.request_id),
        )

    def _reword(self, error: MeshmaxError, typed: str, embeds: bool) -> MeshmaxError:
        """``error`` as clients are told it."""
        if self.node.draining.ending and isinstance(error, Draining):
            return ShuttingDown()
        if isinstance(error, NoProviders) and not self._is_known(typed):  # who had it is gone since the prompt came
            return NoProviders(error.message + self.who_had(typed))
        return _ollamas_words(error, embeds)

    @asynccontextmanager
    async def _open_bounded(self, ask: Ask, resolved: Resolved, wishes: Wishes) -> AsyncIterator[Answer]:
        """The answer, as one of the prompts that this node has room for. Raises Busy."""
        try:
            self.entry.join(ask.priority)
        except Busy as error:
            SHED.labels(where="entry", priority=ask.priority).inc()
            policy = wishes.policy or self.node.config.routing.policy
            self._early.refused(Early(ask.request_id, ask.name, policy, kind_of(ask)), error)
            raise
        begun_s = trio.current_time()
        try:
            async with self._open(ask, resolved, wishes) as answer:
                yield answer
        finally:
            self.entry.leave(begun_s, trio.current_time())

    def _open(self, ask: Ask, resolved: Resolved, wishes: Wishes) -> AbstractAsyncContextManager[Answer]:
        if not is_load_only(ask.request):
            return self.node.router.open_answer(ask, wishes)
        if self._runs_here(resolved):
            return self._open_here(ask)
        return self._nothing_to_unload(ask) if ask.keep_alive_s == 0 else self.node.router.open_answer(ask, wishes)

    @asynccontextmanager
    async def _open_here(self, ask: Ask) -> AsyncIterator[Answer]:
        with self._recorded(ask, "here: a request to load or unload acts on this node") as route:
            async with self.node.residency.open_answer(ask) as events:
                yield _Answered(route, events)

    @asynccontextmanager
    async def _nothing_to_unload(self, ask: Ask) -> AsyncIterator[Answer]:
        with self._recorded(ask, "here: the model is in no memory of this node") as route:
            yield _Answered(route, _one(Finish("unload")))

    @contextmanager
    def _recorded(self, ask: Ask, line: str) -> Iterator[Route]:
        with self.loads.recorded(ask, self.node.signer.peer_id, line, self.node.now(), trio.current_time) as route:
            yield route

    # --- what came of them -------------------------------------------------------------------------------------------

    def routes(self) -> tuple[Route, ...]:
        """The last requests, newest first: those that were routed, those that only loaded something here, those refused."""
        routed, loads = self.node.router.routes(), self.loads.routes()
        if loads:
            routed = tuple(sorted((*routed, *loads), key=lambda route: -route.started_at_s))
        return self._early.routes(routed)

    def route(self, request_id: str) -> Route | None:
        """The newest request with this id, where it is remembered."""
        routed = (self.node.router.route(request_id), self.loads.find(request_id))
        found = [self._early.told(route) for route in routed if route]
        if early := self._early.find(request_id):
            found.append(early)
        return max(found, key=lambda route: route.started_at_s, default=None)


def _ollamas_words(error: MeshmaxError, embeds: bool) -> MeshmaxError:
    """``error`` with the sentence that Ollama's clients know, where it has one."""
    if isinstance(error, NobodyNow):
        return Busy(f"{QUEUE_FULL}: {error.message}", error.retry_after_s) if error.full else error
    if isinstance(error, Busy) and not isinstance(error, ShuttingDown | Draining | LostJustNow):
        return Busy(QUEUE_FULL, error.retry_after_s)
    return ContextTooLong(INPUT_TOO_LONG) if embeds and isinstance(error, ContextTooLong) else error


async def _one(event: Event) -> AsyncIterator[Event]:
    await trio.lowlevel.checkpoint()
    yield event


def with_capabilities(request: InferRequest, resolved: Resolved, typed: str) -> InferRequest:
    """``request``, thinking switched on where the model can and nothing was said. Raises CapabilityMissing, Ollama's words.

    A model whose capabilities are not known is left to its engine to judge.
    """
    known = resolved.entry.details.capabilities
    if not known or isinstance(request, EmbedRequest):
        return request
    if is_load_only(request):
        return request
    if "completion" not in known:
        verb = "chat" if isinstance(request, ChatRequest) else "generate"
        raise CapabilityMissing(f'"{typed[:200]}" does not support {verb}')
    for needed in _needed(request):
        if needed not in known:
            raise CapabilityMissing(f"{_full_name(resolved.name)} does not support {needed}")
    if "thinking" not in known and request.think:
        raise CapabilityMissing(f'"{typed[:200]}" does not support thinking')
    if "thinking" in known and request.think is None:
        return msgspec.structs.replace(request, think=True)
    return request


def _needed(request: GenerateRequest | ChatRequest) -> list[str]:
    if isinstance(request, GenerateRequest):
        return ["insert"] * bool(request.suffix) + ["vision"] * bool(request.images)
    return ["tools"] * bool(request.tools) + ["vision"] * any(message.images for message in request.messages)


def _full_name(name: str) -> str:
    try:
        return parse_name(name.partition("@")[0]).full
    except InvalidRequest:
        return name
