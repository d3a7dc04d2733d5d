"""The residency where something happens while it waits for something else, at whatever moment: in virtual time."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, ChatRequest, Message
from meshmax.engine.echo import EchoEngine
from meshmax.services.residency import ModelResidency, open_residency

A = Sha256("a" * 64)
CONFIG = EngineConfig(kind="echo", echo_tokens_per_s=10.0, parallel=1, keep_alive_s=600.0, max_loaded=2)


async def model_file(digest: Sha256) -> ModelFile:
    """Found on a slow disk."""
    await trio.sleep(1.0)
    return ModelFile(digest, f"model-{digest[0]}", "/nowhere", 100)


def ask(text: str = "one two", keep_alive_s: float | None = None) -> Ask:
    return Ask("r", A, "m", ChatRequest((Message("user", text),) if text else ()), keep_alive_s)


async def answer(residency: ModelResidency, asked: Ask) -> None:
    async with residency.open_answer(asked) as events:
        async for _ in events:
            pass


@pytest.mark.parametrize("at_s", [each / 4 for each in range(20)])
async def test_an_ask_that_outlives_the_residency_ends_whatever_it_waited_for(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    ended: list[str] = []

    async def asks(residency: ModelResidency) -> None:
        try:
            await answer(residency, ask())
        except MeshmaxError as error:
            ended.append(error.message)

    async with trio.open_nursery() as peers:  # whose streams outlive the models by a moment
        async with open_residency(EchoEngine(CONFIG, 1.0), model_file, CONFIG) as residency:
            for _ in range(2):
                peers.start_soon(asks, residency)  # noqa: ASYNC111  it is to outlive it
            await trio.sleep(at_s)
        await trio.sleep(5.0)
        peers.cancel_scope.cancel()
    if at_s < 1.0:  # before it was known what the model takes
        assert ended == ["this peer is shutting down"] * 2


@pytest.mark.parametrize("at_s", [each / 4 for each in range(20)])
@pytest.mark.parametrize("by_ask", [False, True])
async def test_a_model_that_is_stopped_at_whatever_moment_of_its_preloading_goes_and_stays_away(
    by_ask: bool, at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_residency(EchoEngine(CONFIG, 1.0), model_file, CONFIG) as residency:

        async def stop() -> None:
            await trio.sleep(at_s)
            await (answer(residency, ask("", 0.0)) if by_ask else residency.unload(A))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await residency.try_preload(A, "a", 60.0)
        assert residency.loaded() == ()
        assert not await residency.try_preload(A, "a", 60.0)
