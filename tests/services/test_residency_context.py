"""The residency service where requests want contexts of different sizes, over the echo engine in virtual time."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.catalog import LoadedView, ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import ContextTooLong, EngineCrashed, EngineUnavailable
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Ask, ChatRequest, Delta, EmbedRequest, Event, Finish, InferRequest, Message, Options
from meshmax.base.model import ModelDetails
from meshmax.core.memory import DEFAULT_CONTEXT_TOKENS
from meshmax.engine.echo import EchoEngine, EchoModel
from meshmax.services.brought import NothingBrought
from meshmax.services.residency import ModelResidency, open_residency

A, B = (Sha256(letter * 64) for letter in "ab")
TRAINED = 32768
PER_TOKEN = 10_000  # bytes of context: 41 MB as usual, and an echo is measured to take nothing once it is loaded
CONFIG = EngineConfig(kind="llamacpp", memory="500MB", parallel=1, keep_alive_s=60.0, echo_tokens_per_s=10.0)
PEER = PeerId("a peer")


async def model_file(digest: Sha256) -> ModelFile:
    await trio.lowlevel.checkpoint()
    details = ModelDetails(context_length=TRAINED)
    return ModelFile(digest, f"model-{digest[0]}", "/nowhere", 100, details, cache_bytes_per_token=PER_TOKEN)


def ask(num_ctx: int | None = None, words: int = 4, digest: Sha256 = A, keep_alive_s: float | None = None) -> Ask:
    messages = (Message("user", " ".join(["w"] * words)),) if words else ()
    return Ask("r", digest, "m", ChatRequest(messages, options=Options(num_ctx=num_ctx)), keep_alive_s)


async def answer(residency: ModelResidency, asked: Ask, requester: PeerId | None = None) -> list[Event]:
    async with residency.open_answer(asked, requester) as events:
        return [event async for event in events]


def finish(events: list[Event]) -> Finish:
    assert isinstance(events[-1], Finish)
    return events[-1]


def words_of(events: list[Event]) -> int:
    return sum(len(event.text.split()) for event in events if isinstance(event, Delta))


class Weak(EchoEngine):
    """It cannot load more than ``most`` tokens of context, and counts its loads."""

    def __init__(self, config: EngineConfig, most: int = 1 << 22) -> None:
        super().__init__(config, 2.0)
        self.most = most
        self.loads: list[int] = []

    @asynccontextmanager
    async def open_model(self, model: ModelFile) -> AsyncIterator[EchoModel]:
        async with super().open_model(model) as loaded:
            self.loads.append(loaded.facts.context_length)
            if loaded.facts.context_length > self.most:
                raise EngineCrashed("out of memory")
            yield loaded


@asynccontextmanager
async def residency_of(
    config: EngineConfig = CONFIG,
    most: int = 1 << 22,
    file: Callable[[Sha256], object] = model_file,
) -> AsyncIterator[tuple[ModelResidency, Weak]]:
    engine = Weak(config, most)
    async with open_residency(engine, file, config, trio.current_time) as residency:  # type: ignore[arg-type]
        yield residency, engine


def context(residency: ModelResidency, digest: Sha256 = A) -> int | None:
    return next((view.context_length for view in residency.loaded() if view.digest == digest), None)


async def test_a_larger_number_has_the_model_loaded_anew_when_what_runs_has_ended(
    autojump_clock: trio.abc.Clock,
) -> None:
    config = msgspec.structs.replace(CONFIG, parallel=2)
    ended: dict[str, tuple[int, float]] = {}
    async with residency_of(config) as (residency, engine), trio.open_nursery() as nursery:

        async def use(name: str, num_ctx: int | None, words: int) -> None:
            events = await answer(residency, ask(num_ctx, words))
            ended[name] = words_of(events), trio.current_time() - begun

        begun = trio.current_time()
        nursery.start_soon(use, "long", 512, 100)
        await trio.sleep(4)
        nursery.start_soon(use, "larger", 1024, 4)
        await trio.sleep(1)
        nursery.start_soon(use, "small", 256, 4)
        await trio.sleep(5)
        assert context(residency) == 512
        await trio.sleep(5)
        assert context(residency) == 1024
    assert ended["long"] == pytest.approx((100, 12.0))
    assert ended["larger"] == ended["small"] == pytest.approx((4, 14.4))
    assert engine.loads == [512, 1024]


async def test_a_smaller_number_and_one_that_is_there_load_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, engine):
        for num_ctx in (1024, 512, 1024, 64):
            await answer(residency, ask(num_ctx))
            await answer(residency, ask(num_ctx), PEER)
    assert engine.loads == [1024]


async def test_a_request_that_waited_for_the_load_with_more_says_how_long_that_took(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of() as (residency, _), trio.open_nursery() as nursery:
        nursery.start_soon(answer, residency, ask(512, 100))
        await trio.sleep(4)
        done = finish(await answer(residency, ask(1024)))
        assert (done.load_s, done.total_s) == pytest.approx((2.0, 10.4))
        assert finish(await answer(residency, ask(1024))).load_s == 0


async def test_who_names_no_number_has_the_usual_context_though_less_is_loaded(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, engine):
        await answer(residency, ask(512), PEER)
        await answer(residency, ask(words=0))  # to load it is done
        assert context(residency) == 512
        await answer(residency, ask())
        assert context(residency) == DEFAULT_CONTEXT_TOKENS
    assert engine.loads == [512, DEFAULT_CONTEXT_TOKENS]


async def test_nobody_has_more_than_the_model_was_trained_for(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(msgspec.structs.replace(CONFIG, memory="")) as (residency, engine):
        for requester in (PEER, None):
            await answer(residency, ask(TRAINED * 2), requester)
    assert engine.loads == [TRAINED]


async def test_keep_alive_outlasts_a_load_with_more(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, _):
        await answer(residency, ask(512, keep_alive_s=-1))
        await answer(residency, ask(1024), PEER)
        await trio.sleep(80_000)
        assert context(residency) == 1024


async def test_what_can_never_fit_is_an_error_for_who_asks_here_and_the_model_stays(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of() as (residency, engine):
        await answer(residency, ask())
        with pytest.raises(EngineUnavailable, match=r"engine\.memory is 500 MB: a smaller num_ctx"):
            await answer(residency, ask(TRAINED))
        assert words_of(await answer(residency, ask())) == 4
    assert engine.loads == [DEFAULT_CONTEXT_TOKENS]


async def test_a_peers_number_counts_as_far_as_there_is_room(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, engine):
        assert words_of(await answer(residency, ask(TRAINED), PEER)) == 4
        assert context(residency) == TRAINED // 2  # 328 MB and the engine's own are too much, 164 MB are not
        assert words_of(await answer(residency, ask(TRAINED), PEER)) == 4
    assert engine.loads == [TRAINED // 2]


async def test_idle_models_give_way_to_a_peers_number_and_those_in_use_do_not(autojump_clock: trio.abc.Clock) -> None:
    config = msgspec.structs.replace(CONFIG, memory="600MB")
    async with residency_of(config) as (residency, _), trio.open_nursery() as nursery:
        await answer(residency, ask(digest=B))
        await answer(residency, ask(512))
        nursery.start_soon(answer, residency, ask(words=100, digest=B))
        await trio.sleep(1)
        residency._core._residents[B].need = msgspec.structs.replace(
            residency._core._residents[B].need, working_bytes=300_000_000
        )  # an echo takes nothing
        await answer(residency, ask(TRAINED // 2), PEER)
        assert (context(residency), context(residency, B)) == (512 * 16, DEFAULT_CONTEXT_TOKENS)
        await trio.sleep(20)
        await answer(residency, ask(TRAINED // 2), PEER)
        assert (context(residency), context(residency, B)) == (TRAINED // 2, None)


async def test_where_a_load_with_a_peers_number_fails_it_is_answered_with_what_there_was(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of(most=8000) as (residency, engine):
        await answer(residency, ask())
        assert words_of(await answer(residency, ask(8192), PEER)) == 4
        assert words_of(await answer(residency, ask(8192), PEER)) == 4
        assert context(residency) == DEFAULT_CONTEXT_TOKENS
        with pytest.raises(EngineUnavailable, match="could not be loaded with a context of 8192 tokens"):
            await answer(residency, ask(8192))
    assert engine.loads == [DEFAULT_CONTEXT_TOKENS, 8192, DEFAULT_CONTEXT_TOKENS]


@pytest.mark.parametrize("number", [16384, 8192, 20000])
async def test_where_a_load_fails_peers_that_joined_it_are_answered_with_the_usual_context(
    number: int, autojump_clock: trio.abc.Clock
) -> None:
    async with residency_of(most=8000) as (residency, engine):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, residency, ask(16384), PEER)
            await trio.sleep(1)
            nursery.start_soon(answer, residency, ask(number), PeerId("another"))
            nursery.start_soon(answer, residency, ask())
        assert context(residency) == DEFAULT_CONTEXT_TOKENS
    assert engine.loads == [16384, DEFAULT_CONTEXT_TOKENS]


class Theirs(NothingBrought):
    """An engine of another's that runs A."""

    def brings(self, digest: Sha256) -> bool:
        return digest == A

    def loaded(self) -> tuple[LoadedView, ...]:
        return (LoadedView("a", A, 5, 5, 64, "cpu", ModelDetails(), None),)

    def parallel(self) -> int:
        return 1


async def test_what_an_engine_brings_along_is_not_loaded_anew(autojump_clock: trio.abc.Clock) -> None:
    engine = Weak(CONFIG)
    async with open_residency(engine, model_file, CONFIG, trio.current_time, brought=Theirs()) as residency:
        for num_ctx in (512, 1024, None):
            await answer(residency, ask(num_ctx))
    assert len(engine.loads) == 1


# --- prompts that are too long ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("requester", [None, PEER])
async def test_a_prompt_that_is_too_long_has_the_model_loaded_with_more_once(
    requester: PeerId | None, autojump_clock: trio.abc.Clock
) -> None:
    config = msgspec.structs.replace(CONFIG, echo_tokens_per_s=1e6)
    async with residency_of(config) as (residency, engine):
        await answer(residency, ask())
        events = await answer(residency, ask(words=5000), requester)
        assert words_of(events) == 5000
        assert finish(events).load_s == pytest.approx(2.0)
        assert words_of(await answer(residency, ask(words=6000), requester)) == 6000
        assert residency.load().running == residency.load().queued == 0
    assert engine.loads == [DEFAULT_CONTEXT_TOKENS, 8192]


@pytest.mark.parametrize(("num_ctx", "words"), [(2048, 5000), (None, TRAINED), (None, 30_000)])
async def test_a_prompt_that_is_too_long_for_what_there_can_be_is_told_so(
    num_ctx: int | None, words: int, autojump_clock: trio.abc.Clock
) -> None:
    async with residency_of() as (residency, engine):
        await answer(residency, ask())
        with pytest.raises(ContextTooLong, match=f"the prompt has {words} tokens, the model's context 4096"):
            await answer(residency, ask(num_ctx, words))
        assert residency.load().running == 0
    assert engine.loads == [DEFAULT_CONTEXT_TOKENS]


async def test_texts_that_are_too_long_to_be_embedded_load_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, engine):
        request: InferRequest = EmbedRequest(("w " * 5000,), truncate=False)
        with pytest.raises(ContextTooLong):
            await answer(residency, Ask("r", A, "m", request))
    assert engine.loads == [DEFAULT_CONTEXT_TOKENS]


async def test_where_the_larger_load_for_a_long_prompt_fails_it_is_told_that_it_is_too_long(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of(most=8000) as (residency, engine):
        await answer(residency, ask())
        with pytest.raises(ContextTooLong):
            await answer(residency, ask(words=5000))
        assert words_of(await answer(residency, ask())) == 4
    assert engine.loads == [DEFAULT_CONTEXT_TOKENS, 8192, DEFAULT_CONTEXT_TOKENS]


@pytest.mark.parametrize("moments", range(1, 12))
async def test_cancelled_at_any_moment_of_a_load_with_more_a_request_leaves_no_trace(
    moments: int, autojump_clock: trio.abc.Clock
) -> None:
    async with residency_of() as (residency, _), trio.open_nursery() as nursery:
        nursery.start_soon(answer, residency, ask(512, 20))
        await trio.sleep(2.5)
        with trio.move_on_after(moments * 0.5 - 0.05):
            await answer(residency, ask(words=5000))
        await trio.sleep(10)
        load = residency.load()
        assert (load.running, load.queued) == (0, 0)
        assert words_of(await answer(residency, ask(512))) == 4
