"""Where nobody who could answer a prompt has its model, a peer fetches it first. Satisfies ports.Router, around another Router.

A request goes to the router as it is; only where that finds nobody is it looked who could fetch the model (core.pull_first): the
best peer that takes it pulls it, ourselves too, for as long as somebody waits (services.shared_pulls); where that peer fails,
the next. The answer is handed out as soon as a pull has begun, so that the client is told what goes on (services.fetch_route);
its events come once the model is there and the router has been asked again. One task for each such request, owned by its
block; none for others. Not here: moving models (services.pull), choosing (services.router).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final, Protocol

import msgspec
import trio

from meshmax.base.catalog import CatalogEntry
from meshmax.base.config import RoutingConfig
from meshmax.base.errors import (
    Busy,
    DeadlineExceeded,
    Draining,
    InvalidName,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    NotFound,
    PeerGone,
    raise_only,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, RoutedEvent, is_load_only
from meshmax.base.names import parse_name, split_digest
from meshmax.base.route import RequestState, Route, Wishes
from meshmax.core.explain import kind_of, plain_line
from meshmax.core.pull_first import MAX_TRIES, PullPlan, Taker, not_here, plan_pull, who_could
from meshmax.core.refusal import AGAIN_S, LostJustNow, NobodyNow
from meshmax.core.retrying import passes
from meshmax.ports import Answer, Catalog, Presence, Router
from meshmax.ports.services import WISHES
from meshmax.services.fetch_route import FetchRoute
from meshmax.services.shared_pulls import WAIT_S, SharedPull
from meshmax.telemetry.log import get_logger

ROUTES_KEPT: Final = 200  # requests that are told, as many as a router remembers
FETCHES_KEPT: Final = 200  # of those, whose model was fetched first
NOWHERE_KEPT: Final = 50  # of those, that nobody could be asked for
LOOK_S: Final = 0.25  # between looks at whether another peer tells of the model; its status comes when that changes
TOLD_S: Final = 15.0  # in which it does, once it said that the model is there
SLOWEST_BYTES_PER_S: Final = 1 << 20  # of another peer that fetches: whoever says so may lie
REST_S: Final = 600.0  # of a peer that did not fetch what it was to
MAX_FAILED: Final = 1024  # of them
EVENTS_AHEAD: Final = 64  # of an answer, before the client has read them

UNDRAIN: Final = "`meshmax undrain` there takes one back"
_FORBIDDEN: Final = " (the header X-Meshmax-Pull: false forbids fetching it first)"
_SWITCHED_OFF: Final = " (fetching it first is switched off here: routing.pull)"

_log = get_logger("pull_first")


class Fetching(Protocol):
    """Pulls that requests wait for (services.shared_pulls)."""

    def open_pull(self, peer: PeerId, name: str, digest: Sha256) -> AbstractAsyncContextManager[SharedPull]:
        """``peer``, who may be ourselves, pulls a model until the last who waits has left. Raises why it will not."""
        ...


class _FetchedAnswer:
    """An answer whose model is on its way; satisfies ports.Answer."""

    def __init__(self, fetch: FetchRoute, ready: trio.MemoryReceiveChannel[RoutedEvent]) -> None:
        self._fetch, self._ready = fetch, ready
        self.error: MeshmaxError | None = None

    @property
    def route(self) -> Route:
        return self._fetch.route()

    @property
    def events(self) -> AsyncIterator[RoutedEvent]:
        return self

    def __aiter__(self) -> _FetchedAnswer:
        return self

    async def __anext__(self) -> RoutedEvent:
        try:
            return await self._ready.receive()
        except trio.EndOfChannel:
            if self.error is not None:
                raise self.error from None
            raise StopAsyncIteration from None


class PullFirst:
    """See the module. ``under_way``: requests that have not ended."""

    def __init__(
        self,
        router: Router,
        catalog: Catalog,
        presence: Presence,
        pulls: Fetching,
        config: RoutingConfig,
        unix_now: Callable[[], float],
        on_ask: Callable[[Ask], None] = lambda ask: None,
        upstream: Callable[[Sha256], CatalogEntry | None] = lambda digest: None,
    ) -> None:
        """``on_ask`` is called with each request that comes; it must be cheap. ``upstream``: a model that is to be fetched
        from a registry where nobody has it.
        """
        self._upstream = upstream
        self._on_ask = on_ask
        self._router, self._catalog, self._presence, self._pulls = router, catalog, presence, pulls
        self._config, self._unix_now = config, unix_now
        self._fetches: OrderedDict[str, FetchRoute] = OrderedDict()
        self._nowhere: deque[Route] = deque(maxlen=NOWHERE_KEPT)
        self._failed: dict[PeerId, float] = {}  # who did not fetch what it took upon itself, until when others go first
        self.under_way = 0

    def routes(self) -> tuple[Route, ...]:
        """See ports.Router."""
        if not (self._fetches or self._nowhere):
            return self._router.routes()
        told = [route for route in self._router.routes() if route.request_id not in self._fetches]
        told += [*reversed(self._nowhere), *(fetch.route() for fetch in reversed(self._fetches.values()))]
        return tuple(sorted(told, key=lambda route: -route.started_at_s)[:ROUTES_KEPT])

    def route(self, request_id: str) -> Route | None:
        """See ports.Router."""
        if fetch := self._fetches.get(request_id):
            return fetch.route()
        nowhere = next((route for route in reversed(self._nowhere) if route.request_id == request_id), None)
        asked = self._router.route(request_id)
        if nowhere is None or (asked is not None and asked.started_at_s >= nowhere.started_at_s):
            return asked  # clients try again under the same id
        return nowhere

    @asynccontextmanager
    async def open_answer(self, ask: Ask, wishes: Wishes = WISHES) -> AsyncIterator[Answer]:
        """See ports.Router. Where a model is fetched first it is entered when that has begun."""
        self.under_way += 1
        self._on_ask(ask)
        if (earlier := self._fetches.get(ask.request_id)) and earlier.over:
            del self._fetches[ask.request_id]  # another try under the same id
        at_s, began_s, entered = self._unix_now(), trio.current_time(), False
        try:
            try:
                async with self._router.open_answer(ask, wishes) as answer:
                    entered = True
                    yield answer
                return
            except (NoProviders, ModelNotFound, Draining, LostJustNow) as error:
                if entered:
                    raise
                nobody = error
            async with AsyncExitStack() as stack:
                yield await self._fetch_or_tell(ask, wishes, stack, nobody, at_s, began_s)
        finally:
            self.under_way -= 1

    async def _fetch_or_tell(
        self, ask: Ask, wishes: Wishes, stack: AsyncExitStack, error: MeshmaxError, at_s: float, began_s: float
    ) -> Answer:
        try:
            return await self._fetched(ask, wishes, stack, error)
        except MeshmaxError as found:
            # Whoever was lost just now may be back when the client asks again: that there is no such model is not true.
            nobody = error if isinstance(error, LostJustNow) and isinstance(found, NotFound) else found
            told = self._router.route(ask.request_id)
            if told is None or told.started_at_s < at_s:  # else somebody was asked
                self._nowhere.append(
                    Route(
                        ask.request_id,
                        ask.digest,
                        PeerId(""),
                        plain_line(f"nobody was asked: {nobody.message}"),
                        model=ask.name,
                        policy=wishes.policy or self._config.policy,
                        state="failed",
                        started_at_s=at_s,
                        total_s=trio.current_time() - began_s,
                        kind=kind_of(ask),
                        error=nobody.code,
                        message=plain_line(nobody.message),
                    )
                )
            raise nobody from None

    async def _fetched(self, ask: Ask, wishes: Wishes, stack: AsyncExitStack, error: MeshmaxError) -> Answer:
        """An answer that a fetch begins. Raises ``error`` where none may or can be begun."""
        entry = self._entry_of(ask)
        loads = is_load_only(ask.request)  # which fetches nothing
        if entry is None:
            raise error
        plan = plan_pull(self._presence.peers(), ask.digest, entry.size)
        policy = wishes.policy or self._config.policy
        alone = policy == "local-only"
        if not plan.holders:
            if entry is not self._upstream(
                ask.digest
            ):  # it is here, or its holder was lost: no registry is asked for that
                raise error
            plan = _only_here(plan, entry, ask)
        elif plan.able and not alone:
            raise error
        takers = [taker for taker in plan.takers if taker.ours or not alone]
        takers.sort(key=lambda taker: self._failed.get(taker.peer_id, 0.0) > trio.current_time())
        allowed = self._config.pull if wishes.pull is None else wishes.pull
        if plan.able or loads or not (plan.given and allowed and takers):
            off = (
                ""
                if allowed or loads or plan.able or not plan.given
                else _FORBIDDEN
                if wishes.pull is False
                else _SWITCHED_OFF
            )
            raise _nobody(ask, plan, entry.size, alone, off) from None
        fetch = FetchRoute(ask, plan, entry.name, policy, self._unix_now(), trio.current_time())
        run = partial(self._run, ask, fetch, takers[:MAX_TRIES], entry, wishes)
        return await stack.enter_async_context(self._open_fetched(fetch, run))

    def _entry_of(self, ask: Ask) -> CatalogEntry | None:
        """What is known of the model, if anybody has it; parts will do."""
        whole = [entry for entry in self._catalog.entries() if entry.digest == ask.digest]
        if whole:
            key = _key_of(ask.name)  # under the name that was asked for, if it has several
            return next((entry for entry in whole if parse_name(entry.name).key == key), whole[0])
        if upstream := self._upstream(ask.digest):
            return upstream
        try:
            return self._catalog.resolve(f"{split_digest(ask.name)[0]}@{ask.digest}", parts=True).entry
        except (InvalidName, ModelNotFound):
            return None

    @asynccontextmanager
    async def _open_fetched(self, fetch: FetchRoute, run: Callable[..., Awaitable[None]]) -> AsyncIterator[Answer]:
        made, ready = trio.open_memory_channel[RoutedEvent](EVENTS_AHEAD)
        answer, taken = _FetchedAnswer(fetch, ready), trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, answer, made, taken)
                await taken.wait()  # which an error cancels
                yield answer
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if len(group.exceptions) != 1:
                raise
            raise_only(group)  # the block's own, as it is
        finally:
            fetch.close("cancelled", trio.current_time() - fetch.began_s)

    async def _run(
        self,
        ask: Ask,
        fetch: FetchRoute,
        takers: Sequence[Taker],
        entry: CatalogEntry,
        wishes: Wishes,
        answer: _FetchedAnswer,
        made: trio.MemorySendChannel[RoutedEvent],
        taken: trio.Event,
    ) -> None:
        """Fetch the model, then answer; ``taken`` once somebody has begun. Raises NoProviders where nobody has; else the
        answer does."""
        state: RequestState = "cancelled"
        with made:  # at once: while it waits to close, an error that is no one of ours would be lost to a cancellation
            try:
                ends_at = fetch.began_s + self._config.deadline_s
                await self._until_fetched(fetch, takers, entry, ends_at, taken.set)
                with trio.move_on_at(ends_at) as scope:
                    async with self._router.open_answer(ask, wishes) as inner:
                        fetch.answer = inner
                        async for event in inner.events:
                            await made.send(event)
                if scope.cancelled_caught:
                    raise DeadlineExceeded(
                        f"the answer was not whole within {self._config.deadline_s:g} s, fetching the model included"
                    )
            except MeshmaxError as error:
                if not fetch.begun:
                    raise
                answer.error, state = error, "failed"
            finally:
                fetch.close(state, trio.current_time() - fetch.began_s)

    async def _until_fetched(
        self,
        fetch: FetchRoute,
        takers: Sequence[Taker],
        entry: CatalogEntry,
        ends_at: float,
        has_begun: Callable[[], None],
    ) -> None:
        """Until one of ``takers`` has the model; ``has_begun`` is called when one of them takes it. Raises why none has."""
        failed: list[tuple[Taker, MeshmaxError]] = []
        for taker in takers:
            fetch.on_taken(taker, trio.current_time())
            pulling = False
            try:
                with trio.move_on_at(ends_at) as scope:
                    async with self._pulls.open_pull(taker.peer_id, _full_name(entry), entry.digest) as pull:
                        pulling = True
                        self._tell(fetch)
                        has_begun()
                        await self._until_there(taker, pull, entry)
                if scope.cancelled_caught:
                    raise DeadlineExceeded(
                        f"model '{fetch.model}' could not be fetched within {self._config.deadline_s:g} s;"
                        " what came of it is kept"
                    )
            except MeshmaxError as error:
                failed.append((taker, error))
                self._on_failed(fetch, error, pulling)
                # Where we found no source nobody will; another peer may only have said so.
                if isinstance(error, DeadlineExceeded) or (pulling and taker.ours and isinstance(error, NoProviders)):
                    break
            else:
                fetch.on_fetched(trio.current_time())
                _log.info("fetched first", model=fetch.model, peer=taker.peer_id)
                return
        raise _nobody_fetched(fetch, failed)

    def _tell(self, fetch: FetchRoute) -> None:
        """A fetch has begun."""
        _log.info("fetching first", model=fetch.model, peer=fetch.taker.peer_id, request_id=fetch.request_id)
        fetch.begun = True
        self._fetches[fetch.request_id] = fetch
        if len(self._fetches) > FETCHES_KEPT:
            self._fetches.popitem(last=False)

    def _on_failed(self, fetch: FetchRoute, error: MeshmaxError, pulling: bool) -> None:
        _log.info("not fetched", model=fetch.model, peer=fetch.taker.peer_id, code=error.code, error=error.message)
        fetch.on_failed(error, trio.current_time())
        if pulling and not fetch.taker.ours:
            self._rest(fetch.taker.peer_id)

    async def _until_there(self, taker: Taker, pull: SharedPull, entry: CatalogEntry) -> None:
        """Until the model is at ``taker``, and we know it. Raises PeerGone, NoProviders, and what it says itself."""
        most_s = math.inf if taker.ours else WAIT_S + entry.size / SLOWEST_BYTES_PER_S
        await pull.wait(trio.current_time() + most_s)
        ends_at = trio.current_time() + TOLD_S
        while not taker.ours:
            view = self._presence.view(taker.peer_id)
            if view is None or view.status is None or view.state == "offline":
                raise PeerGone(f"{taker.name} went away when it had fetched model '{entry.name}'")
            if any(model.digest == entry.digest and model.is_copy for model in view.status.models):
                return
            if trio.current_time() >= ends_at:
                raise NoProviders(f"{taker.name} said that it had fetched model '{entry.name}', and does not have it")
            await trio.sleep(LOOK_S)

    def _rest(self, peer: PeerId) -> None:
        """Another peer has not fetched what it was to: others are asked first for a while."""
        now = trio.current_time()
        self._failed = {each: until for each, until in self._failed.items() if until > now}
        if len(self._failed) < MAX_FAILED:
            self._failed[peer] = now + REST_S


def _nobody_fetched(fetch: FetchRoute, failed: Sequence[tuple[Taker, MeshmaxError]]) -> MeshmaxError:
    """What to tell of ``failed``, one at least: where one of them may do it later, to come again."""
    errors = [error for _, error in failed]
    if isinstance(errors[-1], DeadlineExceeded) or (fetch.begun and len(errors) == 1):
        return errors[-1]
    why = "; ".join(f"{taker.name}: {error.message}" for taker, error in failed)
    sentence = f"no peer could fetch model '{fetch.model}' ({why})"
    later = [error.retry_after_s if isinstance(error, Busy) else AGAIN_S for error in errors if passes(error)]
    return NobodyNow(sentence, min(later)) if later else NoProviders(sentence)


def _nobody(ask: Ask, plan: PullPlan, size: int, alone: bool, off: str) -> MeshmaxError:
    """``alone``: only we were asked for. ``off``: what forbids fetching it."""
    if alone:
        sentence = not_here(plan, ask.name[:200], size) + off
        return Draining(sentence) if plan.drained_here else NoProviders(sentence)
    if plan.drained:
        names = ", ".join(each.name or each.peer_id for each in plan.holders if each.verdict == "draining")
        return Draining(
            f"every peer that could answer with model '{ask.name[:200]}' is being drained: {names[:200]}; {UNDRAIN}"
        )
    return NoProviders(
        f"no peer that could answer has model '{ask.name[:200]}'{who_could(plan, ask.name[:200], size)}{off}"
    )


def _key_of(name: str) -> str:
    try:
        return parse_name(split_digest(name)[0]).key
    except InvalidName:
        return ""


def _full_name(entry: CatalogEntry) -> str:
    return parse_name(split_digest(entry.name)[0]).full


def _only_here(plan: PullPlan, entry: CatalogEntry, ask: Ask) -> PullPlan:
    """``plan`` for a model that only a registry has: others could not take it from us. Raises NoProviders."""
    ours = tuple(taker for taker in plan.takers if taker.ours)
    if not ours:
        others = ", ".join(taker.name for taker in plan.takers[:4])
        where = f"; {others} could: run `meshmax pull {ask.name[:200]}` there" if others else ""
        raise NoProviders(
            f"no peer has model '{entry.name}', and this one, which could fetch it, has no engine or no room for it{where}"
        )
    return msgspec.structs.replace(plan, takers=ours, given=True)
