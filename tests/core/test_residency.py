"""Playbooks of the residency core: what it asks for, event by event."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import Busy
from meshmax.base.ids import Sha256
from meshmax.core.fair_queue import FairQueue
from meshmax.core.residency import (
    Action,
    Fail,
    Load,
    ResidencyCore,
    Start,
    Unload,
)

A, B, C = (Sha256(letter * 64) for letter in "abc")


def core_of(max_queue: int, max_loaded: int = 3) -> ResidencyCore:
    return ResidencyCore(FairQueue(max_queue, max_per_member=64, max_wait_s=600.0), max_loaded)


def loaded(core: ResidencyCore, digest: Sha256, ask: int, now: float = 0.0, parallel: int = 1) -> None:
    assert core.on_ask(ask, digest, 10.0, now) == [Load(digest)]
    assert core.on_loaded(digest, parallel, now) == [Start(ask)]


def test_a_load_is_asked_for_once_however_many_wait() -> None:
    core = core_of(10)
    assert core.on_ask(1, A, 10, 0.0) == [Load(A)]
    assert core.on_ask(2, A, 10, 0.0) == []
    assert core.on_loaded(A, 2, 1.0) == [Start(1), Start(2)]


def test_asks_beyond_the_slots_wait_in_order() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    assert core.on_ask(2, A, 10, 0.0) == []
    assert core.on_ask(3, A, 10, 0.0) == []
    assert (core.running, core.queued) == (1, 2)
    assert core.on_end(1, 1.0) == [Start(2)]
    assert core.on_end(2, 2.0) == [Start(3)]


def test_one_more_than_the_queue_holds_is_busy_with_ollamas_words() -> None:
    core = core_of(1)
    loaded(core, A, 1)
    core.on_ask(2, A, 10, 0.0)
    with pytest.raises(Busy, match="server busy, please try again\\.  maximum pending requests exceeded"):
        core.on_ask(3, A, 10, 0.0)
    assert core.on_end(2, 0.0) == []
    core.on_ask(4, A, 10, 0.0)


def test_who_goes_away_while_waiting_is_not_started() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    core.on_ask(2, A, 10, 0.0)
    core.on_ask(3, A, 10, 0.0)
    assert core.on_end(2, 0.5) == []
    assert core.on_end(1, 1.0) == [Start(3)]
    assert core.on_end(1, 1.0) == []


def test_an_idle_model_goes_when_its_latest_keep_alive_is_over() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    assert core.deadline() == math.inf
    core.on_end(1, 5.0)
    assert core.deadline() == 15.0
    assert core.tick(14.9) == []
    assert core.tick(15.0) == [Unload(A)]
    assert core.snapshot() == ()


def test_a_negative_keep_alive_is_for_ever_and_zero_is_at_once() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    core.on_ask(2, A, -1, 0.0)
    core.on_end(1, 1.0)
    core.on_end(2, 1.0)
    assert core.deadline() == math.inf
    core.on_ask(3, A, 0, 2.0)
    assert core.on_end(3, 3.0) == [Unload(A)]


def test_the_idle_model_used_longest_ago_makes_room() -> None:
    core = core_of(10, max_loaded=2)
    loaded(core, A, 1)
    loaded(core, B, 2)
    core.on_end(2, 1.0)
    core.on_end(1, 2.0)
    assert core.on_ask(3, C, 10, 3.0) == [Unload(B)]
    assert core.on_unloaded(B, 4.0) == [Load(C)]


def test_a_busy_model_makes_room_when_its_answers_have_ended_and_takes_no_new_ones_before() -> None:
    core = core_of(10, max_loaded=1)
    loaded(core, A, 1, parallel=4)
    assert core.on_ask(2, B, 10, 1.0) == []
    assert core.on_ask(3, A, 10, 1.0) == []
    assert core.on_end(1, 2.0) == [Unload(A)]
    assert core.on_unloaded(A, 3.0) == [Load(B)]
    assert core.on_loaded(B, 1, 4.0) == [Start(2)]
    assert core.on_end(2, 5.0) == [Unload(B)]
    assert core.on_unloaded(B, 6.0) == [Load(A)]


def test_a_load_that_failed_fails_those_who_wait_for_it_and_nobody_else() -> None:
    core = core_of(10)
    core.on_ask(1, A, 10, 0.0)
    core.on_ask(2, B, 10, 0.0)
    core.on_ask(3, A, 10, 0.0)
    assert core.on_load_failed(A, 1.0) == [Fail(1), Fail(3)]
    assert core.on_loaded(B, 1, 1.0) == [Start(2)]
    assert core.on_ask(4, A, 10, 2.0) == [Load(A)]


def test_after_a_crash_those_who_wait_load_it_anew() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    core.on_ask(2, A, 10, 0.0)
    assert core.on_crashed(A, 1.0) == [Unload(A)]
    assert core.on_crashed(A, 1.0) == []
    assert core.on_end(1, 1.0) == []
    assert core.on_unloaded(A, 1.0) == [Load(A)]


def test_unloading_waits_for_running_answers_and_gives_a_load_up_at_once() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    assert core.on_unload(A, 1.0) == []
    assert core.on_end(1, 2.0) == [Unload(A)]
    core.on_ask(2, B, 10, 2.0)
    assert core.on_unload(B, 2.0) == [Unload(B)]
    assert core.on_unload(C, 2.0) == []
    assert core.on_loaded(B, 1, 2.0) == []
    assert core.on_unloaded(B, 3.0) == [Load(B)]


def test_a_load_only_ask_needs_no_slot() -> None:
    core = core_of(10)
    loaded(core, A, 1)
    assert core.on_ask(2, A, 10, 0.0, takes_slot=False) == [Start(2)]


class World:
    """Does what the core asks for, and checks that it asks for nothing impossible."""

    def __init__(self) -> None:
        self.core = core_of(4, max_loaded=2)
        self.waiting: set[int] = set()
        self.running: set[int] = set()
        self.asked: dict[int, Sha256] = {}
        self.phase: dict[Sha256, str] = {}
        self.now = 0.0

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Load(digest):
                    assert digest not in self.phase
                    self.phase[digest] = "loading"
                case Unload(digest):
                    assert self.phase[digest] in ("loading", "loaded")
                    self.phase[digest] = "unloading"
                case Start(ask):
                    assert self.phase[self.asked[ask]] == "loaded"
                    self.waiting.remove(ask)
                    self.running.add(ask)
                case Fail(ask):
                    self.waiting.remove(ask)

    def ask(self, digest: Sha256, keep_alive_s: float) -> None:
        number = len(self.asked)
        self.asked[number] = digest
        self.waiting.add(number)
        try:
            actions = self.core.on_ask(number, digest, keep_alive_s, self.now)
        except Busy:
            self.waiting.remove(number)
        else:
            self.perform(actions)

    def end(self, ask: int) -> None:
        self.waiting.discard(ask)
        self.running.discard(ask)
        self.perform(self.core.on_end(ask, self.now))

    def finish_load(self, digest: Sha256, well: bool = True) -> None:
        if self.phase.get(digest) == "loading" and well:
            self.phase[digest] = "loaded"
            self.perform(self.core.on_loaded(digest, 2, self.now))
        elif self.phase.get(digest) == "loading":
            del self.phase[digest]
            self.perform(self.core.on_load_failed(digest, self.now))

    def finish_unload(self, digest: Sha256) -> None:
        if self.phase.get(digest) == "unloading":
            del self.phase[digest]
            self.perform(self.core.on_unloaded(digest, self.now))

    def crash(self, digest: Sha256) -> None:
        if self.phase.get(digest) == "loaded":
            self.perform(self.core.on_crashed(digest, self.now))

    def serve_everybody(self) -> None:
        for _ in range(200):
            if not self.waiting and not self.running:
                return
            self.now += 1
            for digest in tuple(self.phase):
                self.finish_load(digest)
                self.finish_unload(digest)
            for ask in tuple(self.running):
                self.end(ask)
        raise AssertionError(f"still waiting: {self.waiting}, running: {self.running}")


EVENTS: dict[str, Callable[[World, Sha256, int], object]] = {
    "ask": lambda world, digest, pick: world.ask(digest, float(pick - 1)),
    "end": lambda world, digest, pick: world.end(pick),
    "loaded": lambda world, digest, pick: world.finish_load(digest),
    "failed": lambda world, digest, pick: world.finish_load(digest, well=False),
    "crashed": lambda world, digest, pick: world.crash(digest),
    "unload": lambda world, digest, pick: world.perform(world.core.on_unload(digest, world.now)),
    "unloaded": lambda world, digest, pick: world.finish_unload(digest),
    "tick": lambda world, digest, pick: world.perform(world.core.tick(world.now)),
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.sampled_from((A, B, C)), st.integers(0, 12)), max_size=60)
)
def test_whatever_happens_bounds_hold_and_nobody_is_forgotten(events: list[tuple[str, Sha256, int]]) -> None:
    world = World()
    for event, digest, pick in events:
        world.now += 1
        EVENTS[event](world, digest, pick)
        assert len(world.phase) <= 2
        assert (world.core.queued, world.core.running) == (len(world.waiting), len(world.running))
    world.serve_everybody()


def test_an_ask_whose_model_crashed_counts_as_running_until_it_has_ended() -> None:
    world = World()
    world.ask(A, 60.0)
    world.finish_load(A)
    world.crash(A)
    world.finish_unload(A)
    assert world.core.running == 1
    world.end(0)
    assert world.core.running == 0


def test_a_model_that_was_to_give_way_stays_when_nobody_waits_for_its_room_any_more() -> None:
    core = core_of(10, max_loaded=1)
    loaded(core, A, 1, parallel=2)
    assert core.on_ask(2, B, 10, 1.0) == []
    assert core.on_ask(3, A, 10, 2.0) == []  # it takes no new ask, for the sake of the one that waits for B
    assert core.on_end(2, 3.0) == [Start(3)]  # who has left
    assert core.on_ask(4, B, 10, 4.0) == []
    assert core.on_ask(5, C, 10, 5.0) == []
    assert core.on_end(4, 6.0) == []  # C is still waited for
    assert core.on_ask(6, A, 10, 7.0) == []
    assert core.on_end(5, 8.0) == []
    assert core.on_end(1, 9.0) == [Start(6)]
    assert core.on_unload(A, 10.0) == []
    assert core.on_ask(7, A, 10, 11.0) == []  # who wants it out of memory does not take that back
    assert core.on_end(3, 12.0) == []
    assert core.on_end(6, 13.0) == [Unload(A)]
