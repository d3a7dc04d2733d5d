"""Peers that attract prompts and do not answer them: how soon no more go there, and what they can make us hold."""

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.inference import Delta, Event
from meshmax.base.status import Load, PeerView
from meshmax.core.delivery import OVERDUE_S
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.wire.failure import Failure
from meshmax.wire.infer import ASK_PART, REPLY, Accepted, Events, KeepAlive
from meshmax.wire.protocols import INFER
from tests.services.infer_site import WORDS, Node, Site, ask, open_site, text_of

Clock = trio.testing.MockClock

PATIENCE_S = 20.0  # of a person without a word


def praises_itself(view: PeerView) -> PeerView:
    """Always free, next door, and as fast as one may say."""
    assert view.status is not None
    models = tuple(
        msgspec.structs.replace(model, state="loaded", prefill_per_s=1e8, decode_per_s=1e8)
        for model in view.status.models
    )
    status = msgspec.structs.replace(view.status, models=models, load=Load(0, 0, 1 << 20))
    return msgspec.structs.replace(view, rtt_s=0.0001, status=status)


def tells_its_speed(view: PeerView) -> PeerView:
    """What it does in truth."""
    assert view.status is not None
    models = tuple(msgspec.structs.replace(m, prefill_per_s=1000, decode_per_s=20) for m in view.status.models)
    return msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, models=models))


def says(node: Node, *events: Event, every_s: float) -> list[int]:
    """From now on ``node`` takes each request and then says ``events`` again and again; the list grows with each."""
    taken: list[int] = []

    async def answer(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(ASK_PART)
        taken.append(1)
        await frames.send(REPLY, Accepted())
        at_s = trio.current_time() + every_s
        while True:
            await trio.sleep(0.4)
            if not events or trio.current_time() < at_s:
                await frames.send(REPLY, KeepAlive())
            else:
                at_s += every_s
                await frames.send(REPLY, Events(events))

    node.swarm.serve(INFER, answer)
    return taken


async def asked(site: Site, patience_s: float = PATIENCE_S) -> bool:
    """Whether one prompt was answered before the client had enough."""
    got = ""
    with trio.move_on_after(patience_s):
        async with site[0].router.open_answer(ask(WORDS)) as answer:
            got = await text_of(answer.events)
    return got == WORDS


@pytest.mark.parametrize(
    ("events", "every_s"),
    [
        ((), 1.0),
        ((Delta("", tokens=0),), 0.5),
        ((Delta(""),), 0.5),
        ((Delta("word0 "),), 3.0),
        ((Delta("word0 ", tokens=1 << 32),), 1.0),
    ],
    ids=["no-word", "empty", "empty-tokens", "drip", "drip-of-many-tokens"],
)
async def test_a_peer_that_praises_itself_and_does_not_answer_is_left_alone_soon(
    events: tuple[Event, ...], every_s: float, autojump_clock: Clock
) -> None:
    async with open_site(3, echo_tokens_per_s=100) as site:
        site[0].has.clear()
        site[1].change, site[2].change = praises_itself, tells_its_speed
        taken = says(site[1], *events, every_s=every_s)
        answered = [await asked(site) for _ in range(20)]
        assert all(answered[3:])
        assert len(taken) <= 3


async def test_a_peer_that_drips_is_left_for_one_of_which_nothing_is_known(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=100) as site:
        site[0].has.clear()
        site[1].change = praises_itself
        taken = says(site[1], Delta("word0 "), every_s=3.0)
        answered = [await asked(site) for _ in range(6)]
        assert all(answered[2:])
        assert len(taken) <= 2


async def test_prompts_that_went_there_together_are_not_the_measure_of_all_that_follow(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=100) as site:
        site[0].has.clear()
        site[1].change, site[2].change = praises_itself, tells_its_speed
        taken = says(site[1], every_s=1.0)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(asked, site)
        before = len(taken)
        answered = [await asked(site) for _ in range(20)]
        assert all(answered)
        assert len(taken) == before


async def test_prompts_that_went_there_together_are_answered_elsewhere_whatever_the_budget_for_second_peers(
    autojump_clock: Clock,
) -> None:
    async with open_site(3, echo_tokens_per_s=1000) as site:
        site[0].has.clear()
        site[1].change, site[2].change = praises_itself, tells_its_speed
        taken = says(site[1], every_s=1.0)
        answered: list[bool] = []

        async def ask_patiently() -> None:
            answered.append(await asked(site, OVERDUE_S + 20.0))

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(ask_patiently)
        assert len(taken) > 20
        assert answered == [True] * 40


@pytest.mark.parametrize("code", ["invalid_request", "context_too_long", "unauthorized", "no_such_code"])
async def test_a_peer_that_finds_fault_with_every_prompt_spoils_none(code: str, autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=20) as site:
        site[0].has.clear()
        site[1].change, site[2].change = praises_itself, tells_its_speed
        taken: list[int] = []

        async def answer(stream: Stream) -> None:
            frames = FrameStream(stream)
            await frames.receive(ASK_PART)
            taken.append(1)
            await frames.send(REPLY, Accepted())
            await frames.send(REPLY, Failure(code, "your prompt is at fault"))

        site[1].swarm.serve(INFER, answer)
        assert all([await asked(site) for _ in range(20)])
        if code != "context_too_long":  # which may be true of that peer
            assert len(taken) < 12
