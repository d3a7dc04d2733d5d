"""The tasks of one request: each attempt's own, that ends when it is cancelled, however early."""

import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from itertools import chain, repeat

import pytest
import trio
import trio.testing

from meshmax.base.errors import MeshmaxError, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.inference import Delta, Event, Finish, GenerateRequest, ToolCall, Vector
from meshmax.core.delivery import Delivery
from meshmax.core.delivery_words import Cancel, Choice, Start
from meshmax.core.pace import Gaps, frame_gaps
from meshmax.services.delivery import MAX_READY, MAX_READY_BYTES, RequestDelivery, open_delivery
from meshmax.services.trial import Feed

Clock = trio.testing.MockClock
REQUEST = GenerateRequest("x")


class OnePeer:
    """A Chooser of one peer."""

    def __init__(self) -> None:
        self.choice = Choice(PeerId("a"), Gaps(), frame_gaps(), ours=True, late_s=1e6)

    def choices(self) -> Sequence[Choice]:
        return (self.choice,)

    def may_hedge(self, lateness: int) -> bool:
        return False


class Script:
    """A Trial that sends ``batches``, a second apart, and counts what it has done."""

    def __init__(self, *batches: Sequence[Event], error: MeshmaxError | None = None) -> None:
        self._batches, self._error = batches, error
        self.blame: MeshmaxError | None = None
        self.sent = 0
        self.held_s = 0.0
        self.ended = False

    async def run(self, feed: Feed) -> None:
        try:
            for batch in self._batches:
                await trio.sleep(1)
                self.sent += 1
                self.held_s += await feed.send(batch)
            await trio.sleep(0.1)  # to close its books
            if self._error:
                raise self._error
        finally:
            self.ended = True


def core() -> Delivery:
    return Delivery(REQUEST, OnePeer(), random.Random(1), trio.current_time())


def delivering(*scripts: Script) -> AbstractAsyncContextManager[RequestDelivery]:
    """A request whose attempts are ``scripts``, one after the other, then the last; nobody is told whether it waits."""
    left = chain(scripts, repeat(scripts[-1]))
    return open_delivery(core(), lambda _start: next(left), lambda _delivery, _waits: None)  # type: ignore[arg-type,return-value]


async def test_an_attempt_that_is_cancelled_before_its_task_began_does_nothing(autojump_clock: Clock) -> None:
    first, second = Script((Delta("a"),), (Finish(),)), Script((Delta("b"),), (Finish(),))
    async with delivering(first, second) as delivery:
        blame = PeerGone("it was silent")
        delivery.do([Start(1, OnePeer().choice, "hedge", REQUEST), Cancel(1, blame)])
        assert [event async for event in delivery] == [Delta("a"), Finish()]
    assert second.sent == 0
    assert second.blame is blame


async def test_a_whole_answer_waits_for_its_attempt_to_close_its_books(autojump_clock: Clock) -> None:
    script = Script((Delta("a"), Finish()))
    async with delivering(script) as delivery:
        await delivery.wait_first()
        assert not script.ended
        assert [event async for event in delivery] == [Delta("a"), Finish()]
        assert script.ended


async def test_a_client_that_is_behind_holds_the_attempt_up(autojump_clock: Clock) -> None:
    script = Script(*[[Delta("a")] * 100] * 6, (Finish(),))

    async def reads(delivery: RequestDelivery) -> int:
        return sum([1 async for _ in delivery])

    async with delivering(script) as delivery:
        await trio.sleep(60)
        assert script.sent * 100 < MAX_READY + 100
        assert await reads(delivery) == 601
    assert script.held_s > 50


@pytest.mark.parametrize(
    "large",
    [
        Delta("a" * 100_000),
        Delta("a", logprobs=({"token": "a" * 100_000},)),
        Delta(tool_calls=(ToolCall("f", {"a": "a" * 100_000, "b": 10**30}),)),
        Vector(0, b"a" * 100_000),
    ],
    ids=["text", "logprobs", "calls", "vector"],
)
async def test_a_client_that_is_behind_has_little_kept_for_it_however_large_events_are(
    large: Event, autojump_clock: Clock
) -> None:
    script = Script(*[[large] * 5] * 20, (Finish(),))
    async with delivering(script) as delivery:
        await trio.sleep(60)
        assert script.sent * 5 * 100_000 <= MAX_READY_BYTES + 5 * 100_000
        assert len([event async for event in delivery]) == 101
    assert script.sent == 21


async def test_what_the_block_raises_comes_out_as_it_is(autojump_clock: Clock) -> None:
    script = Script((Delta("a"),), (Finish(),))
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012
        async with delivering(script):
            await trio.sleep(0.5)
            raise KeyError("mine")
    assert script.ended
    assert script.sent == 0


async def test_events_that_came_before_a_failure_are_given_before_it(autojump_clock: Clock) -> None:
    async with delivering(Script((Delta("a"),), error=PeerGone("gone"))) as delivery:
        await trio.sleep(100)
        events = []
        with pytest.raises(PeerGone):  # noqa: PT012
            async for event in delivery:
                events.append(event)  # noqa: PERF401  what came before the error is kept
        assert events[0] == Delta("a")


class TwoPeers(OnePeer):
    """A Chooser of two, the second beside the first where that is late."""

    def choices(self) -> Sequence[Choice]:
        return tuple(Choice(PeerId(peer), Gaps(), frame_gaps(), ours=True, late_s=0.5, first_s=0.1) for peer in "ab")

    def may_hedge(self, lateness: int) -> bool:
        return True


class At(Script):
    """Says all that it has once ``word`` has come, each batch as soon as the one before was taken."""

    def __init__(self, word: trio.Event, *batches: Sequence[Event]) -> None:
        super().__init__(*batches)
        self._word = word

    async def run(self, feed: Feed) -> None:
        await self._word.wait()
        for batch in self._batches:
            await feed.send(batch)


@pytest.mark.parametrize("apart_s", [0.0, 0.1])
async def test_an_answer_goes_on_at_whatever_moment_the_slower_of_two_peers_speaks(
    apart_s: float, autojump_clock: Clock
) -> None:
    large, end = [Delta("a")] * MAX_READY, [Finish()]
    words = trio.Event(), trio.Event()
    trials = iter([At(word, large, end) for word in words])
    both = Delivery(REQUEST, TwoPeers(), random.Random(1), trio.current_time())
    async with open_delivery(both, lambda _start: next(trials), lambda _delivery, _waits: None) as delivery:  # type: ignore[arg-type,return-value]
        await trio.sleep(2)
        assert len(both.attempts()) == 2
        words[0].set()
        if apart_s:
            await trio.sleep(apart_s)
        words[1].set()
        await trio.sleep(10)  # the client takes nothing for a while
        with trio.fail_after(10):
            assert len([event async for event in delivery]) == MAX_READY + 1
