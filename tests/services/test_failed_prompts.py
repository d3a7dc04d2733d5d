"""Prompts that fail are gone when they have failed: a peer looks for garbage seldom, and each of them may be large."""

import pytest
import trio
import trio.testing

from meshmax.base.errors import ContextTooLong
from meshmax.base.inference import GenerateRequest
from meshmax.testing.garbage import collector_off
from tests.services.infer_site import ask, open_site


@pytest.mark.parametrize("here", [True, False])
async def test_a_prompt_that_fails_is_not_kept_by_its_error(here: bool, autojump_clock: trio.testing.MockClock) -> None:
    async def fail() -> None:
        with pytest.raises(ContextTooLong):
            async with site[0].router.open_answer(ask(GenerateRequest("word " * 60_000))):
                pass
        await trio.sleep(1)

    async with open_site(2) as site:
        if not here:
            site[0].has.clear()
        await fail()  # what the first of its kind makes for all
        with collector_off() as left:
            for _ in range(3):
                await fail()
    assert not left.buffers
    assert not left.rings
