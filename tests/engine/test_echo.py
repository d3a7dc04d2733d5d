"""What is particular to the echo engine; what it shares with others is in tests/contracts/test_engine.py."""

import array
import math

import msgspec
import pytest
import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import CapabilityMissing, EngineCrashed, InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Message,
    Options,
    Said,
)
from meshmax.engine.echo import DIMENSIONS, EchoEngine, unit_vector

CONFIG = EngineConfig(kind="echo", echo_tokens_per_s=10.0)


def model(**parameters: object) -> ModelFile:
    return ModelFile(Sha256("a" * 64), "echo", "/nowhere", 7, parameters=Options(**parameters))  # type: ignore[arg-type]


def user(text: str) -> Message:
    return Message("user", text)


async def answer(request: InferRequest, file: ModelFile | None = None) -> list[Event]:
    async with EchoEngine(CONFIG).open_model(file or model()) as loaded, loaded.answer(request) as events:
        return [event async for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_the_last_user_message_comes_back_word_by_word(autojump_clock: trio.abc.Clock) -> None:
    events = await answer(ChatRequest((user("first"), Message("assistant", "a"), user(" hello\n big  world "))))
    assert [event.text for event in events if isinstance(event, Delta)] == [" hello", "\n big", "  world", " "]


async def test_an_answer_takes_as_long_as_its_tokens(autojump_clock: trio.abc.Clock) -> None:
    begun = trio.current_time()
    finish = (await answer(ChatRequest((user("a b c d e"),))))[-1]
    assert trio.current_time() - begun == pytest.approx(0.5)
    assert isinstance(finish, Finish)
    assert (finish.output_tokens, finish.prompt_tokens) == (5, 5)
    assert finish.output_s == pytest.approx(0.5)


async def test_a_turn_begun_is_continued(autojump_clock: trio.abc.Clock) -> None:
    events = await answer(ChatRequest((user("one two three"), Message("assistant", "one two"))))
    assert text_of(events) == " three"


async def test_the_models_own_parameters_count_where_nothing_was_asked(autojump_clock: trio.abc.Clock) -> None:
    file = model(num_predict=2, stop=("three",))
    assert text_of(await answer(ChatRequest((user("one two three"),)), file)) == "one two"
    asked = ChatRequest((user("one two three"),), options=Options(num_predict=-1))
    assert text_of(await answer(asked, file)) == "one two "


@pytest.mark.parametrize(
    "request_",
    [
        ChatRequest((Message("user", "x", images=(b"x",)),)),
        ChatRequest((user("x"),), tools=({"type": "function"},)),
        GenerateRequest("x", images=(b"x",)),
        GenerateRequest("x", suffix="y"),
    ],
)
async def test_what_it_cannot_do_is_refused(request_: InferRequest) -> None:
    with pytest.raises(CapabilityMissing, match="echo does not support"):
        await answer(request_)


async def test_leaving_stops_the_count_of_tokens(autojump_clock: trio.abc.Clock) -> None:
    async with EchoEngine(CONFIG).open_model(model()) as loaded:
        async with loaded.answer(ChatRequest((user("w " * 50),))) as events:
            await anext(events)
            await anext(events)
        await trio.sleep(10)
        assert loaded.produced == 2


async def test_a_crashed_model_answers_nobody() -> None:
    async with EchoEngine(CONFIG).open_model(model()) as loaded:
        loaded.crash()
        with pytest.raises(EngineCrashed):
            async with loaded.answer(ChatRequest((user("x"),))):
                pass


def test_vectors_depend_on_the_text_alone_and_have_length_one() -> None:
    one, again, other = (array.array("f", unit_vector(text)) for text in ("x", "x", "y"))
    assert one == again != other
    assert len(one) == DIMENSIONS
    assert math.sqrt(sum(value * value for value in one)) == pytest.approx(1.0)


@pytest.mark.parametrize("dimensions", [0, DIMENSIONS + 1])
def test_impossible_dimensions_are_refused(dimensions: int) -> None:
    with pytest.raises(InvalidRequest, match="between 1 and"):
        unit_vector("x", dimensions)


@pytest.mark.parametrize(
    "request_",
    [
        ChatRequest((user(" one two\n three  four "),)),
        ChatRequest((user("one two three"), Message("assistant", "one"))),
        ChatRequest((user("a b c d e f"),), options=Options(num_predict=4)),
        ChatRequest((user("a b c d e f"),), options=Options(num_predict=6)),
        ChatRequest((user("a b STOP d"),), options=Options(stop=("STOP", " d"))),
        ChatRequest((user('say "x" \U0001f98a now'),), format="json"),
        GenerateRequest("one two three", context=(1, 2)),
        GenerateRequest("one two three", raw=True, options=Options(num_predict=2, stop=("three",))),
    ],
)
async def test_an_answer_goes_on_exactly_after_every_token(
    autojump_clock: trio.abc.Clock, request_: GenerateRequest | ChatRequest
) -> None:
    whole = await answer(request_)
    end = whole[-1]
    assert isinstance(end, Finish)
    for at in range(1, len(whole)):
        said = Said(text_of(whole[:at]), tokens=at)
        rest = await answer(msgspec.structs.replace(request_, said=said))
        last = rest[-1]
        assert isinstance(last, Finish)
        assert whole[:at] + rest[:-1] == whole[:-1]
        assert (last.done_reason, last.output_tokens + at) == (end.done_reason, end.output_tokens)
        assert (last.context, last.prompt_tokens) == (end.context, end.prompt_tokens)


async def test_what_it_would_not_have_said_it_cannot_go_on_from() -> None:
    for said in (Said("other"), Said("one", thinking="hm")):
        with pytest.raises(CapabilityMissing):
            await answer(ChatRequest((user("one two"),), said=said))
