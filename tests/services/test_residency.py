"""The residency service over the echo engine, in virtual time."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import structlog
import trio
import trio.testing

from meshmax.base.catalog import LoadedView, ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import Busy, EngineCrashed, EngineUnavailable, InvalidRequest, ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, ChatRequest, Delta, Event, Finish, InferRequest, Message, Options
from meshmax.base.model import ModelDetails
from meshmax.engine.echo import EchoEngine, EchoModel
from meshmax.services.residency import ModelResidency, open_residency
from meshmax.telemetry.log import configure, get_logger

A, B, C, D = (Sha256(letter * 64) for letter in "abcd")
MISSING = Sha256("0" * 64)
CONFIG = EngineConfig(
    kind="echo", echo_tokens_per_s=10.0, parallel=2, keep_alive_s=60.0, load_timeout_s=30.0, max_loaded=3
)


async def model_file(digest: Sha256) -> ModelFile:
    await trio.lowlevel.checkpoint()
    if digest == MISSING:
        raise ModelNotFound
    return ModelFile(digest, f"model-{digest[0]}", "/nowhere", 100)


def ask(digest: Sha256 = A, text: str = "one two three four", keep_alive_s: float | None = None, **options: Any) -> Ask:
    request: InferRequest = ChatRequest((Message("user", text),) if text else (), options=Options(**options))
    return Ask("r", digest, "m", request, keep_alive_s)


async def answer(residency: ModelResidency, asked: Ask) -> list[Event]:
    async with residency.open_answer(asked) as events:
        return [event async for event in events]


async def crash_at_first_event(residency: ModelResidency, engine: EchoEngine) -> None:
    async with residency.open_answer(ask()) as events:
        async for _event in events:
            engine.models[0].crash()


async def fail_at_first_event(residency: ModelResidency, asked: Ask) -> None:
    with suppress(EngineUnavailable):
        async with residency.open_answer(asked) as events:
            await anext(events)
            raise EngineUnavailable("it cannot be reached")


def finish(events: list[Event]) -> Finish:
    assert isinstance(events[-1], Finish)
    return events[-1]


@asynccontextmanager
async def residency_of(
    engine: EchoEngine, config: EngineConfig = CONFIG, on_change: Callable[[], None] = lambda: None
) -> AsyncIterator[ModelResidency]:
    async with open_residency(
        engine, model_file, config, lambda: 1000.0 + trio.current_time(), on_change=on_change
    ) as residency:
        yield residency


async def test_the_first_request_waits_for_the_load_and_says_so_and_the_next_does_not(
    autojump_clock: trio.abc.Clock,
) -> None:
    engine = EchoEngine(CONFIG, load_s=2.0)
    async with residency_of(engine) as residency:
        first, second = finish(await answer(residency, ask())), finish(await answer(residency, ask()))
    assert (first.load_s, second.load_s) == pytest.approx((2.0, 0.0))
    assert (first.total_s, second.total_s) == pytest.approx((2.4, 0.4))


async def test_simultaneous_requests_share_one_load(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG, load_s=2.0)
    loads = []
    async with residency_of(engine) as residency, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(answer, residency, ask())
        await trio.sleep(2.1)
        loads.append(len(engine.models))
        assert residency.load().running == 2
    assert loads == [1]


async def test_requests_beyond_the_slots_wait_and_beyond_the_queue_are_busy(autojump_clock: trio.abc.Clock) -> None:
    config = EngineConfig(kind="echo", echo_tokens_per_s=10.0, parallel=1, max_queue=1)
    async with residency_of(EchoEngine(config), config) as residency, trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(answer, residency, ask())
        await trio.sleep(0.1)
        nursery.start_soon(answer, residency, ask())
        await trio.sleep(0.1)
        load = residency.load()
        assert (load.running, load.queued, load.capacity) == (1, 1, 1)
        with pytest.raises(Busy, match="maximum pending requests exceeded"):
            await answer(residency, ask())
        nursery.cancel_scope.deadline = begun + 0.81
    assert trio.current_time() == pytest.approx(begun + 0.8)


async def test_leaving_an_answer_stops_the_engine_and_frees_its_slot(autojump_clock: trio.abc.Clock) -> None:
    config = EngineConfig(kind="echo", echo_tokens_per_s=10.0, parallel=1)
    engine = EchoEngine(config)
    async with residency_of(engine, config) as residency:
        with trio.move_on_after(0.55):
            await answer(residency, ask(text="w " * 100))
        await trio.sleep(5)
        assert engine.models[0].produced == 5
        assert residency.load().running == 0
        await answer(residency, ask())


async def test_an_idle_model_is_unloaded_after_its_keep_alive(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG)
    async with residency_of(engine) as residency:
        await answer(residency, ask())
        await trio.sleep(59)
        assert [view.name for view in residency.loaded()] == ["model-a"]
        expires = residency.loaded()[0].expires_at_s
        assert expires == pytest.approx(1000 + trio.current_time() + 1)
        await trio.sleep(1.1)
        assert residency.loaded() == ()
        assert engine.models == []


async def test_keep_alive_of_a_request_counts(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG)
    async with residency_of(engine) as residency:
        await answer(residency, ask(keep_alive_s=-1))
        await trio.sleep(80_000)
        assert residency.loaded()[0].expires_at_s is None
        await answer(residency, ask(keep_alive_s=0))
        await trio.testing.wait_all_tasks_blocked()
        assert engine.models == []


async def test_a_request_that_names_no_keep_alive_leaves_the_one_that_was_named(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with residency_of(EchoEngine(CONFIG)) as residency:
        await answer(residency, ask(text="", keep_alive_s=600))
        await answer(residency, ask())
        await trio.sleep(599)
        assert len(residency.loaded()) == 1
        await trio.sleep(2)
        assert residency.loaded() == ()
        await answer(residency, ask())
        await trio.sleep(61)
        assert residency.loaded() == ()


async def test_load_only_requests_load_and_unload(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG, load_s=3.0)
    async with residency_of(engine) as residency:
        (event,) = await answer(residency, ask(text=""))
        assert event == Finish("load", total_s=3.0, load_s=3.0)
        assert len(engine.models) == 1
        assert await answer(residency, ask(text="", keep_alive_s=0)) == [Finish("unload")]
        await trio.testing.wait_all_tasks_blocked()
        assert engine.models == []
        assert await answer(residency, ask(B, text="", keep_alive_s=0)) == [Finish("unload")]


async def test_a_fourth_model_takes_the_place_of_the_one_used_longest_ago(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(EchoEngine(CONFIG)) as residency:
        for digest in (A, B, C, A, D):
            await answer(residency, ask(digest))
        assert {view.digest for view in residency.loaded()} == {A, C, D}


async def test_a_crash_fails_the_answers_under_way_and_the_next_request_loads_anew(
    autojump_clock: trio.abc.Clock,
) -> None:
    engine = EchoEngine(CONFIG)
    async with residency_of(engine) as residency:
        with pytest.raises(EngineCrashed):
            await crash_at_first_event(residency, engine)
        assert residency.loaded() == ()
        assert finish(await answer(residency, ask())).done_reason == "stop"


async def test_a_crash_while_idle_is_seen_by_the_next_request(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG)
    async with residency_of(engine) as residency:
        await answer(residency, ask())
        engine.models[0].crash()
        assert residency.loaded() == ()
        assert finish(await answer(residency, ask())).output_tokens == 4


async def test_a_model_that_is_not_there_is_an_error_for_who_asked_only(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(EchoEngine(CONFIG)) as residency:
        with pytest.raises(ModelNotFound):
            await answer(residency, ask(MISSING))
        assert residency.load().queued == 0
        await answer(residency, ask())


async def test_a_load_that_takes_too_long_is_given_up(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(EchoEngine(CONFIG, load_s=31.0)) as residency:
        with pytest.raises(EngineUnavailable, match="within 30 s"):
            await answer(residency, ask())


async def test_what_is_logged_of_a_model_is_not_of_the_prompt_that_it_was_loaded_for(
    autojump_clock: trio.abc.Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("info", json_lines=True)
    async with open_residency(EchoEngine(CONFIG), model_file, CONFIG) as residency:
        with structlog.contextvars.bound_contextvars(request_id="r", peer="p"):
            await answer(residency, ask())
            get_logger("test").info("answered")
    configure("error", json_lines=False)
    lines = {line["event"]: line for line in map(json.loads, capsys.readouterr().err.splitlines())}
    assert lines["loaded"]["model"] == "model-a"
    assert lines["loaded"].keys().isdisjoint(("request_id", "peer"))
    assert lines["answered"]["request_id"] == "r"


async def test_unload_waits_for_running_answers(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG)
    async with residency_of(engine) as residency:
        async with residency.open_answer(ask()) as events:
            await residency.unload(A)
            said = [event async for event in events]
        assert len(said) == 5
        await trio.testing.wait_all_tasks_blocked()
        assert engine.models == []
        await residency.unload(A)


async def test_the_request_that_loads_a_model_chooses_threads_and_gpu_layers_too(
    autojump_clock: trio.abc.Clock,
) -> None:
    files: list[ModelFile] = []

    class Watched(EchoEngine):
        @asynccontextmanager
        async def open_model(self, model: ModelFile) -> AsyncIterator[EchoModel]:
            files.append(model)
            async with super().open_model(model) as loaded:
                yield loaded

    async with residency_of(Watched(CONFIG)) as residency:
        await answer(residency, ask(num_gpu=0, num_thread=2, temperature=0.1))
        await answer(residency, ask(B, num_thread=0))
    assert [file.parameters for file in files] == [Options(num_gpu=0, num_thread=2), Options()]


async def test_speed_is_measured_and_kept_when_the_model_is_gone(autojump_clock: trio.abc.Clock) -> None:
    changes = []
    async with residency_of(EchoEngine(CONFIG, load_s=2.0), on_change=lambda: changes.append(1)) as residency:
        await answer(residency, ask(text="w " * 20))
        await answer(residency, ask(keep_alive_s=0))
        await trio.testing.wait_all_tasks_blocked()
        speed = residency.speed(A)
        assert (speed.load_s, speed.decode_per_s) == pytest.approx((2.0, 10.0))
        assert residency.speed(B).load_s == 0.0
    assert changes


async def test_closing_ends_every_model(autojump_clock: trio.abc.Clock) -> None:
    engine = EchoEngine(CONFIG)
    async with residency_of(engine) as residency:
        await answer(residency, ask())
        model: EchoModel = engine.models[0]
    assert not model.alive
    assert engine.models == []


@pytest.mark.parametrize("moments", range(1, 9))
async def test_cancelled_at_any_moment_a_request_leaves_no_trace(moments: int, autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(EchoEngine(CONFIG, load_s=0.3)) as residency:
        with trio.move_on_after(moments * 0.1 - 0.05):
            await answer(residency, ask())
        await trio.testing.wait_all_tasks_blocked()
        load = residency.load()
        assert (load.running, load.queued) == (0, 0)
        events = await answer(residency, ask())
        assert "".join(event.text for event in events if isinstance(event, Delta)) == "one two three four"


async def test_who_asks_a_peer_that_is_shutting_down_is_told_so(autojump_clock: trio.abc.Clock) -> None:
    async with residency_of(EchoEngine(CONFIG)) as residency:
        pass
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await answer(residency, ask())


class FakeBrought:
    """An engine of another's that runs A."""

    def __init__(self) -> None:
        self.kept: list[float | None] = []
        self.there = True
        self.looked = 0

    def brings(self, digest: Sha256) -> bool:
        return digest == A and self.there

    def look_at(self, digest: Sha256) -> None:
        self.looked += 1

    async def model_file(self, digest: Sha256) -> ModelFile:
        file = await model_file(digest)
        return msgspec.structs.replace(file, path="") if self.brings(digest) else file

    def loaded(self) -> tuple[LoadedView, ...]:
        return (LoadedView("a", A, 5, 5, 64, "gpu", ModelDetails(), None),)

    def parallel(self) -> int:
        return 16

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.append(keep_alive_s)


class Stubborn(FakeBrought):
    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        await super().keep(digest, keep_alive_s)
        if keep_alive_s == 0:
            raise InvalidRequest("it stays in memory")


async def test_what_cannot_be_unloaded_says_so_to_who_asks_that_and_answers_whoever_adds_it_to_a_prompt(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_residency(EchoEngine(CONFIG), model_file, CONFIG, lambda: 1000.0, brought=Stubborn()) as residency:
        assert finish(await answer(residency, ask(A, keep_alive_s=0))).done_reason == "stop"
        with pytest.raises(InvalidRequest, match="it stays in memory"):
            await answer(residency, ask(A, "", 0))


async def test_what_an_engine_brings_along_is_kept_by_it_and_takes_no_place_of_ours(
    autojump_clock: trio.testing.MockClock,
) -> None:
    brought = FakeBrought()
    config = msgspec.structs.replace(CONFIG, max_loaded=1)
    async with open_residency(EchoEngine(config), model_file, config, lambda: 1000.0, brought=brought) as residency:
        await answer(residency, ask(B))
        await answer(residency, ask(A))
        assert brought.kept == []
        assert [(view.digest, view.device) for view in residency.loaded()] == [(B, "cpu"), (A, "gpu")]
        assert residency.load().capacity == 2 + 16
        await answer(residency, ask(A, keep_alive_s=60))
        await answer(residency, ask(A, keep_alive_s=0))
        await answer(residency, ask(A, ""))
        assert finish(await answer(residency, ask(A, "", 0))).done_reason == "unload"
        assert brought.kept == [60, 0, None, 0]
        await answer(residency, ask(B, keep_alive_s=0))
        assert brought.kept == [60, 0, None, 0]


async def test_what_an_engine_brought_leaves_memory_with_it_and_our_own_engine_runs_our_copy(
    autojump_clock: trio.testing.MockClock,
) -> None:
    brought, engine = FakeBrought(), EchoEngine(CONFIG)
    async with open_residency(engine, brought.model_file, CONFIG, lambda: 1000.0, brought=brought) as residency:
        await answer(residency, ask(A))
        brought.there = False
        assert (residency.loaded()[0].size, residency.device(A)) == (5, None)  # the first is what the fake always says
        residency.look_at_engines()
        await trio.testing.wait_all_tasks_blocked()
        assert residency.held() == frozenset()
        assert residency.load().running == 0
        assert finish(await answer(residency, ask(A))).done_reason == "stop"
        residency.look_at_engines()
        assert len(engine.models) == 1
        assert residency.device(A) == "cpu"


async def test_an_answer_that_fails_with_its_engine_takes_the_model_out_of_memory(
    autojump_clock: trio.testing.MockClock,
) -> None:
    brought, engine = FakeBrought(), EchoEngine(CONFIG)
    async with open_residency(engine, brought.model_file, CONFIG, lambda: 1000.0, brought=brought) as residency:
        await fail_at_first_event(residency, ask(A))
        await trio.testing.wait_all_tasks_blocked()
        assert (residency.held(), brought.looked) == (frozenset(), 1)
        assert finish(await answer(residency, ask(A))).done_reason == "stop"
        await fail_at_first_event(residency, ask(B))  # of our own the process tells whether it lives
        assert (residency.held(), brought.looked) == (frozenset({A, B}), 1)


async def test_an_ask_finds_our_own_copy_though_the_engine_that_brought_the_model_still_answers_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    brought, engine = FakeBrought(), EchoEngine(CONFIG)
    async with open_residency(engine, brought.model_file, CONFIG, lambda: 1000.0, brought=brought) as residency:
        async with residency.open_answer(ask(A)) as events:
            await anext(events)
            brought.there = False
            await answer(residency, ask(A, keep_alive_s=40))
            assert residency.load().running == 1
        assert residency.load().running == 0
        assert residency.device(A) == "cpu"


async def test_where_a_model_is_in_memory_is_told_of_those_that_are_there_to_stay(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_residency(
        EchoEngine(CONFIG), model_file, CONFIG, lambda: 1000.0, brought=FakeBrought()
    ) as residency:
        assert (residency.device(A), residency.device(B)) == ("gpu", None)
        await answer(residency, ask(B))
        assert residency.device(B) == "cpu"
        await residency.unload(B)
        assert residency.device(B) is None
