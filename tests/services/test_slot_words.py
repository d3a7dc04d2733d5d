"""What the residency tells of its waits, over the echo engine in virtual time."""

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, ChatRequest, EmbedRequest, GenerateRequest, InferRequest, Message, Options, Said
from meshmax.base.status import Wait
from meshmax.engine.echo import EchoEngine
from meshmax.services.residency import ModelResidency
from meshmax.services.slot_words import limit_of
from tests.services.test_residency import CONFIG, A, residency_of

ONE_SLOT = msgspec.structs.replace(CONFIG, parallel=1)


async def ask(residency: ModelResidency, words: int, digest: Sha256 = A, limit: int | None = None) -> None:
    request = ChatRequest((Message("user", "word " * words),), options=Options(num_predict=limit))
    async with residency.open_answer(Ask("r", digest, "m", request)) as events:
        async for _event in events:
            pass


def wait_of(residency: ModelResidency, digest: Sha256 = A) -> Wait:
    return next(wait for wait in residency.load().waits if wait.digest == digest)


async def test_a_loaded_model_with_a_free_slot_is_told_as_such(autojump_clock: trio.testing.MockClock) -> None:
    async with residency_of(EchoEngine(CONFIG)) as residency:
        assert residency.load().waits == ()
        await ask(residency, 4)
        assert residency.load().waits == (Wait(A, 0.0, 2, 0),)


async def test_what_is_told_is_about_what_a_newcomer_waits(autojump_clock: trio.testing.MockClock) -> None:
    async with residency_of(EchoEngine(ONE_SLOT), ONE_SLOT) as residency, trio.open_nursery() as nursery:
        for _ in range(2):
            await ask(residency, 40)
        nursery.start_soon(ask, residency, 40)
        await trio.sleep(2.0)
        told = wait_of(residency)
        assert told.free == told.queued == 0
        began = trio.current_time()
        await ask(residency, 1)
        waited_s = trio.current_time() - began
        assert told.wait_s == pytest.approx(waited_s, rel=0.5)


async def test_who_waits_already_makes_it_longer(autojump_clock: trio.testing.MockClock) -> None:
    async with residency_of(EchoEngine(ONE_SLOT), ONE_SLOT) as residency, trio.open_nursery() as nursery:
        await ask(residency, 40)
        nursery.start_soon(ask, residency, 40)
        await trio.sleep(1.0)
        alone = wait_of(residency)
        nursery.start_soon(ask, residency, 40)
        await trio.testing.wait_all_tasks_blocked()
        behind = wait_of(residency)
        assert behind.queued == 1
        assert behind.wait_s > alone.wait_s + 2.0


async def test_a_model_that_takes_no_asks_any_more_is_not_told_of(autojump_clock: trio.testing.MockClock) -> None:
    async with residency_of(EchoEngine(ONE_SLOT), ONE_SLOT) as residency, trio.open_nursery() as nursery:
        await ask(residency, 4)
        nursery.start_soon(ask, residency, 40)
        await trio.sleep(1.0)
        await residency.unload(A)
        assert residency.load().waits == ()


async def test_a_client_that_leaves_frees_its_slot_in_the_word_too(autojump_clock: trio.testing.MockClock) -> None:
    async with residency_of(EchoEngine(ONE_SLOT), ONE_SLOT) as residency:
        await ask(residency, 4)
        with trio.move_on_after(1.0):
            await ask(residency, 400)
        assert wait_of(residency) == Wait(A, 0.0, 1, 0)


@pytest.mark.parametrize(
    ("request_", "limit"),
    [
        (ChatRequest(), None),
        (ChatRequest(options=Options(num_predict=-1)), None),
        (GenerateRequest(options=Options(num_predict=9)), 9),
        (GenerateRequest(options=Options(num_predict=9), said=Said("x", tokens=4)), 5),
        (EmbedRequest(options=Options(num_predict=9)), None),
    ],
)
def test_the_limit_of_an_answer_is_what_it_may_still_say(request_: InferRequest, limit: int | None) -> None:
    assert limit_of(request_) == limit
