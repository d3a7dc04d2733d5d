"""What is kept of requests that are over."""

import gc
from types import FunctionType, ModuleType

import trio.testing

from meshmax.base.inference import Delta, Finish
from meshmax.services.route_records import RouteRecord
from tests.services.infer_site import WORDS, ask, open_site, text_of

_ENDS = (type, ModuleType, FunctionType)


def holds(root: object, text: str) -> bool:
    """Whether a text with ``text`` in it can be reached from ``root``."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        one = pending.pop()
        if isinstance(one, str) and text in one:
            return True
        if id(one) not in seen and not isinstance(one, _ENDS):
            seen.add(id(one))
            pending += gc.get_referents(one)
    return False


async def test_the_record_of_a_request_that_is_over_holds_neither_its_prompt_nor_its_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site(2, echo_tokens_per_s=1e6) as site:
        site[0].has.clear()
        async with site[0].router.open_answer(ask(WORDS)) as answer:
            (record,) = site[0].router._records._records
            assert isinstance(record, RouteRecord)
            assert holds(record, WORDS)
            assert await text_of(answer.events) == WORDS
        assert record.route().state == "done"
        assert not holds(record, WORDS)
        assert record._decision is None  # nor the statuses of everybody who had the model


def test_what_is_looked_for_would_be_found() -> None:
    assert holds([{"a": (Delta("one two"), Finish())}], "two")
    assert not holds([{"a": (Delta("one two"), Finish())}], "three")


async def test_what_is_told_of_a_request_under_way_is_made_anew_when_something_has_come_of_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site(2, echo_tokens_per_s=1e6) as site, site[0].router.open_answer(ask(WORDS)) as answer:
        begun = answer.route
        assert answer.route is begun
        await text_of(answer.events)
        assert answer.route.output_tokens > begun.output_tokens
