"""Where nobody who could answer a prompt has its model, a peer fetches it first. Satisfies ports.Router, around another Router.

A request goes to the router as it is; only where that finds nobody is it looked who could fetch the model (core.pull_first): the
best peer that takes it pulls it. Ourselves do so as a watched pull, which ends with the last request that waits for it; another
peer is asked by ``ask_pull``, and goes on in any case. The answer is handed out as soon as the pull has begun, so that the client
is told what goes on (`Route.line`); its events come once the model is there and the router has been asked again. One task for
each such request, owned by its block; none for others. Not here: moving models (services.pull), choosing (services.router).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

import msgspec
import trio

from meshmax.base.config import RoutingConfig
from meshmax.base.errors import DeadlineExceeded, Draining, MeshmaxError, ModelNotFound, NoProviders, PeerGone
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask, RoutedEvent, is_load_only
from meshmax.base.names import parse_name, split_digest
from meshmax.base.route import Attempt, Policy, RequestState, Route, Wishes
from meshmax.core.explain import kind_of, plain_line
from meshmax.core.pull_first import MAX_TRIES, PullPlan, Taker, not_here, plan_pull, who_could
from meshmax.ports import Answer, Catalog, Distribution, Presence, Pulls, Router
from meshmax.ports.services import WISHES
from meshmax.telemetry.log import get_logger

ROUTES_KEPT: Final = 200  # requests that are told, as many as a router remembers
FETCHES_KEPT: Final = 200  # of those, whose model was fetched first
NOWHERE_KEPT: Final = 50  # of those, that nobody could be asked for
CANDIDATES_KEPT: Final = 32  # of one request
LOOK_S: Final = 0.25  # between looks at whether another peer has the model; its status comes when that changes
ASK_AGAIN_S: Final = 15.0  # after which a peer that fetches is asked whether it still does
TELL_S: Final = 10.0  # between words in the log on how far a pull is
WAIT_S: Final = 60.0  # without a source a pull goes on waiting for one; a request does not
SLOWEST_BYTES_PER_S: Final = 1 << 20  # of another peer that fetches: whoever says so may lie
REST_S: Final = 600.0  # of a peer that did not fetch what it was to
MAX_FAILED: Final = 1024  # of them
EVENTS_AHEAD: Final = 64  # of an answer, before the client has read them

_FORBIDDEN: Final = " (the header X-Meshmax-Pull: false forbids fetching it first)"
_SWITCHED_OFF: Final = " (fetching it first is switched off here: routing.pull)"

Wait = Callable[[], Awaitable[None]]  # until the model is there; raises why it will not be
AskPull = Callable[
    [PeerId, str], Awaitable[None]
]  # have another peer pull NAME@DIGEST; raises Refused, Busy, PeerGone ...

_log = get_logger("pull_first")


class _Fetch:
    """One model on its way to one peer, for one request."""

    def __init__(
        self, ask: Ask, taker: Taker, plan: PullPlan, model: str, policy: Policy, at_s: float, began_s: float
    ) -> None:
        # Not the ask: it holds the prompt, and what came of a request is kept long after it.
        self.request_id, self._digest, self._name = ask.request_id, ask.digest, ask.name
        self._kind = kind_of(ask)
        self.taker, self.model, self._policy = taker, model, policy
        others = [other.told for other in plan.takers if other is not taker]
        chosen = msgspec.structs.replace(taker.told, verdict="chosen")
        known = {each.peer_id: each for each in (*plan.holders, *others, chosen)}  # who has a part may take it, too
        del known[chosen.peer_id]
        self.candidates = (chosen, *known.values())[:CANDIDATES_KEPT]
        self.at_s, self.began_s = at_s, began_s  # Unix time, monotonic
        self.took_s: float | None = None
        self.error: MeshmaxError | None = None
        self.answer: Answer | None = None  # while the model is there and the answer is under way
        self._final: Route | None = None

    @property
    def words(self) -> str:
        """What goes on, for the header."""
        where = "this peer" if self.taker.ours else _ascii(self.taker.name)
        if self.took_s is None:
            return f"fetching {_ascii(self.model)} to {where} first"
        if self.error is not None:
            return f"{_ascii(self.model)} could not be fetched to {where} ({self.error.code})"
        return f"fetched {_ascii(self.model)} to {where} first, {self.took_s:.1f} s"

    @property
    def over(self) -> bool:
        """Whether the request has ended."""
        return self._final is not None

    def route(self) -> Route:
        """As of now."""
        if self._final is not None:
            return self._final
        return self._alone() if self.answer is None else self._onto(self.answer.route)

    def close(self, state: RequestState, total_s: float) -> None:
        """The request is over; what answered it says itself how. The first word counts."""
        if self._final is not None:
            return
        route = self.route()
        if self.answer is None or state == "failed":
            route = msgspec.structs.replace(route, state=state, total_s=total_s)
        self._final, self.answer = route, None  # which holds the prompt

    def _alone(self) -> Route:
        """The route while nobody answers yet."""
        return Route(
            self.request_id,
            self._digest,
            self.taker.peer_id,
            self.words,
            self.candidates,
            (self._attempt(),),
            model=self._name,
            policy=self._policy,
            started_at_s=self.at_s,
            kind=self._kind,
        )

    def _attempt(self) -> Attempt:
        """The fetch as `meshmax why` tells it."""
        error = self.error
        return Attempt(
            self.taker.peer_id,
            error.code if error else "",
            kind="fetch",
            ended_s=self.took_s,
            message=error.message if error else "",
        )

    def _onto(self, route: Route) -> Route:
        """``route``, which began when the fetch had ended, as the client saw it."""
        took_s = self.took_s or 0.0
        return msgspec.structs.replace(
            route,
            line=f"{self.words}; {route.line}",
            attempts=(self._attempt(), *(_later(attempt, took_s) for attempt in route.attempts)),
            started_at_s=self.at_s,
            first_token_s=None if route.first_token_s is None else route.first_token_s + took_s,
            total_s=None if route.total_s is None else route.total_s + took_s,
        )


def _later(attempt: Attempt, by_s: float) -> Attempt:
    return msgspec.structs.replace(attempt, at_s=attempt.at_s + by_s)


class _FetchedAnswer:
    """An answer whose model is on its way; satisfies ports.Answer."""

    def __init__(self, fetch: _Fetch, ready: trio.MemoryReceiveChannel[RoutedEvent]) -> None:
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
        pulls: Pulls,
        ask_pull: AskPull,
        config: RoutingConfig,
        unix_now: Callable[[], float],
        on_ask: Callable[[Ask], None] = lambda ask: None,
    ) -> None:
        """``on_ask`` is called with each request that comes; it must be cheap."""
        self._on_ask = on_ask
        self._router, self._catalog, self._presence, self._pulls = router, catalog, presence, pulls
        self._ask_pull, self._config, self._unix_now = ask_pull, config, unix_now
        self._fetches: OrderedDict[str, _Fetch] = OrderedDict()
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
        at_s, entered = self._unix_now(), False
        try:
            try:
                async with self._router.open_answer(ask, wishes) as answer:
                    entered = True
                    yield answer
                return
            except (NoProviders, ModelNotFound, Draining) as error:
                if entered:
                    raise
                nobody = error
            async with AsyncExitStack() as stack:
                yield await self._fetch_or_tell(ask, wishes, stack, nobody, at_s)
        finally:
            self.under_way -= 1

    async def _fetch_or_tell(
        self, ask: Ask, wishes: Wishes, stack: AsyncExitStack, error: MeshmaxError, at_s: float
    ) -> Answer:
        try:
            return await self._fetched(ask, wishes, stack, error)
        except MeshmaxError as nobody:
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
                        total_s=0.0,
                        kind=kind_of(ask),
                    )
                )
            raise

    async def _fetched(self, ask: Ask, wishes: Wishes, stack: AsyncExitStack, error: MeshmaxError) -> Answer:
        """An answer that a fetch begins. Raises ``error`` where none may or can be begun."""
        entry = next((entry for entry in self._catalog.entries() if entry.digest == ask.digest), None)
        loads = is_load_only(ask.request)  # which fetches nothing
        if entry is None:
            raise error
        plan = plan_pull(self._presence.peers(), ask.digest, entry.size)
        policy = wishes.policy or self._config.policy
        alone = policy == "local-only"
        if not plan.holders or (plan.able and not alone):
            raise error
        takers = [taker for taker in plan.takers if taker.ours or not alone]
        takers.sort(key=lambda taker: self._failed.get(taker.peer_id, 0.0) > trio.current_time())
        allowed = self._config.pull if wishes.pull is None else wishes.pull
        if plan.able or loads or not (plan.given and allowed and takers):
            off = "" if allowed or loads or plan.able or not plan.given else _FORBIDDEN if wishes.pull is False else _SWITCHED_OFF
            raise _nobody(ask, plan, entry.size, alone, off) from None
        named = f"{parse_name(split_digest(entry.name)[0]).full}@{ask.digest}"
        why: list[str] = []
        for taker in takers[:MAX_TRIES]:
            fetch = _Fetch(ask, taker, plan, entry.name, policy, self._unix_now(), trio.current_time())
            try:
                if taker.ours:
                    progress = await stack.enter_async_context(self._pulls.open_pull(named))
                    wait = partial(_watch, progress)
                else:
                    await self._ask_pull(taker.peer_id, named)
                    wait = partial(self._wait_for, taker, named, ask, WAIT_S + entry.size / SLOWEST_BYTES_PER_S)
            except MeshmaxError as refusal:
                why.append(f"{taker.name}: {refusal.message}")
                continue
            return await self._begin(ask, fetch, wait, wishes, stack)
        raise NoProviders(f"no peer could fetch model '{ask.name[:200]}' ({'; '.join(why)})")

    async def _begin(self, ask: Ask, fetch: _Fetch, wait: Wait, wishes: Wishes, stack: AsyncExitStack) -> Answer:
        _log.info("fetching first", model=fetch.model, peer=fetch.taker.peer_id, request_id=ask.request_id)
        self._fetches[ask.request_id] = fetch
        if len(self._fetches) > FETCHES_KEPT:
            self._fetches.popitem(last=False)
        return await stack.enter_async_context(self._open_fetched(ask, fetch, wait, wishes))

    @asynccontextmanager
    async def _open_fetched(self, ask: Ask, fetch: _Fetch, wait: Wait, wishes: Wishes) -> AsyncIterator[Answer]:
        made, ready = trio.open_memory_channel[RoutedEvent](EVENTS_AHEAD)
        answer = _FetchedAnswer(fetch, ready)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run, ask, fetch, wait, wishes, answer, made)
                yield answer
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if len(group.exceptions) != 1:
                raise
            raise group.exceptions[0] from None  # noqa: ASYNC123  the block's own, as it is
        finally:
            fetch.close("cancelled", trio.current_time() - fetch.began_s)

    async def _run(
        self,
        ask: Ask,
        fetch: _Fetch,
        wait: Wait,
        wishes: Wishes,
        answer: _FetchedAnswer,
        made: trio.MemorySendChannel[RoutedEvent],
    ) -> None:
        state: RequestState = "cancelled"
        with made:  # at once: while it waits to close, an error that is no one of ours would be lost to a cancellation
            try:
                ends_at = fetch.began_s + self._config.deadline_s
                await self._until_fetched(fetch, wait, ends_at)
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
                answer.error, state = error, "failed"
            finally:
                fetch.close(state, trio.current_time() - fetch.began_s)

    async def _until_fetched(self, fetch: _Fetch, wait: Wait, ends_at: float) -> None:
        try:
            with trio.move_on_at(ends_at) as scope:
                await wait()
            if scope.cancelled_caught:
                raise DeadlineExceeded(
                    f"model '{fetch.model}' could not be fetched within {self._config.deadline_s:g} s; what came of it is kept"
                )
        except MeshmaxError as error:
            fetch.error = error
            if not fetch.taker.ours:
                self._rest(fetch.taker.peer_id)
            raise
        finally:
            fetch.took_s = trio.current_time() - fetch.began_s
            _log.info(
                "fetched first", model=fetch.model, seconds=round(fetch.took_s, 3), failed=fetch.error is not None
            )

    def _rest(self, peer: PeerId) -> None:
        """Another peer has not fetched what it was to: others are asked first for a while."""
        now = trio.current_time()
        self._failed = {each: until for each, until in self._failed.items() if until > now}
        if len(self._failed) < MAX_FAILED:
            self._failed[peer] = now + REST_S

    async def _wait_for(self, taker: Taker, named: str, ask: Ask, most_s: float) -> None:
        """Until another peer says that it has the model: ``most_s`` at most, WAIT_S where it has none of it by then.

        Raises PeerGone, NoProviders, and what it says when it has given up.
        """
        began_s = asked_s = trio.current_time()
        while True:
            view = self._presence.view(taker.peer_id)
            if view is None or view.status is None or view.state == "offline":
                raise PeerGone(f"{taker.name} went away while it was fetching model '{ask.name[:200]}'")
            if any(model.digest == ask.digest and model.state != "partial" for model in view.status.models):
                return
            waited_s = trio.current_time() - began_s
            begun = any(model.digest == ask.digest for model in view.status.models)
            if waited_s >= (most_s if begun else WAIT_S):
                raise NoProviders(f"{taker.name} did not fetch model '{ask.name[:200]}' within {waited_s:.0f} s")
            if trio.current_time() - asked_s >= ASK_AGAIN_S:
                asked_s = trio.current_time()
                await self._ask_pull(taker.peer_id, named)
            await trio.sleep(LOOK_S)


async def _watch(progress: AsyncIterator[Transfer]) -> None:
    """Until the pull is done. Raises NoProviders with the reason where it failed, or waits for longer than WAIT_S."""
    reason, told_s = "it ended", trio.current_time()
    waits = trio.CancelScope()
    with waits:
        async for transfer in progress:
            if trio.current_time() - told_s >= TELL_S:
                told_s = trio.current_time()
                _log.info("fetching", model=transfer.model, done=transfer.bytes_done, of=transfer.bytes_total)
            if transfer.state == "done":
                return
            if transfer.state in ("failed", "cancelled"):
                raise NoProviders(f"model '{transfer.model}' could not be fetched: {transfer.reason or transfer.state}")
            idle = transfer.state in ("waiting", "paused")
            reason = transfer.reason or reason
            if not idle:
                waits.deadline = float("inf")
            elif waits.deadline == float("inf"):
                waits.deadline = trio.current_time() + WAIT_S
    raise NoProviders(f"the model could not be fetched: {reason}")


def ask_pull_of(distribution: Distribution) -> AskPull:
    """Another peer is asked as `meshmax distribute` asks it."""

    async def ask(peer: PeerId, named: str) -> None:
        answer = (await distribution.distribute(named, [peer]))[peer]
        if isinstance(answer, MeshmaxError):
            raise answer

    return ask


def _nobody(ask: Ask, plan: PullPlan, size: int, alone: bool, off: str) -> MeshmaxError:
    """``alone``: only we were asked for. ``off``: what forbids fetching it."""
    if alone:
        sentence = not_here(plan, ask.name[:200], size) + off
        return Draining(sentence) if plan.drained_here else NoProviders(sentence)
    if plan.drained:
        names = ", ".join(each.name or each.peer_id for each in plan.holders if each.verdict == "draining")
        return Draining(f"every peer that could answer with model '{ask.name[:200]}' is being drained: {names[:200]}")
    return NoProviders(
        f"no peer that could answer has model '{ask.name[:200]}'{who_could(plan, ask.name[:200], size)}{off}"
    )


def _ascii(text: str) -> str:
    """A name as a header can carry it."""
    return "".join(c if c.isascii() and c.isprintable() and c not in ",;" else "?" for c in text[:200])
