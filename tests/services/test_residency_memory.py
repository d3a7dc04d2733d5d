"""The residency service where memory is short, and what is preloaded, over the echo engine in virtual time."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import Draining, EngineCrashed, EngineUnavailable, ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, ChatRequest, Event, Finish, GenerateRequest, Message, Options
from meshmax.base.status import Gpu
from meshmax.base.units import MIB
from meshmax.core.memory import Need, Reading
from meshmax.engine.echo import EchoEngine, EchoModel
from meshmax.ports import LoadedFacts
from meshmax.services.drain import open_drain
from meshmax.services.model_memory import ModelMemory
from meshmax.services.residency import STOPPED_S, ModelResidency, open_residency

A, B, C, LARGE_HERE, LARGE = (Sha256(letter * 64) for letter in "abcdf")
SIZES = {A: 100, B: 100, C: 150, LARGE_HERE: 250, LARGE: 300}
CONFIG = EngineConfig(kind="echo", echo_tokens_per_s=10.0, parallel=2, keep_alive_s=60.0, memory="250B")


async def model_file(digest: Sha256) -> ModelFile:
    await trio.lowlevel.checkpoint()
    if digest not in SIZES:
        raise ModelNotFound
    return ModelFile(digest, f"model-{digest[0]}", "/nowhere", SIZES[digest])


def ask(digest: Sha256, text: str = "one two three four") -> Ask:
    return Ask("r", digest, "m", ChatRequest((Message("user", text),)) if text else GenerateRequest())


async def answer(residency: ModelResidency, asked: Ask) -> list[Event]:
    async with residency.open_answer(asked) as events:
        return [event async for event in events]


@asynccontextmanager
async def residency_of(
    config: EngineConfig = CONFIG, memory: Callable[[], Reading] = Reading, load_s: float = 2.0
) -> AsyncIterator[tuple[ModelResidency, EchoEngine]]:
    engine = EchoEngine(config, load_s)
    async with open_residency(engine, model_file, config, trio.current_time, memory=memory) as residency:
        yield residency, engine


def loaded(residency: ModelResidency) -> set[Sha256]:
    return {view.digest for view in residency.loaded()}


async def test_models_share_the_budget_and_the_one_used_longest_ago_goes(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, engine):
        for digest in (A, B, A):
            await answer(residency, ask(digest))
        assert loaded(residency) == {A, B}
        await answer(residency, ask(C))
        assert loaded(residency) == {A, C}
        assert len(engine.models) == 2


async def test_a_model_in_use_is_waited_for(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, _), trio.open_nursery() as nursery:
        nursery.start_soon(answer, residency, ask(C, "w " * 100))
        await trio.sleep(5)
        nursery.start_soon(answer, residency, ask(B))
        await trio.sleep(2.5)
        assert loaded(residency) == {B, C}
        await trio.sleep(1)  # B is idle now, and C is not
        nursery.start_soon(answer, residency, ask(LARGE_HERE, ""))
        await trio.sleep(1)
        assert loaded(residency) == {C}
        await trio.sleep(15)
        assert loaded(residency) == {LARGE_HERE}


async def test_what_exceeds_the_budget_is_refused_before_it_is_loaded(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, engine):
        await answer(residency, ask(A))
        with pytest.raises(EngineUnavailable, match=r"needs about 300 B .* engine\.memory is 250 B"):
            await answer(residency, ask(LARGE))
        assert loaded(residency) == {A}
        assert residency.load().queued == 0
        assert len(engine.models) == 1


async def test_what_exceeds_an_automatic_budget_has_the_machine_alone(autojump_clock: trio.abc.Clock) -> None:
    config = msgspec.structs.replace(CONFIG, memory="")
    async with residency_of(config, lambda: Reading(0, 310)) as (residency, _):
        await answer(residency, ask(A))
        await answer(residency, ask(LARGE))
        assert loaded(residency) == {LARGE}


async def test_where_other_programs_take_memory_idle_models_go(autojump_clock: trio.abc.Clock) -> None:
    used = 0
    config = msgspec.structs.replace(CONFIG, memory="")
    async with residency_of(config, lambda: Reading(used, 300)) as (residency, _):
        await answer(residency, ask(A))
        await answer(residency, ask(B))
        used = 100
        residency.look_at_memory()
        await trio.testing.wait_all_tasks_blocked()
        assert loaded(residency) == {B}


async def test_figures_of_gpus_count_as_of_when_they_were_read(autojump_clock: trio.abc.Clock) -> None:
    reading = Reading(0, 0, (Gpu("g", 0, 260),))
    async with residency_of(msgspec.structs.replace(CONFIG, memory=""), lambda: reading) as (residency, _):
        await answer(residency, ask(A))  # since when the GPU's figures are old
        reading = Reading(0, 0, (Gpu("g", 100, 260),))
        await answer(residency, ask(B))
        assert loaded(residency) == {A, B}


# --- preloading ------------------------------------------------------------------------------------------------------


async def test_a_preloaded_model_answers_without_a_load(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of() as (residency, _):
        assert await residency.try_preload(A, "a", 60.0)
        assert loaded(residency) == {A}
        assert residency.load().running == 0
        finish = (await answer(residency, ask(A)))[-1]
        assert isinstance(finish, Finish)
        assert finish.load_s == 0


async def test_nothing_goes_for_a_preloaded_one_and_it_goes_first_and_by_its_keep_alive(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of() as (residency, _):
        await answer(residency, ask(A))
        assert await residency.try_preload(C, "c", 1000.0)
        assert not await residency.try_preload(B, "b", 60.0)
        assert loaded(residency) == {A, C}
        await answer(residency, ask(B))
        assert loaded(residency) == {A, B}
    async with residency_of() as (residency, _):
        await residency.try_preload(A, "a", 30.0)
        await trio.sleep(31)
        assert loaded(residency) == set()


async def test_a_model_that_is_there_that_cannot_fit_or_that_somebody_stopped_is_not_preloaded(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of() as (residency, _):
        assert not await residency.try_preload(LARGE, "large", 60.0)
        await answer(residency, ask(A))
        assert not await residency.try_preload(A, "a", 60.0)
        await residency.unload(A)
        await trio.sleep(1)
        assert not await residency.try_preload(A, "a", 60.0)
        await trio.sleep(STOPPED_S)
        assert await residency.try_preload(A, "a", 60.0)
        with pytest.raises(ModelNotFound):
            await residency.try_preload(Sha256("0" * 64), "none", 60.0)


async def test_a_peer_that_is_drained_preloads_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with open_drain() as drain:
        async with open_residency(EchoEngine(CONFIG), model_file, CONFIG, drain=drain) as residency:
            drain.drain(10.0)
            with pytest.raises(Draining):
                await residency.try_preload(A, "a", 60.0)
            assert loaded(residency) == set()


async def test_a_preload_that_is_given_up_leaves_nothing_waiting(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(load_s=20.0) as (residency, _):
        with trio.move_on_after(1):
            await residency.try_preload(A, "a", 60.0)
        assert residency.load().queued == 0
        await answer(residency, ask(A))


def test_what_was_measured_keeps_nothing_out_that_was_let_in() -> None:
    file = ModelFile(A, "a", "/a", 100, parameters=Options(num_ctx=64))
    memory = ModelMemory(msgspec.structs.replace(CONFIG, memory="150B"), Reading)
    assert memory.on_loaded(file, LoadedFacts(120, 0, 64, "cpu", 1)).total == 120
    assert memory.need(file).total == 120
    memory.on_loaded(file, LoadedFacts(200, 0, 64, "cpu", 1))
    assert memory.need(file).total == 100
    assert not memory.is_of_gpus


# --- what happens in the middle of a load ----------------------------------------------------------------------------


async def test_a_reading_in_the_middle_of_a_load_lets_no_second_one_exceed_the_budget(
    autojump_clock: trio.abc.Clock,
) -> None:
    config = msgspec.structs.replace(CONFIG, memory="")
    engine = EchoEngine(config, 2.0)
    used = 500  # by other programs
    sizes = {A: 400, B: 400}

    async def file(digest: Sha256) -> ModelFile:
        return msgspec.structs.replace(await model_file(digest), size=sizes[digest])

    def read() -> Reading:  # a model that is loading is not seen yet
        return Reading(0, 0, (Gpu("g", used + sum(400 for model in engine.models if model.alive), 1000),))

    async with open_residency(engine, file, config, trio.current_time, memory=read) as residency:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, residency, ask(A, "w " * 100))
            await trio.sleep(1)
            residency.look_at_memory()  # 500 used, and the 400 that A will take are not among them
            nursery.start_soon(answer, residency, ask(B))
            await trio.sleep(2.5)
            assert loaded(residency) == {A}
            assert len(engine.models) == 1
            residency.look_at_memory()
            await trio.sleep(0.1)
            assert len(engine.models) == 1
        assert loaded(residency) == {B}


async def test_figures_that_were_read_before_a_model_moved_are_not_believed(autojump_clock: trio.abc.Clock) -> None:
    reading = Reading(0, 0, (Gpu("g", 0, 260),))
    async with residency_of(msgspec.structs.replace(CONFIG, memory=""), lambda: reading) as (residency, _):
        moves = residency.moves
        await answer(residency, ask(A))
        reading = Reading(0, 0, (Gpu("g", 200, 260),))
        residency.look_at_memory(moves)  # read when A was on its way
        await answer(residency, ask(B))
        assert loaded(residency) == {A, B}
        residency.look_at_memory(residency.moves)
        await trio.testing.wait_all_tasks_blocked()
        assert loaded(residency) == {A, B}


class Broken(EchoEngine):
    """Its loads end badly in the middle, ``times`` times."""

    def __init__(self, config: EngineConfig, times: int) -> None:
        super().__init__(config, 2.0)
        self.times = times

    @asynccontextmanager
    async def open_model(self, file: ModelFile) -> AsyncIterator[EchoModel]:
        if self.times and file.digest == C:
            self.times -= 1
            await trio.sleep(1.0)
            raise EngineCrashed
        async with super().open_model(file) as model:
            yield model


async def test_an_engine_that_dies_while_it_loads_gives_its_memory_back_and_fails_who_waited(
    autojump_clock: trio.abc.Clock,
) -> None:
    engine = Broken(CONFIG, 1)
    async with open_residency(engine, model_file, CONFIG, trio.current_time) as residency:
        await answer(residency, ask(B))
        async with trio.open_nursery() as nursery:

            async def fails() -> None:
                with pytest.raises(EngineCrashed):
                    await answer(residency, ask(C))

            nursery.start_soon(fails)
            nursery.start_soon(fails)
            await trio.sleep(0.5)
            nursery.start_soon(answer, residency, ask(A))  # has no room as long as C loads
        assert residency.load() == msgspec.structs.replace(residency.load(), running=0, queued=0)
        assert loaded(residency) == {A}
        await answer(residency, ask(C))
        assert loaded(residency) == {A, C}


@pytest.mark.parametrize("after_s", [1.0, 5.0])
async def test_a_model_whose_file_is_removed_while_it_loads_or_answers_goes_and_who_waits_hears_so(
    after_s: float, autojump_clock: trio.abc.Clock
) -> None:
    removed = False

    async def file(digest: Sha256) -> ModelFile:
        if removed:
            raise ModelNotFound
        return await model_file(digest)

    config = msgspec.structs.replace(CONFIG, parallel=1)
    engine = EchoEngine(config, 2.0)
    heard: list[str] = []
    async with open_residency(engine, file, config, trio.current_time) as residency:

        async def use() -> None:
            try:
                await answer(residency, ask(A, "w " * 50))
                heard.append("answer")
            except ModelNotFound:
                heard.append("not found")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            await trio.sleep(0.1)
            nursery.start_soon(use)
            await trio.sleep(after_s)
            removed = True
            await residency.unload(A)  # as deleting its last name does
        assert heard == (["answer", "not found"] if after_s > 2 else ["not found", "not found"])
        assert loaded(residency) == set()
        assert residency.held() == set()


async def test_a_keep_alive_of_zero_unloads_when_nobody_waits_any_more(autojump_clock: trio.abc.Clock) -> None:
    config = msgspec.structs.replace(CONFIG, parallel=1)
    async with residency_of(config) as (residency, _):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(answer, residency, msgspec.structs.replace(ask(A), keep_alive_s=0.0))
        await trio.testing.wait_all_tasks_blocked()
        assert residency.moves == 2  # in and out, once for all of them
        assert loaded(residency) == set()


async def test_of_two_who_come_at_once_the_load_is_counted_as_the_one_with_the_larger_context_wants_it(
    autojump_clock: trio.abc.Clock,
) -> None:
    config = msgspec.structs.replace(CONFIG, kind="llamacpp", memory="4GB", parallel=1)
    engine = EchoEngine(config, 2.0)

    async def file(digest: Sha256) -> ModelFile:
        await trio.sleep(0.1)  # as a disk does, so that both are asked for at once
        return msgspec.structs.replace(await model_file(digest), cache_bytes_per_token=100_000)

    def with_context(digest: Sha256, tokens: int, text: str = "one") -> Ask:
        request = ChatRequest((Message("user", text),), options=Options(num_ctx=tokens))
        return Ask("r", digest, "m", request)

    async with open_residency(engine, file, config, trio.current_time) as residency, trio.open_nursery() as nursery:
        nursery.start_soon(answer, residency, with_context(C, 1000, "w " * 100))
        await trio.sleep(3)
        residency._core._residents[C].need = Need(0, 3_000_000_000)  # an echo takes nothing
        for tokens in (100, 20_000):  # 10 MB and 2 GB of context
            nursery.start_soon(answer, residency, with_context(A, tokens))
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert 0 < residency._core._next_need(A).working_bytes - 100_000 * 20_000 < 300 * MIB
        nursery.cancel_scope.cancel()
