"""Asking one peer: the answer, leaving it, losing the peer, and what a server takes from strangers."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import Busy, EngineCrashed, ModelNotFound, PeerGone, Refused, RemoteProtocolError
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Message,
    Options,
)
from meshmax.core.memory import DEFAULT_CONTEXT_TOKENS
from meshmax.core.write_pace import pause_s
from meshmax.engine.echo import EchoModel
from meshmax.ports import Stream
from meshmax.services import infer_server
from meshmax.services.frames import FrameStream
from meshmax.services.infer_client import SILENCE_S, open_remote_answer
from meshmax.services.infer_server import MAX_INCOMING_PER_PEER, PART_DEADLINE_S
from meshmax.wire.failure import Failure
from meshmax.wire.infer import ASK_PART, PART_BYTES, REPLY, Accepted, AskPart, Events, KeepAlive, Reply, ask_parts
from meshmax.wire.protocols import INFER
from tests.services.infer_site import MODEL, OTHER, WORDS, Site, ask, open_site, text_of

Clock = trio.testing.MockClock


async def remote(site: Site, request: object = WORDS, **fields: object) -> list[Event]:
    asked = ask(request, **fields)  # type: ignore[arg-type]
    async with open_remote_answer(site[0].swarm, site[1].peer_id, asked) as events:
        return [event async for event in events]


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(WORDS),
        GenerateRequest("over and out", format="json"),
        ChatRequest((Message("system", "be kind"), Message("user", "so be it"))),
        EmbedRequest(("one", "two", "one")),
        ChatRequest(),
    ],
)
async def test_a_remote_answer_equals_the_local_one(autojump_clock: Clock, request_: object) -> None:
    async with open_site(2) as site:
        async with site[1].residency.open_answer(ask(request_)) as events:  # type: ignore[arg-type]
            local = [event async for event in events]
        got = await remote(site, request_)
        assert got[:-1] == local[:-1]
        assert isinstance(got[-1], Finish)
        assert isinstance(local[-1], Finish)
        assert got[-1].done_reason == local[-1].done_reason
        assert got[-1].output_tokens == local[-1].output_tokens
        assert got[-1].context == local[-1].context


async def test_the_way_to_a_peer_adds_only_its_round_trips(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=100) as site:
        await remote(site)
        begun = trio.current_time()
        async with open_remote_answer(site[0].swarm, site[1].peer_id, ask()) as events:
            await anext(events)
            # a stream (one round trip), the request and its answer (another), and the token itself
            assert trio.current_time() - begun == pytest.approx(0.004 + 0.01, abs=0.001)


async def test_events_keep_coming_as_they_are_made(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        begun = trio.current_time()
        async with open_remote_answer(site[0].swarm, site[1].peer_id, ask()) as events:
            for count in range(1, 30):
                await anext(events)
                assert trio.current_time() - begun == pytest.approx(count / 10, abs=0.02)


@pytest.mark.parametrize("closing_s", [0.0, 1.0])
async def test_of_many_answers_what_comes_within_a_moment_leaves_together_but_the_first_word_and_the_last_at_once(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, closing_s: float
) -> None:
    answer = EchoModel.answer

    @asynccontextmanager
    async def answer_and_close(model: EchoModel, request: InferRequest) -> AsyncIterator[AsyncIterator[Event]]:
        async with answer(model, request) as events:
            yield events
            await trio.sleep(closing_s)

    monkeypatch.setattr(EchoModel, "answer", answer_and_close)
    many, arrived = 30, list[tuple[float, int]]()
    async with open_site(2, echo_tokens_per_s=100, parallel=many) as site, trio.open_nursery() as others:
        for _ in range(many - 1):
            others.start_soon(remote, site, f"{WORDS} {WORDS}")
        words = WORDS.rsplit(" ", 2)[0]
        async with open_remote_answer(site[0].swarm, site[1].peer_id, ask(words)) as events:
            began = trio.current_time()
            while (batch := await events.try_next()) is not None:
                arrived.append((trio.current_time() - began, len(batch)))
    first, *between, last = arrived
    assert first[0] == pytest.approx(0.01, abs=0.005)
    assert first[1] == 1
    assert {count for _, count in between} <= {2, 3, 4}
    assert all(at - before == pytest.approx(pause_s(many), abs=0.011) for (before, _), (at, _) in pairwise(between))
    assert last[0] == pytest.approx(0.98, abs=0.005)
    assert sum(count for _, count in arrived) == 98 + 1  # the words and the end


async def test_a_failure_does_not_wait_for_what_may_follow(autojump_clock: Clock) -> None:
    many = 60  # whose pieces leave every 50 ms
    async with open_site(2, echo_tokens_per_s=100, parallel=many) as site:
        async with trio.open_nursery() as others:
            for _ in range(many):
                others.start_soon(_fails_at, site, 0.48)
            await trio.sleep(0.475)
            site[1].engine.models[0].crash()


async def _fails_at(site: Site, at_s: float) -> None:
    began = trio.current_time()
    with pytest.raises(EngineCrashed):
        await remote(site)
    assert trio.current_time() - began == pytest.approx(at_s, abs=0.005)


async def test_a_large_request_arrives_whole(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1e9) as site:
        got = await remote(site, GenerateRequest("x" * (3 * PART_BYTES + 5), raw=True))
        assert sum(len(event.text) for event in got if isinstance(event, Delta)) == 3 * PART_BYTES + 5
        assert sum(event.tokens for event in got if isinstance(event, Delta)) == 1


async def produced_stays(site: Site) -> bool:
    """Whether the second node makes no more tokens, after at most a round trip."""
    await trio.sleep(0.05)
    before = site[1].produced
    await trio.sleep(5)
    return site[1].produced == before and site[1].residency.load().running == 0 and not site[1].server.active


async def test_the_engine_stops_when_the_requester_leaves(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        async with open_remote_answer(site[0].swarm, site[1].peer_id, ask()) as events:
            await anext(events)
        assert 0 < site[1].produced < 5
        assert await produced_stays(site)


async def test_the_engine_stops_when_the_requester_ends_its_direction(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        frames = await raw(site)
        await send_ask(frames)
        reply = await frames.receive(REPLY)
        assert isinstance(reply, Accepted)
        await frames.stream.send_eof()
        assert await produced_stays(site)


async def test_the_engine_stops_when_the_connection_is_lost(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        async with open_remote_answer(site[0].swarm, site[1].peer_id, ask()) as events:
            await anext(events)
            await site[0].swarm.disconnect(site[1].peer_id)
            assert await produced_stays(site)
            with pytest.raises(PeerGone):
                await text_of(events)


async def test_a_request_that_waits_for_a_load_is_given_up_when_the_requester_leaves(autojump_clock: Clock) -> None:
    async with open_site(2, load_s=100.0) as site:
        with trio.move_on_after(20):
            await remote(site)
        assert await produced_stays(site)


async def test_a_slow_load_is_told_from_a_dead_peer_by_keep_alives(autojump_clock: Clock) -> None:
    async with open_site(2, load_s=10 * SILENCE_S) as site:
        assert isinstance((await remote(site))[-1], Finish)


async def test_a_frozen_peer_is_gone_after_a_silence(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1) as site:
        async with open_remote_answer(site[0].swarm, site[1].peer_id, ask()) as events:
            await anext(events)
            frozen_at = trio.current_time()
            site.network.freeze(site[1].peer_id)
            with pytest.raises(PeerGone):
                await text_of(events)
            assert trio.current_time() - frozen_at <= SILENCE_S + 0.01


async def test_a_model_that_is_not_there_is_said_so(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        with pytest.raises(ModelNotFound):
            async with open_remote_answer(site[0].swarm, site[1].peer_id, ask(digest=OTHER)) as events:
                await anext(events)
        assert await produced_stays(site)


async def test_a_peer_that_asks_too_much_at_once_is_told_busy(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=1, parallel=1, max_queue_per_member=2) as site:
        await remote(site, GenerateRequest("word", raw=True))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(remote, site)
            await trio.sleep(2)
            with pytest.raises(Busy):
                await remote(site)
            async with open_remote_answer(site[2].swarm, site[1].peer_id, ask("one")):
                await trio.sleep(2)
                assert site[1].residency.load().queued == 3
            nursery.cancel_scope.cancel()
        assert await produced_stays(site)
        assert isinstance((await remote(site))[-1], Finish)


async def test_a_busy_peer_says_when_to_come_again(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10, parallel=1, max_queue=8) as site:
        await remote(site)  # 10 s
        assert site[1].residency.load().running == 0
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(remote, site)
            await trio.sleep(1)
            with pytest.raises(Busy) as refused:
                await remote(site)
            nursery.cancel_scope.cancel()
        assert refused.value.retry_after_s == pytest.approx(25, rel=0.1)  # half of five answers


async def test_requests_that_do_not_end_leave_room_for_those_of_others(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=1e9) as site:
        open_streams = [await raw(site) for _ in range(MAX_INCOMING_PER_PEER)]
        await trio.sleep(0.1)
        with pytest.raises(Busy):
            await remote(site)
        async with open_remote_answer(site[2].swarm, site[1].peer_id, ask("one")) as events:
            assert await text_of(events) == "one"
        for frames in open_streams:
            await frames.stream.reset()
        await trio.sleep(0.1)
        assert isinstance((await remote(site))[-1], Finish)


async def test_requests_that_need_too_much_room_are_told_busy(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_server, "MAX_HELD_BYTES", 6 * PART_BYTES)
    async with open_site(2, echo_tokens_per_s=1e9) as site:
        with pytest.raises(Busy):
            await remote(site, GenerateRequest("x" * (4 * PART_BYTES), raw=True))
        assert isinstance((await remote(site))[-1], Finish)
        assert not site[1].server.held


# --- what strangers send -----------------------------------------------------------------------------------------------


async def raw(site: Site) -> FrameStream:
    return FrameStream(await site[0].swarm.open_stream(site[1].peer_id, INFER))


async def send_ask(frames: FrameStream) -> None:
    for part in ask_parts(ask()):
        await frames.send(ASK_PART, part)


async def refused(site: Site, frames: FrameStream) -> None:
    """The stream is broken off, and the node serves the next request."""
    with pytest.raises(PeerGone):  # noqa: PT012
        while await frames.try_receive(REPLY) is not None:
            pass
        raise PeerGone("ended")
    assert not site[1].server.active
    assert not site[1].server.held
    assert isinstance((await remote(site))[-1], Finish)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 0),
        struct.pack(">I", 1 << 20) + b"\xc1" * (1 << 20),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 3) + b"\x93\x01\x02",
        ASK_PART.encode(AskPart(b"", False)),
        ASK_PART.encode(AskPart(b"x" * (PART_BYTES + 1), False)),
        ASK_PART.encode(AskPart(b"x" * (PART_BYTES - 1), False)),
        struct.pack(">I", ASK_PART.max_bytes + 1),
        ASK_PART.encode(AskPart(b"garbage", True)),
        ASK_PART.encode(AskPart(b"\x80", True)),
        REPLY.encode(Accepted()),
    ],
    ids=map(str, range(12)),
)
async def test_garbage_is_refused_and_the_node_lives(autojump_clock: Clock, data: bytes) -> None:
    async with open_site(2, echo_tokens_per_s=1e6) as site:
        frames = await raw(site)
        with suppress(PeerGone):  # refused before all of it was sent
            await frames.stream.send_all(data)
        await refused(site, frames)


async def send_for_ever(frames: FrameStream) -> None:
    while True:
        await frames.send(ASK_PART, AskPart(b"x" * PART_BYTES, False))


async def test_a_request_without_end_is_refused(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1e6) as site:
        frames = await raw(site)
        with pytest.raises(PeerGone):
            await send_for_ever(frames)
        await refused(site, frames)


async def test_a_request_that_is_not_finished_in_time_is_refused(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1e6) as site:
        frames = await raw(site)
        await frames.send(ASK_PART, AskPart(b"x" * PART_BYTES, False))
        await trio.sleep(PART_DEADLINE_S + 1)
        await refused(site, frames)


async def test_a_word_after_the_request_ends_it(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        frames = await raw(site)
        await send_ask(frames)
        await frames.send(ASK_PART, AskPart(b"x", False))
        assert await produced_stays(site)


@settings(max_examples=25)
@given(data=st.binary(min_size=1, max_size=300))
def test_no_bytes_bring_the_server_down(data: bytes) -> None:
    async def main() -> None:
        async with open_site(2, echo_tokens_per_s=1e6) as site:
            frames = await raw(site)
            await frames.stream.send_all(data)
            await frames.stream.send_eof()
            await refused(site, frames)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# --- what a bad server sends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([KeepAlive()], RemoteProtocolError),
        ([Events((Delta("x"),))], RemoteProtocolError),
        ([Accepted(), Accepted()], RemoteProtocolError),
        ([Accepted(), Events(())], RemoteProtocolError),
        ([Accepted(), Events((Finish(), Finish()))], RemoteProtocolError),
        ([Accepted(), Events((Finish(prompt_tokens=-1),))], RemoteProtocolError),
        ([Accepted()], PeerGone),
        ([], PeerGone),
        ([Failure("busy", "later", 3.0)], Busy),
        ([Accepted(), Failure("model_not_found", "no")], ModelNotFound),
    ],
)
async def test_an_answer_that_breaks_the_protocol_is_refused(
    autojump_clock: Clock, replies: list[Reply], error: type[Exception]
) -> None:
    async def answer(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(ASK_PART)
        for reply in replies:
            await frames.send(REPLY, reply)

    async with open_site(2) as site:
        site[1].swarm.serve(INFER, answer)
        with pytest.raises(error):
            await remote(site)


@pytest.mark.parametrize(
    "events",
    [
        (Delta("text"),),
        (Finish(),),
    ],
)
async def test_vectors_are_answered_with_vectors(autojump_clock: Clock, events: tuple[Event, ...]) -> None:
    async def answer(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(ASK_PART)
        await frames.send(REPLY, Accepted())
        await frames.send(REPLY, Events(events))
        await trio.sleep_forever()

    async with open_site(2) as site:
        site[1].swarm.serve(INFER, answer)
        with pytest.raises(RemoteProtocolError):
            await remote(site, EmbedRequest(("a",)))
        assert MODEL in site[1].has


async def test_a_peer_has_no_model_unloaded(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1e9) as site:
        await remote(site, WORDS)
        with pytest.raises(Refused, match="its own to unload"):
            await remote(site, GenerateRequest(), keep_alive_s=0)
        assert site[1].residency.loaded()
        await remote(site, WORDS, keep_alive_s=0)
        await trio.sleep(60)
        assert site[1].residency.loaded()


@pytest.mark.parametrize(
    ("own_s", "asked_s", "stays_s"), [(300, -1, 3600), (300, 1e9, 3600), (300, 1, 300), (300, 900, 900)]
)
async def test_a_peer_keeps_a_model_in_memory_only_so_long(
    own_s: float, asked_s: float, stays_s: float, autojump_clock: Clock
) -> None:
    async with open_site(2, echo_tokens_per_s=1e9, keep_alive_s=own_s) as site:
        await remote(site, WORDS, keep_alive_s=asked_s)
        await trio.sleep(stays_s - 5)
        assert site[1].residency.loaded()
        await trio.sleep(10)
        assert not site[1].residency.loaded()


async def test_a_model_that_stays_for_ever_stays_whatever_a_peer_says(autojump_clock: Clock) -> None:
    async with open_site(2, echo_tokens_per_s=1e9, keep_alive_s=-1.0) as site:
        await remote(site, WORDS, keep_alive_s=5)
        await trio.sleep(80_000)
        assert site[1].residency.loaded()


async def test_of_a_model_that_does_not_say_what_it_was_trained_for_a_peer_has_no_more_context_than_usual(
    autojump_clock: Clock,
) -> None:
    greedy = GenerateRequest(WORDS, options=Options(num_ctx=1 << 20, num_gpu=999, num_thread=1, seed=7))
    async with open_site(2, echo_tokens_per_s=1e9) as site:
        await remote(site, greedy)
        (loaded,) = site[1].residency.loaded()
        assert loaded.context_length == DEFAULT_CONTEXT_TOKENS
        await site[1].residency.unload(MODEL)
        await trio.sleep(1)
        async with site[1].residency.open_answer(ask(greedy)) as events:
            assert [event async for event in events]
        (loaded,) = site[1].residency.loaded()
        assert loaded.context_length == 1 << 20
