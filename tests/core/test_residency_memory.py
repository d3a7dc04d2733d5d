"""The residency core where memory is short: what goes, what waits, what is preloaded."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshmax.base.errors import Busy, EngineUnavailable
from meshmax.base.ids import Sha256
from meshmax.core.fair_queue import FairQueue
from meshmax.core.memory import Need, Room
from meshmax.core.residency import Action, Fail, Load, ResidencyCore, Start, Unload

A, B, C, D = (Sha256(letter * 64) for letter in "abcd")
SIZES = {A: 30, B: 40, C: 50, D: 110}
ROOM = Room(100, 120, "this peer has")


def core_of(
    room: Room = ROOM, max_loaded: int = 8, foreign: Callable[[Sha256], bool] = lambda _: False
) -> ResidencyCore:
    core = ResidencyCore(FairQueue(1000, max_per_member=1000, max_wait_s=1e9), max_loaded, foreign)
    core.on_room(room, 0.0)
    for digest, size in SIZES.items():
        core.on_need(digest, Need(size))
    return core


def use(core: ResidencyCore, digest: Sha256, ask: int, now: float) -> None:
    """Load and use the model; it is idle then."""
    assert core.on_ask(ask, digest, 1000.0, now) == [Load(digest)]
    assert core.on_loaded(digest, 1, now) == [Start(ask)]
    core.on_end(ask, now)


def test_models_are_loaded_as_long_as_there_is_memory() -> None:
    core = core_of()
    use(core, A, 1, 0.0)
    use(core, B, 2, 1.0)
    assert core.taken == 70
    assert core.on_ask(3, C, 10, 2.0) == [Unload(A)]
    assert core.on_unloaded(A, 3.0) == [Load(C)]
    assert core.taken == 90


def test_as_many_idle_ones_go_as_it_takes_longest_unused_first() -> None:
    core = core_of()
    for place, digest in enumerate((A, B)):
        use(core, digest, place, float(place))
    assert core.on_ask(3, D, 10, 5.0) == [Unload(A), Unload(B)]
    assert core.on_unloaded(A, 6.0) == []
    assert core.on_unloaded(B, 6.0) == [Load(D)]  # it exceeds the automatic budget, and has it alone


def test_no_more_go_than_it_takes() -> None:
    core = core_of(Room(130, 130))
    for place, digest in enumerate((A, B, C)):
        use(core, digest, place, float(place))
    core.on_need(D, Need(25))
    assert core.on_ask(4, D, 10, 5.0) == [Unload(A)]


def test_one_in_use_is_waited_for_and_takes_no_new_ask_meanwhile() -> None:
    core = core_of()
    core.on_ask(1, C, 10, 0.0)
    core.on_loaded(C, 4, 0.0)
    use(core, A, 2, 1.0)
    core.on_need(B, Need(90))
    assert core.on_ask(3, B, 10, 2.0) == [Unload(A)]
    assert core.on_ask(4, C, 10, 3.0) == []
    assert core.on_unloaded(A, 3.0) == []
    assert core.on_end(1, 4.0) == [Unload(C)]
    assert core.on_unloaded(C, 5.0) == [Load(B)]


def test_a_model_that_is_always_asked_for_does_not_keep_another_one_out() -> None:
    core, asks = core_of(Room(60, 60)), iter(range(100, 1000))
    core.on_ask(1, A, 10, 0.0)
    core.on_loaded(A, 1, 0.0)
    core.on_ask(2, A, 10, 0.0)
    core.on_ask(3, B, 10, 1.0)
    core.on_ask(next(asks), A, 10, 2.0)
    assert core.on_end(1, 3.0) == [Unload(A)]
    assert core.on_unloaded(A, 4.0) == [Load(B)]
    assert core.on_loaded(B, 1, 5.0) == [Start(3)]
    assert core.on_end(3, 6.0) == [Unload(B)]
    assert core.on_unloaded(B, 7.0) == [Load(A)]


def test_a_small_model_does_not_slip_in_before_a_large_one_that_waits() -> None:
    core = core_of()
    core.on_ask(1, B, 10, 0.0)
    core.on_loaded(B, 1, 0.0)
    core.on_need(C, Need(90))
    assert core.on_ask(2, C, 10, 1.0) == []
    assert core.on_ask(3, A, 10, 2.0) == []
    assert core.on_end(1, 3.0) == [Unload(B)]
    assert core.on_unloaded(B, 4.0) == [Load(C)]


def test_what_can_never_fit_is_refused_at_once_and_says_why() -> None:
    core = core_of(Room(60, 60, "engine.memory is"))
    with pytest.raises(EngineUnavailable, match=r"needs about 110 B .* engine.memory is 60 B"):
        core.on_ask(1, D, 10, 0.0)
    assert core.queued == 0
    use(core, A, 2, 1.0)


def test_the_number_of_models_is_bounded_too() -> None:
    core = core_of(Room(), max_loaded=2)
    use(core, A, 1, 0.0)
    use(core, B, 2, 1.0)
    assert core.on_ask(3, C, 10, 2.0) == [Unload(A)]


def test_models_in_the_memory_of_others_engines_take_none_and_give_way_to_none() -> None:
    core = core_of(foreign=lambda digest: digest in (C, D))
    use(core, C, 1, 0.0)
    use(core, D, 2, 0.0)
    use(core, A, 3, 1.0)
    use(core, B, 4, 2.0)
    assert core.taken == 70
    assert core.needs() == (Need(30), Need(40))


def test_a_load_that_took_more_than_was_thought_costs_idle_ones_their_place() -> None:
    core = core_of()
    use(core, A, 1, 0.0)
    core.on_ask(2, B, 10, 1.0)
    assert core.on_loaded(B, 1, 2.0, Need(90)) == [Start(2), Unload(A)]
    assert core.on_unloaded(A, 3.0) == []
    core.on_end(2, 4.0)
    assert len(core.snapshot()) == 1  # though it alone


def test_where_other_programs_take_memory_idle_ones_go_and_running_ones_stay() -> None:
    core = core_of()
    core.on_ask(1, B, 10, 0.0)
    core.on_loaded(B, 1, 0.0)
    use(core, A, 2, 1.0)
    assert core.on_room(Room(20, 120), 2.0) == [Unload(A)]
    assert core.on_room(Room(0, 120), 3.0) == []
    assert core.on_end(1, 4.0) == []


# --- preloading ------------------------------------------------------------------------------------------------------


def test_what_is_preloaded_takes_free_room_only() -> None:
    core = core_of()
    use(core, C, 1, 0.0)
    assert core.on_preload(2, B, 10, 1.0) == [Load(B)]
    assert core.on_preload(3, A, 10, 1.0) is None
    assert core.on_preload(4, B, 10, 1.0) is None
    assert core_of(Room(100, 120)).on_preload(5, D, 10, 0.0) is None  # one alone may exceed the budget, but not so


def test_what_is_preloaded_takes_no_room_that_somebody_waits_for() -> None:
    core = core_of()
    core.on_ask(1, C, 10, 0.0)
    core.on_loaded(C, 1, 0.0)
    core.on_need(D, Need(60))
    core.on_ask(2, D, 10, 1.0)
    assert core.on_preload(3, A, 10, 2.0) is None


def test_what_is_preloaded_goes_first_until_somebody_has_used_it() -> None:
    for used in (False, True):
        core = core_of()
        use(core, B, 1, 0.0)
        core.on_preload(2, A, 1000, 5.0)
        assert core.on_loaded(A, 1, 6.0) == [Start(2)]
        core.on_end(2, 6.0)
        if used:
            assert core.on_ask(3, A, 1000, 6.0) == [Start(3)]
            core.on_end(3, 6.0)
        assert core.on_ask(4, C, 10, 7.0) == [Unload(B if used else A)]


def test_what_is_preloaded_goes_when_its_keep_alive_is_over() -> None:
    core = core_of()
    core.on_preload(1, A, 10, 0.0)
    core.on_loaded(A, 1, 2.0)
    core.on_end(1, 2.0)
    assert core.tick(12.0) == [Unload(A)]


# --- whatever happens ------------------------------------------------------------------------------------------------


class World:
    """Does what the core asks for, and checks that it asks for nothing impossible."""

    def __init__(self) -> None:
        self.core = core_of()
        self.budget = 100
        self.asked: dict[int, Sha256] = {}
        self.waiting: set[int] = set()
        self.running: set[int] = set()
        self.phase: dict[Sha256, str] = {}
        self.took = dict(SIZES)
        self.bereft: set[int] = set()  # that run on a model which crashed
        self.now = 0.0

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Load(digest):
                    others = sum(self.took[other] for other in self.phase)
                    assert digest not in self.phase
                    assert not self.phase or others + SIZES[digest] <= self.budget
                    self.phase[digest], self.took[digest] = "loading", SIZES[digest]
                case Unload(digest):
                    users = {ask for ask in self.running - self.bereft if self.asked[ask] == digest}
                    assert not users
                    self.phase[digest] = "unloading"
                case Start(ask):
                    assert self.phase[self.asked[ask]] == "loaded"
                    self.waiting.remove(ask)
                    self.running.add(ask)
                case Fail(ask):
                    self.waiting.remove(ask)

    def ask(self, digest: Sha256, keep_alive_s: float = 10.0) -> int:
        number = len(self.asked)
        self.asked[number] = digest
        self.waiting.add(number)
        self.core.on_need(digest, Need(SIZES[digest]))
        try:
            self.perform(self.core.on_ask(number, digest, keep_alive_s, self.now))
        except (Busy, EngineUnavailable):
            self.waiting.remove(number)
        return number

    def preload(self, digest: Sha256) -> None:
        number = len(self.asked)
        before = dict(self.phase)
        actions = self.core.on_preload(number, digest, 10.0, self.now)
        if actions is not None:
            assert actions == [Load(digest)]
            assert sum(self.took[other] for other in before) + SIZES[digest] <= self.budget
            self.asked[number] = digest
            self.waiting.add(number)
            self.perform(actions)

    def end(self, ask: int) -> None:
        self.waiting.discard(ask)
        self.running.discard(ask)
        self.perform(self.core.on_end(ask, self.now))

    def finish(self, digest: Sha256, extra: int = 0) -> None:
        if self.phase.get(digest) == "loading":
            self.phase[digest] = "loaded"
            self.took[digest] = SIZES[digest] + extra
            self.perform(self.core.on_loaded(digest, 2, self.now, Need(self.took[digest])))
        elif self.phase.get(digest) == "unloading":
            del self.phase[digest]
            self.perform(self.core.on_unloaded(digest, self.now))

    def crash(self, digest: Sha256) -> None:
        if self.phase.get(digest) == "loaded":
            self.bereft |= {ask for ask in self.running if self.asked[ask] == digest}
            self.perform(self.core.on_crashed(digest, self.now))

    def resize(self, budget: int) -> None:
        self.budget = budget
        self.perform(self.core.on_room(Room(budget, 120), self.now))

    def step(self) -> None:
        """Everything that is under way ends."""
        self.now += 1
        for digest in tuple(self.phase):
            self.finish(digest)
        for ask in tuple(self.running):
            self.end(ask)


EVENTS: dict[str, Callable[[World, Sha256, int], object]] = {
    "ask": lambda world, digest, pick: world.ask(digest, float(pick - 1)),
    "end": lambda world, digest, pick: world.end(pick),
    "finish": lambda world, digest, pick: world.finish(digest),
    "surprise": lambda world, digest, pick: world.finish(digest, extra=10 * pick),
    "crash": lambda world, digest, pick: world.crash(digest),
    "unload": lambda world, digest, pick: world.perform(world.core.on_unload(digest, world.now)),
    "preload": lambda world, digest, pick: world.preload(digest),
    "resize": lambda world, digest, pick: world.resize(10 * pick),
    "tick": lambda world, digest, pick: world.perform(world.core.tick(world.now)),
}
Events = st.lists(
    st.tuples(st.sampled_from(sorted(EVENTS)), st.sampled_from((A, B, C, D)), st.integers(0, 12)), max_size=60
)


@given(Events)
@settings(max_examples=200)
def test_nothing_that_runs_is_unloaded_and_no_load_exceeds_the_budget_and_all_are_served(
    events: list[tuple[str, Sha256, int]],
) -> None:
    world = World()
    for event, digest, pick in events:
        world.now += 1
        EVENTS[event](world, digest, pick)
        assert (world.core.queued, world.core.running) == (len(world.waiting), len(world.running))
        assert world.core.taken == sum(world.took[digest] for digest in world.phase)
    for _ in range(100):
        world.step()
    assert not world.waiting
    assert not world.running


@given(Events, st.sampled_from((B, C, D)))
@settings(max_examples=100)
def test_nobody_waits_for_ever_however_busy_another_model_is(
    events: list[tuple[str, Sha256, int]], wanted: Sha256
) -> None:
    world = World()
    for event, digest, pick in events:
        world.now += 1
        EVENTS[event](world, digest, pick)
    waits = world.ask(wanted)
    for _ in range(200):
        if waits not in world.waiting:
            return
        for _ in range(3):  # more than it has slots, so that some wait for it all the time
            world.ask(A)
        world.step()
    raise AssertionError("it still waits")
