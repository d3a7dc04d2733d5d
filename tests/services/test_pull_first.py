"""Fetching first, with a router, a pull and peers that do what a test says: refusals, failures, deadlines, cancelling."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.config import RoutingConfig
from meshmax.base.errors import (
    Busy,
    DeadlineExceeded,
    Draining,
    EngineCrashed,
    MeshmaxError,
    ModelNotFound,
    NoProviders,
    PeerGone,
    Refused,
    StoreFull,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, Delta, Finish, GenerateRequest, RoutedEvent
from meshmax.base.route import Route, Wishes
from meshmax.base.status import PeerView
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.core.refusal import LostJustNow, NobodyNow
from meshmax.services.pull_first import SLOWEST_BYTES_PER_S, TOLD_S, PullFirst
from meshmax.services.shared_pulls import WAIT_S, SharedPull
from tests.core.test_pull_first import MODEL, SIZE, STORE, peer

Clock = trio.testing.MockClock
ME = peer("me", state="self", rtt_s=0.0)
ASK = Ask("r", MODEL, "m", GenerateRequest("hello"))
PULL_S = 5.0


class Said:
    """An answer's events, half a second apart."""

    def __init__(self, events: list[RoutedEvent | MeshmaxError]) -> None:
        self._events = list(events)

    def __aiter__(self) -> Said:
        return self

    async def __anext__(self) -> RoutedEvent:
        if not self._events:
            raise StopAsyncIteration
        await trio.sleep(0.5)
        event = self._events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event


class News(msgspec.Struct):
    """What a pull tells: where it stands, how much is there, why it waits; at its end whether it came."""

    state: str
    done: int = 0
    reason: str = ""


class World:
    """Satisfies Router, Catalog, Presence and Fetching. ``here``: the model has come; ``play``: what a pull tells, and when.

    ``plays``: of one peer.
    """

    def __init__(self, *views: PeerView, config: RoutingConfig | None = None) -> None:
        self.views = list(views)
        self.here, self.listed = False, True
        self.refuse: MeshmaxError = NoProviders("nobody has it")
        self.play: list[tuple[float, News]] = [(PULL_S, News("done"))]
        self.plays: dict[str, list[tuple[float, News]]] = {}
        self.events: list[RoutedEvent | MeshmaxError] = [Delta("hello"), Finish()]
        self.asked: list[str] = []
        self.asks: dict[str, MeshmaxError | None] = {}
        self.pulling = self.answering = 0
        self.unix_s = 1000.0
        self.known: Route | None = None  # what the router remembers
        config = config or RoutingConfig()
        catalog: Any = SimpleNamespace(
            entries=lambda: (SimpleNamespace(name="m:latest", digest=MODEL, size=SIZE),) if self.listed else (),
            resolve=self.resolve,
        )
        parts: Any = self
        self.prompts = PullFirst(parts, catalog, parts, parts, config, lambda: self.unix_s)

    # --- Router

    @asynccontextmanager
    async def open_answer(self, ask: Ask, wishes: Wishes) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        if not self.here:
            raise self.refuse
        route = Route(ask.request_id, ask.digest, PeerId("me"), "me: fast")
        answer = SimpleNamespace(route=route, events=Said(self.events))
        self.answering += 1
        try:
            yield answer
        finally:
            self.answering -= 1
            answer.route = msgspec.structs.replace(route, state="cancelled")

    def routes(self) -> tuple[Route, ...]:
        return ()

    def route(self, request_id: str) -> Route | None:
        return self.known

    # --- Presence

    def peers(self) -> tuple[PeerView, ...]:
        return tuple(self.views)

    def view(self, peer_id: PeerId) -> PeerView | None:
        return next((view for view in self.views if view.peer_id == peer_id), None)

    # --- Catalog

    def resolve(self, name: str, *, parts: bool = False) -> Any:
        if self.listed or not parts:
            raise ModelNotFound
        assert name == f"m@{MODEL}"
        return SimpleNamespace(entry=SimpleNamespace(name="m:latest", digest=MODEL, size=SIZE))

    # --- pulls

    @asynccontextmanager
    async def open_pull(self, peer_id: PeerId, name: str, digest: Sha256) -> AsyncIterator[SharedPull]:
        await trio.lowlevel.checkpoint()
        self.asked.append(f"{peer_id} {name}")
        if error := self.asks.get(peer_id):
            raise error
        self.pulling += 1
        pull = SharedPull(name)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._play, pull, self.plays.get(peer_id, self.play))
                yield pull
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # noqa: ASYNC123  as the real one, which has no nursery
        finally:
            self.pulling -= 1

    async def _play(self, pull: SharedPull, play: list[tuple[float, News]]) -> None:
        for after_s, news in play:
            await trio.sleep(after_s)
            if news.state == "done":
                self.here = True
                pull.end()
            elif news.state == "failed":
                pull.end(NoProviders(f"model 'm:latest' could not be fetched: {news.reason}"))
            else:
                pull.on_news(news.state != "running", news.done, SIZE, news.reason)

    def becomes(self, number: int, view: PeerView) -> None:
        self.views[number] = view


async def text(world: World, wishes: Wishes = Wishes()) -> str:  # noqa: B008  frozen
    async with world.prompts.open_answer(ASK, wishes) as answer:
        return "".join([event.text async for event in answer.events if isinstance(event, Delta)])


def only(world: World) -> Route:
    (route,) = world.prompts.routes()
    assert world.prompts.route("r") == route
    return route


async def test_it_is_fetched_and_then_answered(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    assert await text(world) == "hello"
    assert world.asked == ["me registry.ollama.ai/library/m:latest"]
    assert only(world).line == "fetched m:latest to this peer first, 5.0 s; me: fast"
    assert (world.pulling, world.answering, world.prompts.under_way) == (0, 0, 0)


async def test_who_refuses_is_followed_by_the_next_best(autojump_clock: Clock) -> None:
    world = World(ME, peer("b", gpu=8), STORE)
    world.asks["b"] = Refused("b pulls nothing that others ask for")
    assert await text(world) == "hello"
    assert [who.partition(" ")[0] for who in world.asked] == ["b", "me"]


async def test_where_all_refuse_every_reason_is_told(autojump_clock: Clock) -> None:
    world = World(ME, peer("b"), STORE)
    world.asks |= {"b": Refused("no"), "me": StoreFull()}
    with pytest.raises(NoProviders, match=r"could fetch model 'm:latest' \(me: The disk is full.*; b: no\)"):
        await text(world)
    assert only(world).state == "failed"


async def test_a_model_whose_holder_was_lost_just_now_is_fetched_from_who_only_stores_it(
    autojump_clock: Clock,
) -> None:
    world = World(ME, STORE)
    world.refuse = LostJustNow("b was lost just now", 2.0)
    assert await text(world) == "hello"


@pytest.mark.parametrize("why", ["nobody to fetch from", "refused", "forbidden"])
async def test_where_it_cannot_be_fetched_that_its_holder_was_lost_just_now_is_what_is_told(
    why: str, autojump_clock: Clock
) -> None:
    world = World(ME) if why == "nobody to fetch from" else World(ME, STORE)
    world.refuse = LostJustNow("b was lost just now", 2.0)
    world.asks["me"] = StoreFull()
    with pytest.raises(LostJustNow, match="b was lost") as caught:
        await text(world, Wishes(pull=False if why == "forbidden" else None))
    assert caught.value.retry_after_s == 2.0
    assert only(world).line == "nobody was asked: b was lost just now"
    assert bool(world.asked) == (why == "refused")  # without a holder a pull would ask registries


@pytest.mark.parametrize(
    ("error", "after_s"), [(Busy("as many as there is room for", 30.0), 30.0), (PeerGone(), 2.0), (Draining(), None)]
)
async def test_where_one_that_refused_may_fetch_it_later_the_client_is_told_to_come_again(
    error: MeshmaxError, after_s: float | None, autojump_clock: Clock
) -> None:
    world = World(ME, peer("b"), STORE)
    world.asks |= {"b": error, "me": Refused("no")}
    with pytest.raises(
        NobodyNow if after_s else NoProviders, match=r"could fetch model 'm:latest' \(me: no; b: "
    ) as caught:
        await text(world)
    assert getattr(caught.value, "retry_after_s", None) == after_s


@pytest.mark.parametrize("error", [EngineCrashed(), PeerGone()])
async def test_other_failures_are_no_reason_to_fetch(error: MeshmaxError, autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    world.refuse = error
    with pytest.raises(type(error)):
        await text(world)
    assert world.asked == []


async def test_a_pull_that_fails_ends_the_answer_with_its_reason(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    world.play = [(1.0, News("running")), (1.0, News("failed", reason="the disk is full"))]
    with pytest.raises(NoProviders, match="'m:latest' could not be fetched: the disk is full"):
        await text(world)
    route = only(world)
    assert (route.state, route.total_s, route.attempts[0].error) == ("failed", 2.0, "no_providers")
    assert route.line == "m:latest could not be fetched to this peer (no_providers)"


async def test_a_pull_that_waits_is_waited_for_only_so_long_and_from_its_last_byte(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    waits = News("waiting", reason="nobody has the rest")
    world.play = [(0.0, waits), (PATIENCE_S - 1, News("running")), (10.0, waits), (9999.0, News("done"))]
    began = trio.current_time()
    with pytest.raises(NoProviders, match="nobody has the rest"):
        await text(world)
    assert trio.current_time() - began == pytest.approx(PATIENCE_S - 1 + 10 + PATIENCE_S)


async def test_the_deadline_of_a_request_holds_for_fetching_too(autojump_clock: Clock) -> None:
    world = World(ME, STORE, config=RoutingConfig(deadline_s=20.0))
    world.play = [(500.0, News("done"))]
    with pytest.raises(DeadlineExceeded, match="within 20 s"):
        await text(world)


async def test_what_is_left_of_the_deadline_after_fetching_is_for_the_answer(autojump_clock: Clock) -> None:
    world = World(ME, STORE, config=RoutingConfig(deadline_s=20.0))
    world.play = [(15.0, News("done"))]
    world.events = [Delta("word") for _ in range(100)]
    began = trio.current_time()
    with pytest.raises(DeadlineExceeded, match="within 20 s"):
        await text(world)
    assert trio.current_time() - began == pytest.approx(20.0)
    assert not world.answering
    assert only(world).state == "failed"


async def test_another_try_under_the_same_id_is_the_one_that_is_told(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    world.asks = {"me": StoreFull("no room")}
    with pytest.raises(NoProviders):
        await text(world)
    assert only(world).line.startswith("nobody was asked")
    world.unix_s += 1
    world.asks = {}
    world.play = [(1.0, News("failed", reason="gone"))]
    with pytest.raises(NoProviders):
        await text(world, Wishes(policy="least-loaded"))
    failed = world.prompts.route("r")
    assert failed is not None
    assert (failed.line[:30], failed.policy) == ("m:latest could not be fetched ", "least-loaded")
    world.unix_s += 1
    world.here = True
    answered = Route("r", MODEL, PeerId("me"), "me: fast", started_at_s=world.unix_s)
    world.known = answered
    assert await text(world) == "hello"
    assert world.prompts.route("r") == answered


def elsewhere(*others: PeerView, config: RoutingConfig | None = None) -> World:
    """We only store the model; the pulls of these peers succeed, and their statuses say so at once."""
    return World(peer("store", "disk", engine="none", state="self"), *others, config=config)


async def test_another_peer_is_waited_for_until_its_status_tells_of_the_model(autojump_clock: Clock) -> None:
    world = elsewhere(peer("b"))
    async with trio.open_nursery() as nursery:

        async def later() -> None:
            await trio.sleep(PULL_S + 3)
            world.becomes(1, peer("b", "disk"))

        nursery.start_soon(later)
        assert await text(world) == "hello"
    assert only(world).attempts[0].ended_s == pytest.approx(PULL_S + 3, abs=0.5)


async def test_a_peer_that_says_it_has_fetched_and_does_not_have_it_is_not_waited_for(autojump_clock: Clock) -> None:
    world = elsewhere(peer("b"))
    with pytest.raises(NoProviders, match="said that it had fetched"), trio.fail_after(PULL_S + TOLD_S + 1):
        await text(world)


@pytest.mark.parametrize("error", [StoreFull(), PeerGone("b is gone"), NoProviders("nobody gives it to b")])
async def test_where_a_peer_that_fetches_fails_the_next_one_does(error: MeshmaxError, autojump_clock: Clock) -> None:
    world = elsewhere(peer("b", gpu=8), peer("c", "partial"))

    class Failing(SharedPull):
        async def wait(self, until_s: float = 0.0) -> None:
            await trio.sleep(2.0)
            raise error

    usual = world.open_pull

    @asynccontextmanager
    async def open_pull(peer_id: PeerId, name: str, digest: Sha256) -> AsyncIterator[SharedPull]:
        async with usual(peer_id, name, digest) as pull:
            if peer_id == "c":
                world.becomes(2, peer("c", "disk"))
            yield pull if peer_id == "c" else Failing(name)

    world.open_pull = open_pull  # type: ignore[method-assign]
    async with world.prompts.open_answer(ASK) as answer:
        assert answer.route.line == "fetching m:latest to b first"
        assert "".join([event.text async for event in answer.events if isinstance(event, Delta)]) == "hello"
    route = only(world)
    assert route.line == "fetched m:latest to c first, 5.0 s; me: fast"
    fetches = [(each.peer_id, each.error, each.at_s, each.ended_s) for each in route.attempts]
    assert fetches == [("b", error.code, 0.0, 2.0), ("c", "", 2.0, 5.0)]
    assert world.pulling == 0


async def test_where_we_ourselves_find_no_source_no_other_peer_is_sent_to_look_for_one(autojump_clock: Clock) -> None:
    world = World(ME, peer("b"), STORE)
    world.play = [(1.0, News("failed", reason="its holder is gone"))]
    with pytest.raises(NoProviders, match="its holder is gone"):
        await text(world)
    assert len(world.asked) == 1


@pytest.mark.parametrize("fetched", [0, 1])
async def test_a_peer_that_only_says_that_it_fetches_is_not_waited_for_very_long_and_asked_last_after_that(
    fetched: int, autojump_clock: Clock
) -> None:
    world = elsewhere(peer("b", gpu=8), peer("c"), config=RoutingConfig(deadline_s=1e6))
    world.plays["b"] = [
        (20.0, News("running", number * fetched)) for number in range(10_000)
    ]  # bytes look like progress
    world.asks["c"] = Refused("no")
    most_s = WAIT_S + (SIZE / SLOWEST_BYTES_PER_S if fetched else 0.0)
    began = trio.current_time()
    with pytest.raises(NoProviders, match="could not be fetched within"):
        await text(world)
    assert trio.current_time() - began == pytest.approx(most_s)
    world.asks.clear()
    world.asked.clear()
    async with world.prompts.open_answer(ASK):
        assert [asked.split()[0] for asked in world.asked] == ["c"]


async def test_what_only_parts_are_left_of_is_fetched_too(autojump_clock: Clock) -> None:
    world = World(ME, peer("b", "partial"), peer("c", "partial", engine="none"))
    world.listed = False
    assert await text(world) == "hello"
    assert world.asked == ["me registry.ollama.ai/library/m:latest"]


async def test_what_breaks_after_the_fetch_is_the_clients_to_see(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    world.events = [Delta("hel"), EngineCrashed("it crashed")]
    async with world.prompts.open_answer(ASK) as answer:
        assert await anext(answer.events) == Delta("hel")
        with pytest.raises(EngineCrashed, match="it crashed"):
            await anext(answer.events)


async def test_an_error_of_the_client_itself_is_not_taken_for_nobody(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    world.here = True
    with pytest.raises(Draining):
        async with world.prompts.open_answer(ASK):
            raise Draining
    assert (world.asked, world.answering, world.prompts.under_way) == ([], 0, 0)


async def test_a_request_that_only_loads_fetches_nothing(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    with pytest.raises(NoProviders, match="me could hold it: `meshmax pull m`"):
        async with world.prompts.open_answer(msgspec.structs.replace(ASK, request=GenerateRequest())):
            pass
    assert world.asked == []


async def test_the_newest_requests_are_remembered_first_and_not_for_ever(autojump_clock: Clock) -> None:
    world = World(STORE)
    for number in range(60):
        world.unix_s += 1
        with pytest.raises(NoProviders, match="no peer that is here now runs models"):
            async with world.prompts.open_answer(msgspec.structs.replace(ASK, request_id=f"r{number}")):
                pass
    routes = world.prompts.routes()
    assert [route.request_id for route in routes[:2]] == ["r59", "r58"]
    assert len(routes) == 50
    assert world.prompts.route("r59") == routes[0]
    assert world.prompts.route("r1") is None


@pytest.mark.parametrize(
    "make", [lambda: World(ME, STORE), lambda: World(peer("store", "disk", engine="none"), peer("b"))]
)
async def test_cancelled_at_any_moment_it_leaves_nothing(make: Callable[[], World], autojump_clock: Clock) -> None:
    for step in range(30):
        world = make()
        with trio.move_on_after(step * 0.25) as scope:
            await text(world)
        assert (world.pulling, world.answering, world.prompts.under_way) == (0, 0, 0)
        if scope.cancelled_caught and world.prompts.routes():
            assert only(world).state == "cancelled"


async def test_a_programming_error_is_not_hidden(autojump_clock: Clock) -> None:
    world = World(ME, STORE)
    world.events = [ZeroDivisionError("oops")]  # type: ignore[list-item]
    with pytest.raises(ZeroDivisionError):
        await text(world)
