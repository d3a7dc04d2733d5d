"""An answer of the real model that changes its peer in the middle: greedy, it comes out as if it had not."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from meshmax.base.config import EngineConfig
from meshmax.base.inference import ChatRequest, Delta, Event, Finish, Message, Options
from meshmax.core.continuation import Joint, SoFar, plan
from meshmax.engine.llamacpp import LlamaCppEngine, LlamaCppModel
from tests.contracts.test_engine import small_model

pytestmark = pytest.mark.loopback

CONFIG = EngineConfig(threads=1, parallel=1, context_tokens=1024)
BREAKS = 2  # of each answer
GREEDY = Options(temperature=0.0, num_predict=48)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
# More than 64 tokens of prompt and said together: llama.cpp reads these otherwise than it generates.
LONG = (
    "Explain photosynthesis to a child who has asked why leaves are green and why trees stand in the sun all day long."
)


@pytest.fixture
async def peers(tmp_path: Path) -> AsyncIterator[list[LlamaCppModel]]:
    async with AsyncExitStack() as stack:
        found = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            engine = LlamaCppEngine(CONFIG, tmp_path / name)
            found.append(await stack.enter_async_context(engine.open_model(small_model())))
        yield found


async def events_of(model: LlamaCppModel, request: object) -> list[Event]:
    async with model.answer(request) as events:  # type: ignore[arg-type]
        return [event async for event in events]


def said_in(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_greedy_answer_broken_anywhere_comes_out_as_if_nothing_had_happened(
    peers: list[LlamaCppModel],
) -> None:
    rng = random.Random(6)
    requests = [
        ChatRequest((Message("user", LONG),), options=GREEDY),
        ChatRequest((Message("user", "List ten animals with emojis"),), options=GREEDY),
        ChatRequest((Message("user", "What is 17*23? Show the steps."),), tools=(TOOL,), options=GREEDY),
    ]
    for request in requests:
        whole = await events_of(peers[0], request)
        for at in rng.sample(range(1, len(whole)), BREAKS):
            so_far = SoFar()
            for event in whole[:at]:
                so_far.on_event(event)
            how = plan(request, so_far)
            assert how is not None
            joint = Joint(how, so_far)
            rest = [out for event in await events_of(peers[1], how.request) for out in joint.on_event(event)]
            assert said_in(whole[:at]) + said_in(rest) == said_in(whole)
            end, last = whole[-1], rest[-1]
            assert isinstance(end, Finish)
            assert isinstance(last, Finish)
            assert (last.prompt_tokens, last.output_tokens) == (end.prompt_tokens, end.output_tokens)
