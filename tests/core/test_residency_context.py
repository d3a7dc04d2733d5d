"""The residency core where asks want contexts of different sizes: who waits for which load, and who goes first."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import Busy, EngineUnavailable
from meshmax.base.ids import PeerId, Sha256
from meshmax.core.context import Context, Wish
from meshmax.core.fair_queue import FairQueue
from meshmax.core.memory import Need, Room
from meshmax.core.residency import Action, Fail, Load, ResidencyCore, Start, Unload

A, B = (Sha256(letter * 64) for letter in "ab")
ROOM = Room(100, 120, "this peer has")
FILE = 20


def core_of(room: Room = ROOM) -> ResidencyCore:
    core = ResidencyCore(FairQueue(1000, max_per_member=1000, max_wait_s=1e9), 8)
    core.on_room(room, 0.0)
    return core


def context(tokens: int) -> Context:
    return Context(tokens, Need(FILE, tokens))


def wish(best: int, least: int | None = None) -> Wish:
    return Wish(context(best), context(best if least is None else least))


def ask(core: ResidencyCore, number: int, best: int, least: int | None = None, digest: Sha256 = A) -> list[Action]:
    return core.on_ask(number, digest, 10.0, float(number), wish=wish(best, least))


def loaded(tokens: int, parallel: int = 1, room: Room = ROOM) -> ResidencyCore:
    """A model in memory whose asks have ended."""
    core = core_of(room)
    assert ask(core, 0, tokens) == [Load(A, tokens)]
    assert core.on_loaded(A, parallel, 0.0) == [Start(0)]
    core.on_end(0, 0.0)
    return core


def test_a_model_is_loaded_with_the_largest_context_that_somebody_waits_for() -> None:
    core = core_of()
    ask(core, 1, 30, digest=B)
    core.on_loaded(B, 1, 1.0)
    core.on_end(1, 1.0)
    assert ask(core, 2, 40) == [Unload(B)]
    for number, tokens in ((3, 60), (4, 50)):
        assert ask(core, number, tokens) == []
    assert core.on_unloaded(B, 5.0) == [Load(A, 60)]
    assert core.taken == FILE + 60
    assert core.on_loaded(A, 3, 6.0) == [Start(2), Start(3), Start(4)]


def test_one_who_wants_more_waits_for_a_load_when_what_runs_has_ended_and_others_wait_for_that_one_load() -> None:
    core = core_of()
    ask(core, 1, 16)
    core.on_loaded(A, 2, 1.0)
    assert ask(core, 2, 32) == []
    assert ask(core, 3, 16) == []  # it has a slot that is free, and would keep the other waiting
    assert not core.snapshot()[0].usable
    assert ask(core, 4, 24) == []
    assert core.on_end(1, 5.0) == [Unload(A)]
    assert core.on_unloaded(A, 6.0) == [Load(A, 32)]
    assert core.on_loaded(A, 2, 7.0) == [Start(2), Start(3)]
    assert core.on_end(2, 8.0) == [Start(4)]


def test_one_who_wants_less_has_what_there_is() -> None:
    core = loaded(32)
    assert ask(core, 1, 16) == [Start(1)]
    core.on_end(1, 1.0)
    assert ask(core, 2, 32) == [Start(2)]


def test_an_idle_model_is_loaded_anew_at_once() -> None:
    core = loaded(16)
    assert ask(core, 1, 32) == [Unload(A)]
    assert core.on_unloaded(A, 2.0) == [Load(A, 32)]


def test_a_context_that_the_engine_did_not_give_is_not_asked_for_again() -> None:
    core = core_of()
    ask(core, 1, 32)
    assert core.on_loaded(A, 2, 1.0, None, 24) == [Start(1)]
    assert ask(core, 2, 32) == [Start(2)]
    core = core_of()
    ask(core, 1, 20)
    core.on_loaded(A, 2, 1.0, None, 32)  # rounded up
    assert ask(core, 2, 32) == [Start(2)]


def test_who_wanted_more_and_goes_away_leaves_the_model_as_it_was() -> None:
    core = core_of()
    ask(core, 1, 16)
    core.on_loaded(A, 2, 1.0)
    ask(core, 2, 32)
    assert ask(core, 3, 16) == []
    assert core.on_end(2, 4.0) == [Start(3)]
    core.on_end(1, 5.0)
    core.on_end(3, 6.0)
    assert core.deadline() == 16.0


def test_those_who_fit_what_was_loaded_are_served_before_it_is_loaded_anew_for_one_who_came_meanwhile() -> None:
    core = core_of()
    ask(core, 1, 16)
    assert ask(core, 2, 64) == []
    assert ask(core, 3, 16) == []
    assert ask(core, 4, 16) == []
    assert core.on_loaded(A, 2, 5.0) == [Start(1), Start(3)]
    assert core.on_end(1, 6.0) == []
    assert core.on_end(3, 7.0) == [Unload(A)]
    assert core.on_unloaded(A, 8.0) == [Load(A, 64)]
    assert core.on_loaded(A, 2, 9.0) == [Start(2), Start(4)]


def test_keep_alive_outlasts_a_load_with_more() -> None:
    core = core_of()
    core.on_ask(1, A, -1.0, 0.0, wish=wish(16))
    core.on_loaded(A, 1, 0.0)
    core.on_end(1, 1.0)
    ask(core, 2, 40, digest=B)
    core.on_loaded(B, 1, 2.0)
    assert core.on_ask(3, A, core.keep_alive_s(A, 300.0), 2.0, wish=wish(50)) == [Unload(A)]
    assert (core.keep_alive_s(A, 300.0), core.context_tokens(A)) == (-1.0, 16)  # on its way out
    assert core.on_unloaded(A, 3.0) == []
    assert (core.keep_alive_s(A, 300.0), core.context_tokens(A)) == (-1.0, 16)  # waiting for room
    assert core.on_end(2, 4.0) == [Unload(B)]
    assert core.on_unloaded(B, 5.0) == [Load(A, 50)]
    assert (core.keep_alive_s(A, 300.0), core.context_tokens(A)) == (-1.0, 50)
    core.on_unload(A, 6.0)
    assert (core.keep_alive_s(A, 300.0), core.context_tokens(A)) == (300.0, None)


def test_one_that_is_loaded_anew_lets_models_that_others_wait_for_go_first() -> None:
    core = loaded(16, room=Room(60, 60))
    assert ask(core, 1, 16) == [Start(1)]
    assert ask(core, 2, 16) == []
    assert ask(core, 3, 30, digest=B) == []
    assert ask(core, 4, 32) == []
    assert core.on_end(1, 5.0) == [Unload(A)]
    assert core.on_unloaded(A, 6.0) == [Load(B, 30)]
    assert core.on_loaded(B, 1, 7.0) == [Start(3)]
    assert core.on_end(3, 8.0) == [Unload(B)]
    assert core.on_unloaded(B, 9.0) == [Load(A, 32)]


def test_what_can_never_fit_is_refused_and_what_is_loaded_stays() -> None:
    core = loaded(16)
    with pytest.raises(EngineUnavailable, match="a smaller num_ctx"):
        ask(core, 1, 101)
    assert ask(core, 2, 16) == [Start(2)]
    assert core.room_for(A) == 100


def test_room_for_a_model_is_what_models_in_use_leave() -> None:
    core = loaded(16)
    ask(core, 1, 30, digest=B)
    assert core.room_for(A) == 50  # it loads
    core.on_loaded(B, 1, 1.0)
    assert core.room_for(A) == 50  # it runs
    core.on_end(1, 2.0)
    assert core.room_for(A) == 100
    assert core_of(Room()).room_for(A) is None


def test_who_is_content_with_less_has_it_where_a_load_fails_and_who_is_not_hears_so() -> None:
    core = loaded(16)
    assert ask(core, 1, 64, 16) == [Unload(A)]
    assert ask(core, 2, 16) == []
    assert ask(core, 3, 64) == []
    assert core.on_unloaded(A, 4.0) == [Load(A, 64)]
    assert core.on_load_failed(A, 5.0) == [Fail(3), Load(A, 16)]
    assert core.on_loaded(A, 2, 6.0) == [Start(1), Start(2)]
    core.on_end(1, 7.0)
    assert ask(core, 8, 80, 16) == [Start(8)]  # it failed a moment ago
    core.on_end(8, 8.0)
    with pytest.raises(EngineUnavailable, match="could not be loaded with a context of 64 tokens"):
        ask(core, 9, 64)
    assert ask(core, 10, 32) == []


def test_a_load_that_fails_twice_fails_all_who_wait() -> None:
    core = core_of()
    ask(core, 1, 64, 32)
    ask(core, 2, 16)
    assert core.on_load_failed(A, 3.0) == [Load(A, 32)]
    assert core.on_load_failed(A, 4.0) == [Fail(1), Fail(2)]
    assert ask(core, 5, 64, 32) == [Load(A, 64)]  # later it may be another story


def test_a_failed_context_is_forgotten_when_nobody_waits_or_the_model_has_left() -> None:
    core = core_of()
    ask(core, 1, 64, 32)
    core.on_load_failed(A, 1.0)
    core.on_unload(A, 2.0)
    core.on_end(1, 2.0)
    core.on_unloaded(A, 3.0)
    assert ask(core, 4, 64) == [Load(A, 64)]


# --- whatever happens ------------------------------------------------------------------------------------------------


class World:
    """Does what the core asks for, and checks that nothing impossible or unjust is asked for."""

    def __init__(self) -> None:
        self.core = core_of()
        self.wishes: dict[int, Wish] = {}
        self.digests: dict[int, Sha256] = {}
        self.waiting: set[int] = set()
        self.running: set[int] = set()
        self.phase: dict[Sha256, str] = {}
        self.tokens: dict[Sha256, int] = {}
        self.bereft: set[int] = set()  # that run on a model which crashed
        self.loads = 0
        self.now = 0.0

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Load(digest, tokens):
                    assert digest not in self.phase
                    asked = [self.wishes[ask] for ask in self.waiting if self.digests[ask] == digest]
                    assert tokens in {each for w in asked for each in (w.best.tokens, w.least.tokens)}
                    self.phase[digest], self.tokens[digest] = "loading", tokens
                    self.loads += 1
                case Unload(digest):
                    users = {ask for ask in self.running - self.bereft if self.digests[ask] == digest}
                    assert not users  # what runs ends undisturbed
                    self.phase[digest] = "unloading"
                case Start(ask):
                    digest = self.digests[ask]
                    assert self.phase[digest] == "loaded"
                    assert self.wishes[ask].least.tokens <= self.tokens[digest]
                    self.waiting.remove(ask)
                    self.running.add(ask)
                case Fail(ask):
                    self.waiting.remove(ask)

    def ask(self, digest: Sha256, best: int, least: int | None = None, who: str | None = None) -> int:
        return self.ask_for(digest, wish(best, least), who)

    def ask_for(self, digest: Sha256, wanted: Wish, who: str | None = None) -> int:
        number = len(self.wishes)
        self.wishes[number], self.digests[number] = wanted, digest
        self.waiting.add(number)
        try:
            requester = PeerId(who) if who else None
            self.perform(
                self.core.on_ask(number, digest, 10.0, self.now, requester=requester, wish=self.wishes[number])
            )
        except (Busy, EngineUnavailable):
            self.waiting.remove(number)
        return number

    def end(self, ask: int) -> None:
        self.waiting.discard(ask)
        self.running.discard(ask)
        self.perform(self.core.on_end(ask, self.now))

    def finish(self, digest: Sha256, well: bool = True) -> None:
        if self.phase.get(digest) == "loading" and well:
            self.phase[digest] = "loaded"
            self.perform(self.core.on_loaded(digest, 2, self.now, None, self.tokens[digest]))
        elif self.phase.get(digest) == "loading":
            del self.phase[digest]
            self.perform(self.core.on_load_failed(digest, self.now))
        elif self.phase.get(digest) == "unloading":
            del self.phase[digest]
            self.perform(self.core.on_unloaded(digest, self.now))

    def crash(self, digest: Sha256) -> None:
        if self.phase.get(digest) == "loaded":
            self.bereft |= {ask for ask in self.running if self.digests[ask] == digest}
            self.perform(self.core.on_crashed(digest, self.now))

    def step(self) -> None:
        """Everything that is under way ends well."""
        self.now += 1
        for digest in tuple(self.phase):
            self.finish(digest)
        self.now += 1  # turns are shared out by time
        for ask in tuple(self.running):
            self.end(ask)


EVENTS: dict[str, Callable[[World, Sha256, int], object]] = {
    "ask": lambda world, digest, pick: world.ask(digest, 8 * (pick + 1)),
    "ask of a peer": lambda world, digest, pick: world.ask(digest, 8 * (pick + 1), min(16, 8 * (pick + 1)), "peer"),
    "end": lambda world, digest, pick: world.end(pick),
    "finish": lambda world, digest, pick: world.finish(digest),
    "fail": lambda world, digest, pick: world.finish(digest, well=False),
    "crash": lambda world, digest, pick: world.crash(digest),
    "unload": lambda world, digest, pick: world.perform(world.core.on_unload(digest, world.now)),
    "tick": lambda world, digest, pick: world.perform(world.core.tick(world.now)),
}
Events = st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.sampled_from((A, B)), st.integers(0, 12)), max_size=60)


def play(events: list[tuple[str, Sha256, int]]) -> World:
    world = World()
    for event, digest, pick in events:
        world.now += 1
        EVENTS[event](world, digest, pick)
        assert (world.core.queued, world.core.running) == (len(world.waiting), len(world.running))
        assert not world.core._regrowing or world.waiting
        assert not world.core._ceilings or world.waiting or world.phase
    return world


@given(Events)
@settings(max_examples=200)
def test_nothing_that_runs_is_disturbed_and_all_are_served_with_what_they_are_content_with(
    events: list[tuple[str, Sha256, int]],
) -> None:
    world = play(events)
    for _ in range(200):
        if not world.waiting and not world.running:
            break
        world.step()
    assert not world.waiting
    assert not world.running


@given(Events, st.sampled_from((A, B)), st.integers(1, 60))
@settings(max_examples=100)
def test_nobody_waits_for_ever_however_the_numbers_of_others_creep_up(
    events: list[tuple[str, Sha256, int]], digest: Sha256, tokens: int
) -> None:
    world = play(events)
    waits = world.ask(digest, tokens)
    for more in range(400):
        if waits not in world.waiting:
            return
        for number in range(3):  # peers, more than it has slots, each of which wants more than all before it
            world.ask_for(A, Wish(Context(1000 + more, Need(FILE, 40)), context(16)), f"peer {number}")
        world.step()
    raise AssertionError("it still waits")


def test_one_that_is_loaded_anew_again_and_again_keeps_no_other_model_out() -> None:
    world = World()
    world.ask(A, 8)
    world.step()
    waits = -1
    for more in range(20):
        for number in range(3):
            world.ask_for(A, Wish(Context(1000 + more, Need(FILE, 40)), context(16)), f"peer {number}")
        waits = world.ask(B, 60) if more == 3 else waits
        world.step()
    assert waits not in world.waiting


def test_a_batch_ask_that_fits_is_served_where_the_others_do_not() -> None:
    core = core_of()
    ask(core, 1, 16)
    core.on_ask(2, A, 10.0, 2.0, wish=wish(16), priority="batch")
    ask(core, 3, 64)
    assert core.on_loaded(A, 2, 4.0) == [Start(1), Start(2)]


@given(st.lists(st.integers(8, 60), min_size=1, max_size=30))
def test_those_who_wait_together_wait_for_one_load(contexts: list[int]) -> None:
    world = World()
    world.ask(A, 8)
    world.finish(A)
    for tokens in contexts:
        world.ask(A, tokens)
    most = max(contexts)
    while world.waiting or world.running:
        world.step()
    assert world.loads == 1 + (most > 8)
    assert world.tokens[A] == most
    assert world.core.deadline() < math.inf
