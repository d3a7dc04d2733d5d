"""An answer that is collected into one object: its bound."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
import trio

from meshmax.api import exchange
from meshmax.base.errors import EngineError
from meshmax.base.inference import Delta, Event, Finish, Vector


async def played(*events: Event) -> AsyncGenerator[Event, None]:
    for event in events:
        await trio.lowlevel.checkpoint()
        yield event


@pytest.mark.parametrize(
    ("event", "what"),
    [
        (Delta("x" * 50), "with stream true"),
        (Delta("x", logprobs=({"token": "x", "logprob": -1.0, "top_logprobs": [{"token": "y"}] * 3},)), "stream true"),
        (Vector(0, b"x" * 50), "for fewer texts"),
    ],
)
async def test_an_answer_too_long_for_one_object_says_how_to_ask_whatever_makes_it_long(
    monkeypatch: pytest.MonkeyPatch, event: Event, what: str
) -> None:
    monkeypatch.setattr(exchange, "MAX_WHOLE_BYTES", 100)
    async with aclosing(played(event, event, event, Finish())) as events:
        with pytest.raises(EngineError, match=what):
            await exchange._collect(events, lambda _moved: None)


async def test_an_answer_without_an_end_is_an_error() -> None:
    async with aclosing(played(Delta("x"))) as events:
        with pytest.raises(EngineError, match="ended before"):
            await exchange._collect(events, lambda _moved: None)
