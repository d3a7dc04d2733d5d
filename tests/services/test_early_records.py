"""What is told of prompts before the router has them: their waits, their refusals, and that they are the same prompts then."""

from contextlib import ExitStack

import pytest
import trio

from meshmax.base.errors import NotFound
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.route import Attempt, Route, Wait
from meshmax.services.early_records import EARLY_KEPT, MAX_MODEL, NO_WAIT_S, Early, EarlyRecords
from tests.services.test_route_records import holds

EARLY = Early("r1", "m")
ROUTED = Route("r1", Sha256("ab" * 32), PeerId("a"), "a: near", started_at_s=1002.0, total_s=1.0, state="done")


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def unix(self) -> float:
        return 1000.0 + self.s


def made() -> tuple[EarlyRecords, Clock]:
    clock = Clock()
    return EarlyRecords(clock.unix, clock), clock


def test_one_that_waits_is_told_from_its_first_moment() -> None:
    records, clock = made()
    with records.begun(EARLY) as record, record.waiting("attic is looked for"):
        clock.s = 2.0
        told = records.find("r1")
        assert told is not None
        assert (told.state, told.started_at_s, told.waits) == (
            "running",
            1000.0,
            (Wait(0.0, None, "attic is looked for"),),
        )


def test_one_that_the_router_has_is_told_by_it_and_later_by_its_wait() -> None:
    records, clock = made()
    with records.begun(EARLY) as record, record.waiting("why"):
        clock.s = 2.0
    assert records.find("r1") is None
    told = records.told(ROUTED)
    assert (told.started_at_s, told.total_s, told.waits) == (1000.0, 3.0, (Wait(0.0, 2.0, "why"),))
    assert records.routes((ROUTED,)) == (told,)
    other = Route("r2", Sha256("ab" * 32), PeerId("a"), "a: near")
    assert records.told(other) is other


def test_one_that_found_its_model_at_once_leaves_nothing() -> None:
    records, clock = made()
    with records.begun(EARLY) as record, record.waiting("why"):
        clock.s = NO_WAIT_S / 2
    assert records.told(ROUTED) is ROUTED
    assert records.routes((ROUTED,)) == (ROUTED,)


def test_a_refusal_is_kept_by_its_words_alone() -> None:
    records, clock = made()

    def refuse(prompt: str) -> None:
        clock.s = 3.0
        raise NotFound(f"model 'm' not found, {len(prompt)}\n")

    with pytest.raises(NotFound), records.begun(EARLY):
        refuse("a prompt of some words")
    told = records.find("r1")
    assert told is not None
    assert (told.state, told.error, told.message, told.total_s) == (
        "failed",
        "not_found",
        "model 'm' not found, 22?",
        3.0,
    )
    assert told.line == "nobody was asked: not_found"
    assert not holds(records, "a prompt of some words")


def test_one_that_waited_and_was_refused_then_keeps_its_wait() -> None:
    records, clock = made()
    with records.begun(EARLY) as record, record.waiting("why"):
        clock.s = 2.0
    records.refused(EARLY, NotFound("no"))
    told = records.find("r1")
    assert told is not None
    assert (told.total_s, told.waits) == (2.0, (Wait(0.0, 2.0, "why"),))


async def test_one_whose_client_left_was_not_refused(autojump_clock: trio.testing.MockClock) -> None:
    records = EarlyRecords(trio.current_time, trio.current_time)
    with trio.move_on_after(2), records.begun(EARLY) as record, record.waiting("why"):
        await trio.sleep(60)
    told = records.find("r1")
    assert told is not None
    assert (told.state, told.error) == ("cancelled", "")


def test_a_later_try_under_the_same_id_has_no_part_in_what_came_before() -> None:
    records, clock = made()
    records.refused(EARLY, NotFound("no"))
    records.on_known("r1")
    assert records.find("r1") is None
    records.refused(EARLY, NotFound("no"))
    clock.s = 5.0
    records.refused(EARLY, NotFound("again"))
    told = records.find("r1")
    assert told is not None
    assert (told.message, told.started_at_s) == ("again", 1005.0)


def test_names_and_numbers_of_them_are_bounded() -> None:
    records, _ = made()
    for number in range(EARLY_KEPT + 3):
        records.refused(Early(f"r{number}", "m" * 1000), NotFound("x" * 100_000))
    told = records.routes(())
    assert len(told) == EARLY_KEPT
    assert all(len(each.model) == MAX_MODEL and len(each.message) <= 2000 for each in told)


def test_attempts_of_the_router_come_later_too() -> None:
    records, clock = made()
    with records.begun(EARLY) as record, record.waiting("why"):
        clock.s = 2.0
    routed = Route(
        "r1", Sha256("ab" * 32), PeerId("a"), "a", attempts=(Attempt(PeerId("a"), at_s=0.5),), first_token_s=0.7
    )
    told = records.told(routed)
    assert (told.attempts[0].at_s, told.first_token_s, told.total_s) == (2.5, 2.7, None)


def test_a_try_that_ends_at_once_forgets_no_newer_one_under_its_id() -> None:
    records, _ = made()
    with ExitStack() as newer:
        with records.begun(EARLY):
            record = newer.enter_context(records.begun(EARLY))  # the client came again meanwhile
            newer.enter_context(record.waiting("attic is looked for"))
        told = records.find("r1")
        assert told is not None
        assert told.state == "running"
