"""Looking at engines that bring their models along: what is offered when, whose it is, what a look may cost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.catalog import BackendReport, InMemory, ModelDescription, ModelFile, OfferedModel
from meshmax.base.errors import Busy, EngineUnavailable, ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.status import Device, Gpu, Speed
from meshmax.engine.several import SeveralEngines
from meshmax.ports import LoadedModel
from meshmax.services.backends import LOOK_DEADLINE_S, LOOK_S, MAX_PAUSE_S, Backends, open_backends, served_presence

Clock = trio.testing.MockClock
A, B, C = (Sha256(letter * 64) for letter in "abc")


def offer(
    digest: Sha256, name: str = "m:latest", engine: str = "ollama", loaded: InMemory | None = None
) -> OfferedModel:
    device: Device = "gpu" if loaded and loaded.size_vram else "cpu"
    return OfferedModel(name, digest, engine, f"the {engine}", 5, loaded=loaded, device=device)


class FakeBackend:
    """``offers`` or ``error`` is what a look finds; ``takes_s``: how long one takes; ``opened``: models that were opened."""

    def __init__(self, *offers: OfferedModel, name: str = "ollama") -> None:
        self.name = name
        self.offers = offers
        self.error: Exception | None = None
        self.takes_s = 0.0
        self.looks: list[float] = []
        self.kept: list[tuple[Sha256, float | None]] = []
        self.opened: list[str] = []

    async def look(self) -> tuple[OfferedModel, ...]:
        self.looks.append(trio.current_time())
        await trio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        return self.offers

    async def devices(self) -> tuple[Gpu, ...]:
        await trio.lowlevel.checkpoint()
        return ()

    async def describe(self, digest: Sha256) -> ModelDescription:
        await trio.lowlevel.checkpoint()
        return ModelDescription(digest, offer(digest).details)

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.append((digest, keep_alive_s))

    @asynccontextmanager
    async def open_model(self, model: ModelFile) -> AsyncIterator[LoadedModel]:
        await trio.lowlevel.checkpoint()
        self.opened.append(model.name)
        yield None  # type: ignore[misc]


@asynccontextmanager
async def looking(
    *fakes: FakeBackend, runs_itself: Callable[[Sha256], bool] = lambda digest: False
) -> AsyncIterator[tuple[Backends, list[int]]]:
    changes: list[int] = []
    backends = Backends(fakes, lambda: changes.append(1), runs_itself)
    async with open_backends(backends):
        yield backends, changes


async def test_what_is_offered_is_known_soon_and_told_once(autojump_clock: Clock) -> None:
    fake = FakeBackend(offer(A))
    async with looking(fake) as (backends, changes):
        assert backends.offered() == ()
        await trio.sleep(58)
        assert backends.offered() == (offer(A),)
        assert len(changes) == 1
        assert len(fake.looks) == 60 // LOOK_S


async def test_one_that_hangs_holds_up_no_other_and_is_given_up(autojump_clock: Clock) -> None:
    slow, quick = FakeBackend(offer(A)), FakeBackend(offer(B))
    slow.takes_s = 1000.0
    async with looking(slow, quick) as (backends, _):
        await trio.sleep(1)
        assert [one.digest for one in backends.offered()] == [B]
        await trio.sleep(LOOK_DEADLINE_S)
        assert "did not answer within" in backends.problems[0]


async def test_a_refusal_withdraws_at_once_and_a_busy_one_at_the_second_look(autojump_clock: Clock) -> None:
    gone, busy = FakeBackend(offer(A)), FakeBackend(offer(B))
    async with looking(gone, busy) as (backends, _):
        await trio.sleep(1)
        gone.error, busy.error = EngineUnavailable("gone"), Busy("busy")
        await trio.sleep(LOOK_S)
        assert [one.digest for one in backends.offered()] == [B]
        await trio.sleep(LOOK_S)
        assert backends.offered() == ()
        gone.error = busy.error = None
        await trio.sleep(MAX_PAUSE_S)
        assert [one.digest for one in backends.offered()] == [A, B]


@pytest.mark.parametrize("error", [EngineUnavailable("gone"), Busy("busy", 3600.0), RuntimeError("a mistake of ours")])
async def test_one_that_is_not_there_is_asked_ever_less(error: Exception, autojump_clock: Clock) -> None:
    fake = FakeBackend()
    fake.error = error
    async with looking(fake) as (backends, _):
        await trio.sleep(3600)
        assert len(fake.looks) < 3600 / MAX_PAUSE_S + 6
        assert backends.problems[0]


async def test_one_that_nobody_asked_for_is_told_of_only_where_it_is(autojump_clock: Clock) -> None:
    found, asked = FakeBackend(offer(A)), FakeBackend(name="openai")
    found.error = asked.error = EngineUnavailable("gone")
    backends = Backends((found, asked), unasked="ollama")
    async with open_backends(backends):
        await trio.sleep(1)
        assert backends.reports() == (BackendReport("openai", 0, "", "gone"),)
        found.error = None
        await trio.sleep(MAX_PAUSE_S)
        assert backends.reports()[0] == BackendReport("ollama", 1, "the ollama", "")
        found.error = EngineUnavailable("killed")
        await trio.sleep(MAX_PAUSE_S)
        assert backends.reports()[0] == BackendReport("ollama", 0, "", "killed")


async def test_the_first_that_offers_a_model_runs_it(autojump_clock: Clock) -> None:
    first, second = FakeBackend(offer(A)), FakeBackend(offer(A, "other:latest"), offer(B), name="openai")
    own = FakeBackend(name="own")
    async with looking(first, second) as (backends, _):
        await trio.sleep(1)
        engines = SeveralEngines(own, backends.owners)
        assert engines.name == "own"
        assert await engines.devices() == ()
        for digest in (A, B):
            async with engines.open_model(backends.model_file(digest)):
                pass
        async with engines.open_model(ModelFile(C, "stored", "/path", 1)):
            pass
        assert (first.opened, second.opened, own.opened) == (["m:latest"], ["m:latest"], ["stored"])
        with pytest.raises(EngineUnavailable, match="does not offer it any more"):
            engines.open_model(ModelFile(C, "gone", "", 1))
        assert {one.name for one in backends.offered()} == {"m:latest", "other:latest"}
        first.error = EngineUnavailable("gone")
        await trio.sleep(2 * LOOK_S)
        async with engines.open_model(backends.model_file(A)):
            pass
        assert second.opened == ["m:latest", "other:latest"]


async def test_what_our_own_engine_runs_is_no_backends(autojump_clock: Clock) -> None:
    fake = FakeBackend(offer(A, loaded=InMemory(1)), offer(B, loaded=InMemory(2, 2, 64, 7.0)))
    async with looking(fake, runs_itself=lambda digest: digest == A) as (backends, _):
        await trio.sleep(1)
        assert (backends.brings(A), backends.brings(B), backends.brings(C)) == (False, True, False)
        (shown,) = backends.loaded()
        assert shown.origin == "the ollama"
        assert (shown.digest, shown.device, shown.context_length, shown.expires_at_s) == (B, "gpu", 64, 7.0)
        for digest in (A, B, C):
            await backends.keep(digest, 5)
        assert fake.kept == [(B, 5)]


async def test_what_is_nobodys_is_not_found(autojump_clock: Clock) -> None:
    backends = Backends()
    assert len(backends) == 0
    with pytest.raises(ModelNotFound):
        backends.model_file(A)
    with pytest.raises(ModelNotFound):
        await backends.describe(A)


async def test_after_a_load_the_backend_is_looked_at_soon(autojump_clock: Clock) -> None:
    fake = FakeBackend(offer(A))
    async with looking(fake) as (backends, _):
        await trio.sleep(1)
        await backends.keep(A, None)
        await trio.sleep(1)
        assert len(fake.looks) == 2


def test_a_status_tells_of_a_brought_model_that_it_is_no_copy() -> None:
    told = served_presence(
        offer(A, loaded=InMemory(9, 9)), ("registry.ollama.ai/library/m:latest",), Speed(1.0, 2.0, 3.0)
    )
    assert (told.served, told.is_copy, told.engine, told.state, told.device) == (True, False, "ollama", "loaded", "gpu")
    assert (told.prefill_per_s, told.decode_per_s, told.load_s) == (1.0, 2.0, 3.0)
    assert not served_presence(offer(A), (), Speed()).is_copy


class Reading(FakeBackend):
    """What a look finds was so when it began."""

    async def look(self) -> tuple[OfferedModel, ...]:
        found = self.offers
        await super().look()
        return found


@pytest.mark.parametrize("at_s", [each / 4 for each in range(40)])
async def test_what_happens_there_at_whatever_moment_is_seen_by_the_next_look(
    at_s: float, autojump_clock: Clock
) -> None:
    fake = Reading(offer(A))
    fake.takes_s = 2.0
    async with looking(fake) as (backends, _):
        await trio.sleep(2 * fake.takes_s + LOOK_S + at_s)  # twice looked, and somewhere between two looks or in one
        fake.offers = ()
        backends.look_at(A)
        await trio.sleep(2 * fake.takes_s + LOOK_S / 5)  # the look under way, a moment, and another one
        assert backends.offered() == ()
