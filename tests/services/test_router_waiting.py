"""Requests that wait for peers which cannot be asked now: one finds out, the rest follow at once or hear when."""

import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, EngineUnavailable, MeshmaxError
from meshmax.base.inference import Delta, Finish, Moved, RoutedEvent
from meshmax.base.status import Load, PeerView
from meshmax.core.breaker import BUSY_SPREAD, FIRST_BACKOFF_S, MAX_BACKOFF_S, OWN_BACKOFF_S
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.core.refusal import LostJustNow, NobodyNow
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.wire.failure import Failure
from meshmax.wire.infer import ASK_PART, REPLY
from meshmax.wire.protocols import INFER
from tests.services.infer_site import MODEL, WORDS, Node, Site, ask, open_site, text_of

Clock = trio.testing.MockClock


class Door:
    """Stands before a node's server: counts who asks and when; turns all away with ``failure`` while there is one."""

    def __init__(self, node: Node) -> None:
        self.node, self.asked, self.out, self.most = node, list[float](), 0, 0
        self.failure: Failure | None = None
        node.swarm.serve(INFER, self._answer)

    async def _answer(self, stream: Stream) -> None:
        self.asked.append(trio.current_time())
        if self.failure is None:
            await self.node.server.answer(stream)
            return
        self.out += 1
        self.most = max(self.most, self.out)
        frames = FrameStream(stream)
        await frames.receive(ASK_PART)
        await trio.sleep(0.2)
        self.out -= 1
        await frames.send(REPLY, self.failure)


def holder(site: Site) -> Door:
    """The first node, where clients ask, has no copy; the second has."""
    site[0].has.clear()
    return Door(site[1])


def fails(site: Site, number: int = 1, at_least_s: float = 0.0) -> None:
    """The entry peer has just lost that one."""
    now = trio.current_time()
    site[0].router.measurements.breakers.on_failure(site[number].peer_id, None, "peer_gone", now, at_least_s)


def changed(site: Site, number: int, change: Callable[[PeerView], PeerView]) -> None:
    """The node is seen otherwise, and the entry peer hears of it."""
    site[number].change = change
    site[0].router.on_news()


def loaded(load: Load) -> Callable[[PeerView], PeerView]:
    def change(view: PeerView) -> PeerView:
        assert view.status is not None
        return msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, load=load))

    return change


def restarted(instance: str) -> Callable[[PeerView], PeerView]:
    def change(view: PeerView) -> PeerView:
        assert view.status is not None
        return msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, instance=instance))

    return change


def as_it_is(view: PeerView) -> PeerView:
    return view


def offline(view: PeerView) -> PeerView:
    return msgspec.structs.replace(view, state="offline")


async def answered(site: Site, took: list[float] | None = None) -> None:
    begun = trio.current_time()
    async with site[0].router.open_answer(ask()) as answer:
        assert await text_of(answer.events) == WORDS
    if took is not None:
        took.append(trio.current_time() - begun)


async def refused(site: Site) -> Busy:
    """What is told of a request that nobody can be asked for."""
    with pytest.raises(NobodyNow) as caught:
        await answered(site)
    return caught.value


async def test_requests_of_one_moment_for_the_only_holder_wait_and_one_finds_out(autojump_clock: Clock) -> None:
    async with open_site(2, load_s=3.0, parallel=64) as site:
        door = holder(site)
        fails(site)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(answered, site)
            await trio.sleep(FIRST_BACKOFF_S / 4)
            assert not door.asked
            assert len(site[0].router._shared.waiting) == 20
            await trio.sleep(FIRST_BACKOFF_S)
            # It took the probe: that it is loading for long keeps nobody waiting here.
            assert len(door.asked) == 20
            assert door.asked[1] > door.asked[0]
        assert len(site[0].router._shared.waiting) == 0
        (wait,) = site[0].router.routes()[0].waits
        assert wait.at_s == 0.0
        assert FIRST_BACKOFF_S / 2 <= (wait.took_s or 0.0) <= FIRST_BACKOFF_S + 0.1
        assert wait.why == "peer1, the only one that has model 'echo' ready, failed lately (peer_gone)"


async def test_while_the_engine_of_the_only_holder_fails_there_is_one_probe_at_a_time(autojump_clock: Clock) -> None:
    async with open_site(2, parallel=64) as site:
        door = holder(site)
        door.failure = Failure("engine_unavailable", "no memory")
        ends: list[MeshmaxError] = []

        async def one(at_s: float) -> None:
            await trio.sleep(at_s)
            try:
                await answered(site)
            except MeshmaxError as error:
                ends.append(error)

        with pytest.raises(EngineUnavailable):
            await answered(site)  # from now on it is known
        asked = len(door.asked)
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, number / 10)
        assert door.most == 1
        assert len(ends) == 30
        probes = len(door.asked) - asked
        assert probes <= 5
        assert sum(isinstance(error, EngineUnavailable) for error in ends) == probes
        for error in ends:
            if isinstance(error, NobodyNow):
                assert "failed lately (engine_unavailable: no memory)" in error.message
        door.failure = None
        await trio.sleep(MAX_BACKOFF_S)
        await answered(site)


async def test_one_that_is_tried_again_late_is_told_with_its_time_and_not_asked(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        door = holder(site)
        fails(site, at_least_s=40.0)
        begun = trio.current_time()
        error = await refused(site)
        assert trio.current_time() == begun
        assert error.retry_after_s == pytest.approx(40.0)
        assert error.message == (
            "peer1, the only one that has model 'echo' ready, failed lately (peer_gone); it is tried again in about 40 s"
        )
        assert not door.asked
        route = site[0].router.routes()[0]
        assert (route.state, route.attempts) == ("failed", ())
        assert route.line == f"nobody answered; {error.message}"


async def test_a_holder_that_restarted_is_asked_at_once(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        door = holder(site)
        site[1].change = restarted("before")
        await site[0].swarm.disconnect(site[1].peer_id)
        took: list[float] = []
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(answered, site, took)
            await trio.sleep(3.1)
            before = len(door.asked)
            await site[0].connect(site[1])
            changed(site, 1, restarted("after"))
            back_s = trio.current_time()
        assert before == 0
        assert trio.current_time() - back_s < 0.5


async def test_a_holder_that_is_connected_again_is_asked_at_once(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        holder(site)
        for _ in range(3):
            site[0].router._shared.bench.comebacks.on_failed(site[1].peer_id)
        fails(site, at_least_s=7.0)
        took: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answered, site, took)
            await trio.sleep(1.0)
            changed(site, 1, offline)
            await trio.sleep(1.0)
            changed(site, 1, as_it_is)
        assert took[0] < 2.3


async def test_a_holder_that_was_lost_a_moment_ago_is_waited_for(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        holder(site)
        site[1].change = offline
        took: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answered, site, took)
            await trio.sleep(3.0)
            changed(site, 1, as_it_is)
        assert 3.0 <= took[0] < 3.3
        (wait,) = site[0].router.routes()[0].waits
        assert wait.why == "peer1, the only one that has model 'echo' ready, was lost just now"
        site[1].change = offline
        begun = trio.current_time()
        with pytest.raises(LostJustNow, match=r"peer1, which has model 'echo', was lost just now"):
            await answered(site)
        assert trio.current_time() - begun <= PATIENCE_S


async def test_a_lost_holder_that_is_in_no_list_any_more_is_still_one_that_was_lost(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        holder(site)
        site[1].change = offline
        async with trio.open_nursery() as nursery:

            async def asks() -> None:
                with pytest.raises(LostJustNow, match="peer1, which has model 'echo', was lost just now"):
                    await answered(site)

            nursery.start_soon(asks)
            await trio.sleep(3.0)
            del site.nodes[1]
            site[0].router.on_news()


async def test_somebody_who_comes_with_the_model_answers_who_waits(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        holder(site)
        site[2].has.clear()
        fails(site, at_least_s=7.0)
        took: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answered, site, took)
            await trio.sleep(1.0)
            site[2].has = {MODEL}
            site[0].router.on_news()
        assert took[0] < 1.3
        assert site[0].router.routes()[0].peer_id == site[2].peer_id


async def test_full_queues_are_told_at_once_and_nobody_is_asked(autojump_clock: Clock) -> None:
    async with open_site(4) as site:
        doors = [holder(site), Door(site[2]), Door(site[3])]
        for number in (1, 2, 3):
            site[number].change = loaded(Load(4, 8, 4, 8))
        begun = trio.current_time()
        error = await refused(site)
        assert trio.current_time() == begun
        assert error.message == "all 3 peers that have model 'echo' ready are full; the first has room in about 1 s"
        site[2].change = loaded(Load(4, 7, 4, 8))
        await answered(site)
        assert [len(door.asked) for door in doors] == [0, 1, 0]


async def test_a_busy_peer_whose_status_tells_that_it_was_full_and_has_room_is_asked_again(
    autojump_clock: Clock,
) -> None:
    async with open_site(2) as site:
        door = holder(site)
        door.failure = Failure("busy", "full", 30.0)
        assert 30.0 <= (await refused(site)).retry_after_s <= 30.0 * (1 + BUSY_SPREAD)
        await refused(site)
        assert len(door.asked) == 1
        door.failure = None
        changed(site, 1, loaded(Load(4, 3, 4)))
        await refused(site)
        assert len(door.asked) == 1
        changed(site, 1, loaded(Load(1, 0, 4)))
        await answered(site)


async def test_a_client_that_leaves_while_it_waits_leaves_nothing(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        door = holder(site)
        fails(site, at_least_s=5.0)
        with trio.move_on_after(1.0):
            await answered(site)
        assert len(site[0].router._shared.waiting) == 0
        route = site[0].router.routes()[0]
        assert route.state == "cancelled"
        assert [wait.took_s for wait in route.waits] == [1.0]
        await trio.sleep(10.0)
        assert not door.asked


@pytest.mark.parametrize("returned", [True, False])
async def test_a_client_that_leaves_with_the_probe_leaves_it_to_another(returned: bool, autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        holder(site)
        fails(site, at_least_s=7.0 if returned else 0.0)
        site.network.freeze(site[1].peer_id)
        scopes: dict[str, trio.CancelScope] = {}
        ends: list[float] = []

        async def one(number: int) -> None:
            with trio.CancelScope() as scope:
                scopes[str(number)] = scope
                request = msgspec.structs.replace(ask(), request_id=str(number))
                async with site[0].router.open_answer(request) as answer:
                    assert await text_of(answer.events) == WORDS
                ends.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(one, number)
            await trio.sleep(FIRST_BACKOFF_S + 0.1)
            if returned:
                site[0].router.measurements.breakers.on_returned(site[1].peer_id, trio.current_time())
                site[0].router.on_news()
                await trio.sleep(0.1)
            (finder,) = [route.request_id for route in site[0].router.routes() if route.attempts]
            assert len(site[0].router._shared.waiting) == 4
            site.network.thaw(site[1].peer_id)
            scopes[finder].cancel()
            left_s = trio.current_time()
        assert len(ends) == 4
        assert max(ends) <= left_s + 0.5


async def test_a_stream_waits_for_a_busy_peer_where_nobody_else_can_go_on(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10) as site:
        door = holder(site)
        other = Door(site[2])
        other.failure = Failure("busy", "full", 30.0)
        site[2].change = lambda view: msgspec.structs.replace(view, rtt_s=0.5)
        events: list[RoutedEvent] = []
        async with site[0].router.open_answer(ask()) as answer:
            events.append(await anext(answer.events))
            changed(site, 1, offline)
            site.network.kill(site[1].peer_id)
            died_s = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_opens, other, 20.0)
                async for event in answer.events:
                    if isinstance(event, Moved):
                        assert died_s + 30.0 <= trio.current_time() <= died_s + 30.0 * (1 + BUSY_SPREAD) + 1.0
                    events.append(event)
        assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS
        assert isinstance(events[-1], Finish)
        assert len(door.asked) == 1
        assert len(other.asked) == 2
        told = [wait.why for wait in site[0].router.routes()[0].waits]
        assert "none of the 2 peers that have model 'echo' ready can be asked now: 1 busy, 1 not connected" in told


async def _opens(door: Door, after_s: float) -> None:
    await trio.sleep(after_s)
    door.failure = None


async def test_our_own_broken_engine_is_tried_again_within_seconds_by_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Clock
) -> None:
    async with open_site(1) as site:
        tried: list[float] = []
        works = site[0].engine.open_model

        def broken(*args: Any, **fields: Any) -> Any:
            tried.append(trio.current_time())
            raise EngineUnavailable("no memory")

        monkeypatch.setattr(site[0].engine, "open_model", broken)
        for _ in range(8):  # one after the other: each hears what is the matter, if late
            begun = trio.current_time()
            with pytest.raises(EngineUnavailable, match="no memory"):
                await answered(site)
            assert trio.current_time() - begun <= OWN_BACKOFF_S + 0.1
        before = len(tried)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(_whatever, site)
        assert len(tried) - before <= 4
        monkeypatch.setattr(site[0].engine, "open_model", works)
        begun = trio.current_time()
        await answered(site)
        assert trio.current_time() - begun <= OWN_BACKOFF_S + 0.2


async def _whatever(site: Site) -> None:
    with suppress(EngineUnavailable, NobodyNow):
        await answered(site)


@pytest.mark.parametrize("seed", range(6))
async def test_over_any_schedule_of_the_only_holder_nobody_asks_before_its_time_and_every_request_ends(
    seed: int, autojump_clock: Clock
) -> None:
    chance = random.Random(seed)
    async with open_site(2, parallel=64) as site:
        door = holder(site)
        ends: list[MeshmaxError | None] = []
        router = site[0].router

        async def one(at_s: float) -> None:
            await trio.sleep(at_s)
            begun = trio.current_time()
            try:
                await answered(site)
            except MeshmaxError as error:
                ends.append(error)
            else:
                ends.append(None)
            assert trio.current_time() - begun <= 2 * PATIENCE_S + 30.0

        async def weather() -> None:
            for _ in range(6):
                door.failure = chance.choice(
                    [None, Failure("engine_unavailable", "no"), Failure("busy", "full", 2.0), Failure("store", "no")]
                )
                await trio.sleep(chance.uniform(0.1, 4.0))
            door.failure = None

        async with trio.open_nursery() as nursery:
            nursery.start_soon(weather)
            for _ in range(40):
                nursery.start_soon(one, chance.uniform(0.0, 30.0))
        assert len(ends) == 40
        assert len(router._shared.waiting) == 0
        standing = router.measurements.breakers.standing(site[1].peer_id, MODEL, trio.current_time())
        assert not standing.probing
        assert standing.until_s < math.inf
        await trio.sleep(MAX_BACKOFF_S)
        await answered(site)
        assert OWN_BACKOFF_S < MAX_BACKOFF_S


async def test_an_answer_that_was_asked_for_before_shows_those_who_wait_that_the_peer_works(
    autojump_clock: Clock,
) -> None:
    async with open_site(2, load_s=3.0, parallel=4, echo_tokens_per_s=1) as site:
        door = holder(site)
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answered, site)
            await trio.sleep(1.0)
            fails(site, at_least_s=7.0)
            nursery.start_soon(answered, site)
        assert [round(at - begun) for at in door.asked] == [0, 4]
