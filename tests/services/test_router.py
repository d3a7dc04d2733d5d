"""Routing at work: who is asked, who is asked next, what the client never sees, and what is remembered."""

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import (
    Busy,
    ContextTooLong,
    EngineCrashed,
    MeshmaxError,
    ModelNotFound,
    PeerGone,
)
from meshmax.base.inference import Delta, EmbedRequest, Finish, GenerateRequest, Moved
from meshmax.base.route import Wishes
from meshmax.base.status import Load, PeerView
from meshmax.core.breaker import BUSY_SPREAD, FIRST_BACKOFF_S
from meshmax.core.delivery_attempt import FIRST_EVENT_DEADLINE_S
from meshmax.core.delivery_wait import STUCK_S
from meshmax.core.refusal import LostJustNow, WentAway
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.infer_client import OPEN_DEADLINE_S, SILENCE_S
from meshmax.services.route_records import ROUTES_KEPT
from meshmax.wire.failure import Failure
from meshmax.wire.infer import ASK_PART, REPLY, Accepted, Reply
from meshmax.wire.protocols import INFER
from tests.services.infer_site import MODEL, OTHER, WORDS, Node, Site, ask, open_site, text_of

Clock = trio.testing.MockClock


def lacks(*nodes: Node) -> None:
    for node in nodes:
        node.has.clear()


def far(rtt_s: float):  # type: ignore[no-untyped-def]
    return lambda view: msgspec.structs.replace(view, rtt_s=rtt_s)


def offline(view: PeerView) -> PeerView:
    return msgspec.structs.replace(view, state="offline")


def sends(node: Node, *replies: Reply) -> None:
    """From now on ``node`` answers every request with ``replies``, then ends the stream."""

    async def answer(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(ASK_PART)
        for reply in replies:
            await frames.send(REPLY, reply)

    node.swarm.serve(INFER, answer)


def first_three(site: Site) -> None:
    """The first node has no copy; the second is nearer than the third."""
    lacks(site[0])
    site[1].change, site[2].change = far(0.001), far(0.1)


async def answered_by(site: Site, **fields: object) -> str:
    async with site[0].router.open_answer(ask(**fields)) as answer:  # type: ignore[arg-type]
        assert await text_of(answer.events) == WORDS
        return next(node.name for node in site.nodes if node.peer_id == answer.route.peer_id)


async def test_a_model_that_only_a_peer_has_is_answered_there(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        lacks(site[0])
        async with site[0].router.open_answer(ask()) as answer:
            assert answer.route.peer_id == site[1].peer_id
            assert answer.route.line.startswith("peer1: on disk beside a CPU, 2.0 ms away (direct), 0 queued, est ")
            assert await text_of(answer.events) == WORDS
        assert site[0].engine.models == []


async def test_our_own_answer_does_not_touch_the_wire(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        site.network.freeze(site[0].peer_id)
        assert await answered_by(site) == "peer0"


async def test_the_best_peer_that_dies_before_the_first_token_is_replaced_unseen(autojump_clock: Clock) -> None:
    async with open_site(3, load_s=3.0) as site:
        first_three(site)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dies, site, 1, 1.0)
            async with site[0].router.open_answer(ask()) as answer:
                assert await text_of(answer.events) == WORDS
                attempts = answer.route.attempts
                assert [(a.peer_id, a.error) for a in attempts] == [
                    (site[1].peer_id, "peer_gone"),
                    (site[2].peer_id, ""),
                ]
                assert "peer1 failed before (peer_gone)" in answer.route.line
                assert "beat" not in answer.route.line
                assert answer.route.candidates[0].verdict == "failed"
                assert answer.route == site[0].router.routes()[0]
        assert await answered_by(site) == "peer2"


async def dies(site: Site, number: int, after_s: float) -> None:
    await trio.sleep(after_s)
    site.network.kill(site[number].peer_id)


async def test_a_frozen_peer_is_replaced_within_the_deadline(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)
        site.network.freeze(site[1].peer_id)
        begun = trio.current_time()
        assert await answered_by(site) == "peer2"
        assert trio.current_time() - begun < max(OPEN_DEADLINE_S, SILENCE_S) + 1


async def test_a_peer_that_freezes_while_loading_is_replaced_within_the_deadline(autojump_clock: Clock) -> None:
    async with open_site(3, load_s=100.0) as site:
        first_three(site)
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(freezes, site, 1, 20.0)
            assert await answered_by(site) == "peer2"
        assert trio.current_time() - begun < 20 + SILENCE_S + 100 + 2


async def freezes(site: Site, number: int, after_s: float) -> None:
    await trio.sleep(after_s)
    site.network.freeze(site[number].peer_id)


@pytest.mark.parametrize("code", ["busy", "engine_crashed", "engine_unavailable", "version_mismatch", "store", "error"])
async def test_a_peer_that_cannot_is_replaced_by_one_that_can(code: str, autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)
        sends(site[1], Accepted(), Failure(code, "no"))
        assert await answered_by(site) == "peer2"
        route = site[0].router.routes()[0]
        assert [a.error for a in route.attempts] == [code, ""]
        assert route.candidates[0].verdict == ("busy" if code == "busy" else "failed")


async def test_a_crash_of_our_own_engine_sends_the_request_to_a_peer(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1.0, parallel=4) as site:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crashes, site, 0, 0.5)
            async with site[0].router.open_answer(ask("one two")) as answer:
                assert answer.route.peer_id == site[1].peer_id
                assert await text_of(answer.events) == "one two"


async def crashes(site: Site, number: int, after_s: float) -> None:
    await trio.sleep(after_s)
    site[number].engine.models[0].crash()


async def test_a_fault_of_the_request_is_raised_when_two_have_found_it(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)
        with pytest.raises(ContextTooLong):
            async with site[0].router.open_answer(ask("word " * 5000)):
                pass
        assert [a.peer_id for a in site[0].router.routes()[0].attempts] == [site[1].peer_id, site[2].peer_id]
        assert await answered_by(site) == "peer1"


async def test_after_the_first_token_another_peer_goes_on(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10) as site:
        first_three(site)
        async with site[0].router.open_answer(ask()) as answer:
            first = await anext(answer.events)
            site[1].engine.models[0].crash()
            events = [first, *[event async for event in answer.events]]
            assert answer.route.peer_id == site[1].peer_id
        assert [event.peer_id for event in events if isinstance(event, Moved)] == [site[2].peer_id]
        assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS
        assert isinstance(last := events[-1], Finish)
        assert last.output_tokens == 100
        (route,) = site[0].router.routes()
        assert [(a.kind, a.error, a.tokens) for a in route.attempts] == [
            ("first", "engine_crashed", 1),
            ("continuation", "", 99),
        ]
        assert (route.state, route.output_tokens) == ("done", 100)


async def test_an_engine_that_crashes_where_nobody_else_has_the_model_is_started_again(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10, load_s=0.5) as site:
        lacks(site[0])
        async with site[0].router.open_answer(ask()) as answer:
            first = await anext(answer.events)
            site[1].engine.models[0].crash()
            assert isinstance(first, Delta)
            assert first.text + await text_of(answer.events) == WORDS


async def test_a_peer_that_dies_in_the_middle_with_nobody_to_go_on_is_named(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1) as site:
        lacks(site[0])
        async with site[0].router.open_answer(ask()) as answer:
            await anext(answer.events)
            site.network.kill(site[1].peer_id)
            site[1].change = offline
            begun = trio.current_time()
            with pytest.raises(
                PeerGone, match="peer1 went away in the middle of its answer, and no other peer could carry it on"
            ):
                await text_of(answer.events)
            assert trio.current_time() - begun <= STUCK_S
        assert site[0].router.routes()[0].state == "failed"


async def test_a_peer_that_dies_before_it_answers_is_named_with_what_helps_and_the_networks_words_are_not_told(
    autojump_clock: Clock,
) -> None:
    async with open_site(2, load_s=60.0) as site:
        lacks(site[0])

        async def kill() -> None:
            await trio.sleep(1)
            site.network.kill(site[1].peer_id)
            site[1].change = offline

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with pytest.raises(WentAway) as told:
                await answered_by(site)
        assert told.value.message == (
            "peer1 went away before it answered, and no other peer has the model ready: "
            "try again in a moment, and see with `meshmax peers` who is there"
        )
        (route,) = site[0].router.routes()
        assert (route.state, {attempt.error for attempt in route.attempts}) == ("failed", {"peer_gone"})


async def test_the_engine_elsewhere_stops_when_the_client_leaves(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        lacks(site[0])
        async with site[0].router.open_answer(ask()) as answer:
            await anext(answer.events)
        await trio.sleep(0.1)
        produced = site[1].produced
        await trio.sleep(20)
        assert site[1].produced == produced < 5
        assert site[1].residency.load().running == 0
        assert site[0].router.outstanding.count(site[1].peer_id) == 0


async def test_two_peers_may_answer_each_other_at_once(autojump_clock: Clock) -> None:
    async with open_site(2, load_s=2.0) as site:
        site[0].has = {OTHER}
        site[1].has = {MODEL}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers, site[0], ask(), site[1])
            nursery.start_soon(answers, site[1], ask(digest=OTHER), site[0])


async def answers(asker: Node, request: object, expected: Node) -> None:
    async with asker.router.open_answer(request) as answer:  # type: ignore[arg-type]
        assert answer.route.peer_id == expected.peer_id
        assert await text_of(answer.events) == WORDS


async def test_all_busy_is_busy_with_the_shortest_wait(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)
        sends(site[1], Failure("busy", "full", 9.0))
        sends(site[2], Failure("busy", "full", 3.0))
        with pytest.raises(Busy) as caught:
            await answered_by(site)
        assert 3.0 <= caught.value.retry_after_s <= 3.0 * (1 + BUSY_SPREAD)


async def test_busy_and_broken_is_what_broke(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)
        sends(site[1], Failure("engine_crashed", "crash"))
        sends(site[2], Failure("busy", "full"))
        with pytest.raises(EngineCrashed):
            await answered_by(site)
        assert site[0].router.routes()[0].line.startswith("nobody answered; peer1 failed before (engine_crashed)")


async def test_an_unknown_model_is_not_found_and_of_a_lost_one_whoever_asks_is_told_to_come_again(
    autojump_clock: Clock,
) -> None:
    async with open_site(2) as site:
        lacks(site[0])
        with pytest.raises(ModelNotFound):
            await answered_by(site, digest=OTHER)
        site[1].change = offline
        with pytest.raises(LostJustNow, match="peer1, which has model 'echo', was lost just now"):
            await answered_by(site)


async def test_a_failed_peer_is_avoided_for_a_while_and_waited_for_where_nobody_else_is_left(
    autojump_clock: Clock,
) -> None:
    async with open_site(3) as site:
        first_three(site)
        sends(site[1], Failure("engine_unavailable", "no memory"))
        assert await answered_by(site) == "peer2"
        site[1].server.register(site[1].swarm)
        assert await answered_by(site) == "peer2"
        site[2].change = offline
        begun = trio.current_time()
        assert await answered_by(site) == "peer1"
        assert trio.current_time() - begun <= FIRST_BACKOFF_S + 0.1
        (waited,) = site[0].router.routes()[0].waits
        assert "(peer1 failed lately (engine_unavailable: no memory))" in waited.why


async def test_requests_spread_when_a_peer_has_many(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10, parallel=2) as site:
        lacks(site[0])
        served = []

        async def one() -> None:
            served.append(await answered_by(site))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
                await trio.sleep(0.001)
        assert sorted(served) == ["peer1"] * 4 + ["peer2"] * 4


async def test_requests_that_come_together_spread_too(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10, parallel=2) as site:
        lacks(site[0])
        served: list[str] = []

        async def one() -> None:
            served.append(await answered_by(site))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert sorted(served) == ["peer1"] * 4 + ["peer2"] * 4


async def test_requests_that_come_together_do_not_all_stay_here(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10, parallel=2) as site:
        site[1].change = far(0.001)
        served: list[str] = []

        async def one() -> None:
            served.append(await answered_by(site))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert 3 <= served.count("peer0") <= 5


async def test_of_requests_that_come_together_one_finds_out_whether_a_peer_works_again(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10) as site:
        first_three(site)
        site[0].router.measurements.breakers.on_failure(site[1].peer_id, None, "peer_gone", trio.current_time())
        await trio.sleep(2)  # half-open from now on
        served: list[str] = []

        async def one() -> None:
            async with site[0].router.open_answer(ask()) as answer:
                served.append(answer.route.attempts[0].peer_id)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert served.count(site[1].peer_id) == 1


async def test_requests_that_come_together_take_turns_too(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10) as site:
        lacks(site[0])
        served = []

        async def one() -> None:
            async with site[0].router.open_answer(ask(), Wishes(policy="round-robin")) as answer:
                served.append(answer.route.peer_id)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert sorted(served) == sorted([site[1].peer_id, site[2].peer_id] * 4)


async def test_what_was_measured_decides_the_next_time(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=50) as site:
        lacks(site[0])
        for _ in range(3):
            await answered_by(site)
        figures = site[0].router.measurements.figures(site[1].peer_id, MODEL, "cpu", trio.current_time())
        assert figures.decode_per_s == pytest.approx(50, rel=0.05)
        assert figures.first_token_s is not None or figures.prefill_per_s is not None
        assert figures.age_s < 1
        assert site[0].router.measurements.answer_tokens(MODEL) == 100


async def test_a_slow_reader_is_not_taken_for_a_slow_peer(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=50) as site:
        lacks(site[0])
        async with site[0].router.open_answer(ask()) as answer:
            async for _ in answer.events:
                await trio.sleep(0.1)
        figures = site[0].router.measurements.figures(site[1].peer_id, MODEL, "cpu", trio.current_time())
        assert figures.decode_per_s is None or figures.decode_per_s == pytest.approx(50)


async def test_a_load_goes_to_who_has_it_loaded_and_an_unload_stays_here(autojump_clock: Clock) -> None:
    async with open_site(3, load_s=5.0) as site:
        async with site[2].residency.open_answer(ask(GenerateRequest())) as events:
            await anext(events)
        async with site[0].router.open_answer(ask(GenerateRequest())) as answer:
            assert answer.route.peer_id == site[2].peer_id
            assert [event async for event in answer.events] == [Finish("load")]
        async with site[0].router.open_answer(ask(GenerateRequest(), keep_alive_s=0)) as answer:
            assert answer.route.peer_id == site[0].peer_id
            assert await anext(answer.events) == Finish("unload")


async def test_the_last_decisions_are_kept_newest_first(autojump_clock: Clock) -> None:
    async with open_site(1, echo_tokens_per_s=1e6) as site:
        for number in range(ROUTES_KEPT + 5):
            async with site[0].router.open_answer(msgspec.structs.replace(ask("x"), request_id=str(number))) as answer:
                await text_of(answer.events)
        routes = site[0].router.routes()
        assert [route.request_id for route in routes] == [str(n) for n in range(ROUTES_KEPT + 4, 4, -1)]
        assert not any("word" in route.line for route in routes)


async def test_a_peer_that_is_not_connected_any_more_is_passed_over(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)
        await site[0].swarm.disconnect(site[1].peer_id)
        assert await answered_by(site) == "peer2"
        site[2].change = offline
        with pytest.raises(PeerGone):
            await answered_by(site)


async def test_a_peers_load_counts(autojump_clock: Clock) -> None:
    async with open_site(3) as site:
        first_three(site)

        def full(view: PeerView) -> PeerView:
            assert view.status is not None
            status = msgspec.structs.replace(view.status, load=Load(4, 9, 4))
            return msgspec.structs.replace(view, rtt_s=0.001, status=status)

        site[1].change = full
        assert await answered_by(site) == "peer2"


async def test_a_peer_that_only_says_it_is_still_at_it_is_given_up_in_the_end(autojump_clock: Clock) -> None:
    async with open_site(3, load_timeout_s=1e6, load_s=2 * FIRST_EVENT_DEADLINE_S) as site:
        first_three(site)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kills_all_but, site, 0, 1)
            with pytest.raises(MeshmaxError):
                await answered_by(site)
        assert site[0].router.routes()[0].attempts[0].error == "first_token_timeout"


async def kills_all_but(site: Site, *kept: int) -> None:
    await trio.lowlevel.checkpoint()
    for number in set(range(len(site.nodes))) - set(kept):
        site.network.kill(site[number].peer_id)


async def test_vectors_measure_how_fast_texts_are_read(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        lacks(site[0])
        for _ in range(3):
            async with site[0].router.open_answer(ask(EmbedRequest((WORDS, WORDS)))) as answer:
                assert len([event async for event in answer.events]) == 3
        figures = site[0].router.measurements.figures(site[1].peer_id, MODEL, "cpu", trio.current_time())
        assert figures.prefill_per_s == pytest.approx(200 / 0.2, rel=0.1)
        assert figures.decode_per_s is None
