"""The context of a finished answer: it comes along where it can be had, and costs no answer where it cannot."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.catalog import ModelFile
from meshmax.base.errors import EngineCrashed
from meshmax.base.ids import Sha256
from meshmax.base.inference import Event, Finish, GenerateRequest
from meshmax.engine.llamacpp import LlamaCppModel
from meshmax.engine.llamacpp_rest import Asking
from meshmax.engine.llamacpp_words import ChatReader

MODEL = ModelFile(Sha256("a" * 64), "tiny", "/nowhere", 1)


async def chunks() -> AsyncIterator[dict[str, Any]]:
    await trio.lowlevel.checkpoint()
    yield {"choices": [{"delta": {"content": "hello"}, "finish_reason": None}]}
    yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}


async def events_of(model: LlamaCppModel) -> list[Event]:
    return [
        event
        async for event in model._events(
            GenerateRequest("hi"), chunks(), Asking("", {}, ChatReader(0), None, over=False)
        )
    ]


@pytest.fixture
def model() -> LlamaCppModel:
    nothing: Any = None
    return LlamaCppModel(MODEL, nothing, nothing, {"context_tokens": 64, "parallel": 1})


async def test_the_context_is_prompt_and_answer(model: LlamaCppModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(_method: str, path: str, body: Any = None) -> Any:
        await trio.lowlevel.checkpoint()
        return {"prompt": "hi"} if path == "/apply-template" else {"tokens": [len(body["content"])]}

    monkeypatch.setattr(model, "_call", call)
    finish = (await events_of(model))[-1]
    assert isinstance(finish, Finish)
    assert finish.context == (2, 5)


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_complete_answer_does_not_fail_for_its_context(
    model: LlamaCppModel, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, hangs: bool
) -> None:
    async def call(*_args: Any, **_words: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if hangs:
            await trio.sleep_forever()
        raise EngineCrashed("gone")

    monkeypatch.setattr(model, "_call", call)
    *deltas, finish = await events_of(model)
    assert [getattr(delta, "text", "") for delta in deltas] == ["hello"]
    assert isinstance(finish, Finish)
    assert (finish.done_reason, finish.context) == ("stop", ())
