"""Answers that go on whatever becomes of the peers: real residencies, servers and clients over a network in memory."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, Draining, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.inference import (
    Ask,
    ChatRequest,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Message,
    Moved,
    RoutedEvent,
    Vector,
)
from meshmax.base.status import Gpu, Load, PeerView
from meshmax.core.breaker import BUSY_SPREAD
from meshmax.core.pace import FRAME_SILENCE_S
from meshmax.ports import Stream
from meshmax.services.delivery import MAX_READY
from meshmax.services.frames import FrameStream
from meshmax.services.infer_server import InferServer
from meshmax.telemetry.metrics import ATTEMPTS, HEDGES, SUSPECTED
from meshmax.wire.failure import failure_of
from meshmax.wire.infer import ASK_PART, REPLY, Accepted, Events, KeepAlive
from meshmax.wire.protocols import INFER
from tests.services.infer_site import MODEL, WORDS, Site, ask, open_site

Clock = trio.testing.MockClock


def lonely(site: Site) -> None:
    """The first node, where the client asks, has no copy; the others are the nearer the lower their number."""
    site[0].has.clear()
    for number, node in enumerate(site.nodes[1:], 1):
        node.change = away(0.001 * number)


def away(rtt_s: float) -> Callable[[PeerView], PeerView]:
    return lambda view: msgspec.structs.replace(view, rtt_s=rtt_s)


async def loaded(*nodes: object) -> None:
    for node in nodes:
        async with node.residency.open_answer(ask(GenerateRequest())) as events:  # type: ignore[attr-defined]
            await anext(events)


def text(events: list[RoutedEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def collect(
    site: Site, on_event: Callable[[int], None] = lambda count: None, **fields: object
) -> list[RoutedEvent]:
    """The whole answer; ``on_event`` hears how many events there were."""
    events: list[RoutedEvent] = []
    async with site[0].router.open_answer(ask(**fields)) as answer:  # type: ignore[arg-type]
        async for event in answer.events:
            events.append(event)
            on_event(len(events))
    return events


def after(count: int, what: Callable[[], object]) -> Callable[[int], None]:
    def on_event(seen: int) -> None:
        if seen == count:
            what()

    return on_event


async def test_a_frozen_peer_is_left_before_the_client_is_out_of_patience(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)
        await loaded(site[1], site[2])
        suspected = SUSPECTED.labels(sign="frozen")._value.get()
        times: list[float] = []

        def seen(count: int) -> None:
            times.append(trio.current_time())
            if count == 10:
                site.network.freeze(site[1].peer_id)

        events = await collect(site, seen)
        assert text(events) == WORDS
        assert max(b - a for a, b in pairwise(times)) < FRAME_SILENCE_S + 0.3
        assert [event.peer_id for event in events if isinstance(event, Moved)] == [site[2].peer_id]
        assert SUSPECTED.labels(sign="frozen")._value.get() == suspected + 1
        assert [a.error for a in site[0].router.routes()[0].attempts] == ["peer_gone", ""]


async def test_a_peer_that_comes_back_in_time_goes_on_itself_and_the_other_stops(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20, load_s=2.0) as site:
        lonely(site)
        await loaded(site[1])

        async def naps() -> None:
            await trio.sleep(1.0)
            site.network.freeze(site[1].peer_id)
            await trio.sleep(1.6)
            site.network.thaw(site[1].peer_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(naps)
            events = await collect(site)
        assert text(events) == WORDS
        assert not [event for event in events if isinstance(event, Moved)]
        assert [(a.kind, a.error) for a in site[0].router.routes()[0].attempts] == [
            ("first", ""),
            ("continuation", "cancelled"),
        ]
        await trio.sleep(10)
        assert site[2].produced == 0
        assert not site[2].server.active


async def test_a_hanging_engine_is_left_though_its_peer_says_that_it_is_still_at_it(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)
        await loaded(site[1], site[2])

        async def hangs(stream: Stream) -> None:
            frames = FrameStream(stream)
            await frames.receive(ASK_PART)
            await frames.send(REPLY, Accepted())
            for word in ("word0", " word1", " word2", " word3"):
                await frames.send(REPLY, Events((Delta(word),)))
                await trio.sleep(0.05)
            while True:
                await frames.send(REPLY, KeepAlive())
                await trio.sleep(0.5)

        site[1].swarm.serve(INFER, hangs)
        begun = trio.current_time()
        assert text(await collect(site)) == WORDS
        assert trio.current_time() - begun < 0.2 + 1.3 + 96 / 20 + 0.5
        assert [a.error for a in site[0].router.routes()[0].attempts] == ["engine", ""]


async def test_a_draining_peer_hands_its_stream_over_and_is_no_failure(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)

        async def drains(stream: Stream) -> None:
            frames = FrameStream(stream)
            await frames.receive(ASK_PART)
            await frames.send(REPLY, Accepted())
            await frames.send(REPLY, Events((Delta("word0"), Delta(" word1", tokens=1))))
            await frames.send(REPLY, failure_of(Draining()))

        site[1].swarm.serve(INFER, drains)
        events = await collect(site)
        assert text(events) == WORDS
        assert [event.peer_id for event in events if isinstance(event, Moved)] == [site[2].peer_id]
        standing = site[0].router.measurements.breakers.standing(site[1].peer_id, MODEL, trio.current_time())
        assert standing.failures == 0


async def test_a_crash_of_our_own_engine_in_the_middle_goes_on_at_a_peer_and_back(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=20) as site:
        crashed = []

        def crash(count: int) -> None:
            if count == 10:
                site[0].engine.models[0].crash()
                crashed.append(0)
            if count == 40:
                site.network.kill(site[1].peer_id)

        events = await collect(site, crash)
        assert text(events) == WORDS
        moved = [event.peer_id for event in events if isinstance(event, Moved)]
        assert moved == [site[1].peer_id, site[0].peer_id]
        finish = events[-1]
        assert isinstance(finish, Finish)
        assert finish.output_tokens == 100


async def test_missing_vectors_are_asked_elsewhere(autojump_clock: Clock) -> None:
    texts = tuple(WORDS.split())
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)
        undisturbed = await collect(site, request=EmbedRequest(texts))
        events = await collect(site, after(30, lambda: site.network.kill(site[1].peer_id)), request=EmbedRequest(texts))
        vectors = {event.index: event.values for event in events if isinstance(event, Vector)}
        assert vectors == {event.index: event.values for event in undisturbed if isinstance(event, Vector)}
        assert len([event for event in events if isinstance(event, Vector)]) == 100
        assert site[2].produced <= 71


# --- hedging -----------------------------------------------------------------------------------------------------------


class SlowStart:
    """A residency whose answers begin ``wait_s`` late."""

    def __init__(self, site: Site, number: int, wait_s: float) -> None:
        self._residency, self._wait_s = site[number].residency, wait_s
        InferServer(self).register(site[number].swarm)  # type: ignore[arg-type]

    @asynccontextmanager
    async def open_answer(self, ask: Ask, requester: PeerId | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        await trio.sleep(self._wait_s)
        async with self._residency.open_answer(ask) as events:
            yield events

    def load(self) -> Load:
        return self._residency.load()


async def test_a_late_first_token_brings_a_second_peer_and_the_loser_stops_working(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)
        await loaded(site[1], site[2])
        for _ in range(25):  # how soon first tokens come is learnt
            await collect(site, request="one two")
        last = site[0].router.routes()[0].peer_id
        late = next(number for number, node in enumerate(site.nodes) if node.peer_id == last)
        before = site[late].produced
        SlowStart(site, late, 30.0)
        won = HEDGES.labels(outcome="won")._value.get()
        begun = trio.current_time()
        assert text(await collect(site, request="one two")) == "one two"
        assert trio.current_time() - begun < 0.5
        route = site[0].router.routes()[0]
        assert [(a.kind, a.error) for a in route.attempts] == [("first", "cancelled"), ("hedge", "")]
        assert sorted(candidate.verdict for candidate in route.candidates) == ["chosen", "slower"]
        assert route.line.endswith(f"; peer{late} was asked before, and had said nothing yet")
        assert (route.kind, route.among) == ("text", 2)
        assert route.peer_id == site[3 - late].peer_id
        assert HEDGES.labels(outcome="won")._value.get() == won + 1
        await trio.sleep(60)
        assert site[late].produced == before


async def test_the_loser_of_a_hedge_makes_no_token_more(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=1) as site:  # a second for the first token: both have begun
        lonely(site)
        await loaded(site[1], site[2])
        for number in (1, 2):
            site[number].change = advertised(site, number)
        assert text(await collect(site)) == WORDS
        route = site[0].router.routes()[0]
        assert [a.kind for a in route.attempts] == ["first", "hedge"]
        assert sorted(node.produced for node in site.nodes[1:]) == [0, 100]
        assert sorted(a.error for a in route.attempts) == ["", "cancelled"]
        assert all(not node.server.active for node in site.nodes)


def advertised(site: Site, number: int) -> Callable[[PeerView], PeerView]:
    """It says that it is a thousand times faster than it is, so that it seems late."""

    def change(view: PeerView) -> PeerView:
        assert view.status is not None
        models = tuple(
            msgspec.structs.replace(model, prefill_per_s=1e6, decode_per_s=1e6, size=1 << 20)
            for model in view.status.models
        )
        return msgspec.structs.replace(
            view, rtt_s=0.001 * number, status=msgspec.structs.replace(view.status, models=models)
        )

    return change


@pytest.mark.parametrize(
    ("request_", "fields", "hedged"),
    [
        (GenerateRequest("one two", raw=True), {}, True),
        (EmbedRequest(("one", "two")), {}, True),
        (GenerateRequest("one two", raw=True), {"priority": "batch"}, False),
        (GenerateRequest(), {}, False),
        (ChatRequest(), {"keep_alive_s": 60.0}, False),
    ],
)
async def test_only_what_somebody_waits_for_is_sent_twice(
    request_: InferRequest, fields: dict[str, object], hedged: bool, autojump_clock: Clock
) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)
        await loaded(site[1], site[2])
        SlowStart(site, 1, 30.0)
        won = HEDGES.labels(outcome="won")._value.get()
        await collect(site, request=request_, **fields)  # type: ignore[arg-type]
        kinds = [attempt.kind for attempt in site[0].router.routes()[0].attempts]
        assert kinds == (["first", "hedge"] if hedged else ["first"])
        assert HEDGES.labels(outcome="won")._value.get() == won + hedged


async def test_nothing_is_sent_twice_where_only_a_broken_peer_is_left_beside_us(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1) as site:
        await loaded(site[0], site[1])
        site[0].change = advertised(site, 0)  # so that we seem late
        site[0].router.measurements.breakers.on_failure(site[1].peer_id, None, "peer_gone", trio.current_time(), 60.0)
        assert text(await collect(site, request="one two")) == "one two"
        (attempt,) = site[0].router.routes()[0].attempts
        assert (attempt.kind, attempt.peer_id) == ("first", site[0].peer_id)


async def test_at_most_one_request_in_twenty_is_sent_twice(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        lonely(site)
        await loaded(site[1], site[2])
        hedges = ATTEMPTS.labels(kind="hedge")._value.get()
        chance = random.Random(6)
        for _ in range(200):
            SlowStart(site, 1, 4.0 if chance.random() < 0.5 else 0.0)
            await collect(site, request="one two")
        assert ATTEMPTS.labels(kind="hedge")._value.get() - hedges <= 0.05 * 200 + 2


async def test_a_load_that_was_expected_is_no_reason_for_a_second_peer(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20, load_s=3.0) as site:
        lonely(site)
        assert text(await collect(site)) == WORDS
        assert [a.kind for a in site[0].router.routes()[0].attempts] == ["first"]
        assert not site[2].engine.models


# --- what is remembered ------------------------------------------------------------------------------------------------


async def test_a_conversation_is_held_by_who_went_on_with_it_and_by_nobody_who_went_away(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=50) as site:
        lonely(site)
        await loaded(site[1], site[2])
        turns = [Message("user", WORDS)]
        assert text(await collect(site, request=ChatRequest(tuple(turns)))) == WORDS
        assert site[0].router.routes()[0].peer_id == site[1].peer_id
        turns += [Message("assistant", WORDS), Message("user", WORDS.upper())]

        def crash() -> None:
            site[1].engine.models[0].crash()

        events = await collect(site, after(10, crash), request=ChatRequest(tuple(turns)))
        assert [event.peer_id for event in events if isinstance(event, Moved)] == [site[2].peer_id]
        turns += [Message("assistant", text(events)), Message("user", "and now")]
        await loaded(site[1])
        await collect(site, request=ChatRequest(tuple(turns)))
        told = {candidate.peer_id: candidate.why for candidate in site[0].router.routes()[0].candidates}
        assert "tokens of the prompt read" in told[site[2].peer_id]
        assert "tokens of the prompt read" not in told[site[1].peer_id]


async def test_figures_of_a_model_that_does_not_fit_its_gpu_are_kept_as_of_the_cpu(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=50) as site:
        lonely(site)

        def small_gpu(view: PeerView) -> PeerView:
            assert view.status is not None
            models = tuple(msgspec.structs.replace(m, state="disk", device="gpu") for m in view.status.models)
            status = msgspec.structs.replace(view.status, models=models, gpus=(Gpu("g", 0, 1 << 20),))
            return msgspec.structs.replace(view, status=status)

        site[1].change = small_gpu
        assert text(await collect(site)) == WORDS
        site[1].change = away(0.001)  # now it is loaded, on the CPU
        await collect(site)
        (candidate,) = site[0].router.routes()[0].candidates
        assert candidate.device == "cpu"
        assert candidate.figures.output_s == pytest.approx(2.0, rel=0.2)  # a hundred words at 50 a second, as measured


@pytest.mark.parametrize(
    "request_", [GenerateRequest(WORDS), ChatRequest((Message("user", WORDS),)), EmbedRequest(("a",) * 100)]
)
@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
async def test_the_record_of_a_request_is_right_whatever_its_end(
    request_: InferRequest, state: str, autojump_clock: Clock
) -> None:
    async with open_site(2, echo_tokens_per_s=20) as site:
        lonely(site)
        began, seen = trio.current_time(), 0
        with suppress(PeerGone):
            async with site[0].router.open_answer(ask(request_)) as answer:
                running = answer.route
                async for _ in answer.events:
                    seen += 1
                    if seen == 10 and state == "cancelled":
                        break
                    if seen == 10 and state == "failed":
                        site[1].change = lambda view: msgspec.structs.replace(view, state="offline")
                        site.network.kill(site[1].peer_id)
        (route,) = site[0].router.routes()
        (attempt, *others) = route.attempts
        assert (running.state, route.state) == ("running", state)
        assert route.total_s == pytest.approx(trio.current_time() - began)
        assert route.first_token_s == attempt.first_token_s
        assert attempt.ended_s is not None
        assert route.total_s is not None
        assert attempt.at_s + attempt.ended_s <= route.total_s
        assert (attempt.kind, attempt.error) == ("first", {"done": "", "failed": "peer_gone", "cancelled": ""}[state])
        assert not others
        words = 0 if isinstance(request_, EmbedRequest) else 100 if state == "done" else 10
        assert (route.output_tokens, attempt.tokens) == (words, words)
        assert (route.prompt_tokens > 0) == (state == "done")
        for candidate in route.candidates:
            parts = candidate.figures
            total_s = parts.rtt_s + parts.queue_s + parts.load_s + parts.prompt_s + parts.output_s
            assert candidate.estimate_s == pytest.approx(total_s)


# --- the client's side -------------------------------------------------------------------------------------------------


async def test_a_slow_client_holds_the_peer_up_and_suspects_nobody(autojump_clock: Clock) -> None:
    words = " ".join(f"{n}{'x' * 2000}" for n in range(2000))
    async with open_site(3, echo_tokens_per_s=1e5) as site:
        lonely(site)
        async with site[0].router.open_answer(ask(words)) as answer:
            first = await anext(answer.events)
            await trio.sleep(20)
            assert site[1].produced <= MAX_READY + 256 + 1000
            assert isinstance(first, Delta)
            assert first.text + text([event async for event in answer.events]) == words
        assert [a.kind for a in site[0].router.routes()[0].attempts] == ["first"]


async def test_that_all_are_full_is_told_at_once_and_nobody_is_asked_again_before_the_time(
    autojump_clock: Clock,
) -> None:
    async with open_site(2, echo_tokens_per_s=20) as site:
        lonely(site)
        asked = []

        async def full(stream: Stream) -> None:
            frames = FrameStream(stream)
            await frames.receive(ASK_PART)
            asked.append(trio.current_time())
            await frames.send(REPLY, failure_of(Busy("full", 9.0)))
            await trio.sleep(1)

        site[1].swarm.serve(INFER, full)
        for after_s in (0.0, 4.0, 6.0):
            await trio.sleep(after_s)
            begun = trio.current_time()
            with pytest.raises(Busy) as caught:
                await collect(site)
            assert trio.current_time() - begun < 0.1
            assert 1.0 <= caught.value.retry_after_s <= 9.0 * (1 + BUSY_SPREAD)
            assert "peer1, the only one that has model 'echo' ready, is busy; there is room in about " in str(
                caught.value
            )
        assert len(asked) == 2


async def test_a_route_tells_of_a_request_under_way(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=20) as site:
        lonely(site)
        async with site[0].router.open_answer(ask()) as answer:
            await anext(answer.events)
            (running,) = site[0].router.routes()
            assert (running.state, running.total_s, running.output_tokens) == ("running", None, 1)
            assert running.first_token_s == pytest.approx(0.05, abs=0.02)
        (left,) = site[0].router.routes()
        assert left.state == "cancelled"
        assert left.attempts[0].ended_s is not None
        assert "word" not in str(left)


async def test_any_mix_of_kills_and_freezes_leaves_answers_whole(autojump_clock: Clock) -> None:
    for seed in range(8):
        chance = random.Random(seed)
        async with open_site(6, echo_tokens_per_s=50, parallel=8) as site:
            lonely(site)

            async def strike(number: int, at_s: float, kill: bool, site: Site = site) -> None:
                await trio.sleep(at_s)
                (site.network.kill if kill else site.network.freeze)(site[number].peer_id)

            async with trio.open_nursery() as nursery:
                for number in chance.sample(range(1, 6), 4):
                    nursery.start_soon(strike, number, chance.uniform(0, 3), chance.random() < 0.5)

                async def one(after_s: float, site: Site = site) -> None:
                    await trio.sleep(after_s)
                    events = await collect(site)
                    assert text(events) == WORDS
                    assert isinstance(finish := events[-1], Finish)
                    assert finish.output_tokens == 100

                for _ in range(10):
                    nursery.start_soon(one, chance.uniform(0, 3))
            assert site[0].residency.load().running == 0
            assert all(site[0].router.outstanding.count(node.peer_id) == 0 for node in site.nodes)
