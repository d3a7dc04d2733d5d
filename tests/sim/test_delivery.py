"""Real nodes in virtual time: peers are killed and frozen at random moments under streams that go through one of them."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.config import EngineConfig
from meshmax.base.inference import Ask, ChatRequest, Delta, Finish, GenerateRequest, Message, Moved
from meshmax.base.route import Wishes
from meshmax.node import Node
from tests.sim.site import Site, online, open_site, pull, until

ENGINE = EngineConfig(kind="echo", echo_tokens_per_s=20, parallel=16)
WORDS = " ".join(f"word{n}" for n in range(80))


async def mesh(site: Site, names: str) -> tuple[Node, list[Node]]:
    """An entry peer without the model, and the others, which have it."""
    entry, *others = [await site.node(name, ENGINE) for name in names]
    await until(lambda: all(len(online(node)) == len(names) - 1 for node in (entry, *others)))
    await site.add(others[0], "m", 1 << 20)
    for node in others[1:]:
        await until(lambda node=node: len(node.catalog.entries()) == 1)  # type: ignore[misc]
        await pull(node, "m")
    await until(lambda: len(entry.catalog.resolve("m").entry.holders) == len(others))
    return entry, others


async def stream(entry: Node, number: int, gaps: list[float]) -> int:
    """Ask; the answer must be whole. How often it moved."""
    request = GenerateRequest(WORDS) if number % 2 else ChatRequest((Message("user", WORDS),))
    digest = entry.catalog.resolve("m").digest
    text, moved, at = [], 0, [trio.current_time()]
    last: object = None
    async with entry.router.open_answer(Ask(f"r{number}", digest, "m", request), Wishes()) as answer:
        async for event in answer.events:
            at.append(trio.current_time())
            last = event
            moved += isinstance(event, Moved)
            if isinstance(event, Delta):
                text.append(event.text)
    assert "".join(text) == WORDS
    assert isinstance(last, Finish)
    assert last.output_tokens == 80
    gaps.append(max(after - before for before, after in pairwise(at)))
    return moved


@pytest.mark.parametrize("seed", range(2))
async def test_kills_and_freezes_at_random_moments_leave_every_answer_whole_and_byte_equal(
    seed: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    chance = random.Random(seed)
    async with open_site(tmp_path) as site:
        entry, others = await mesh(site, "abcdef")
        gaps: list[float] = []
        moves = 0

        async def one(number: int) -> None:
            nonlocal moves
            await trio.sleep(number * 0.1)
            moves += await stream(entry, number, gaps)

        def half_way(node: Node) -> bool:
            running = (
                route.attempts[-1] for route in entry.router.routes() if route.state == "running" and route.attempts
            )
            return any(attempt.peer_id == node.peer_id and 0 < attempt.tokens < 60 for attempt in running)

        async def strike(aimed: bool) -> None:
            await trio.sleep(chance.uniform(0.5, 4.5 if not aimed else 3.0))
            node = chance.choice(others)
            if aimed:  # like peers are as good as each other, so that one may answer all
                await until(lambda: any(map(half_way, others)))
                node = next(filter(half_way, others))
            others.remove(node)
            (site.network.kill if chance.random() < 0.5 else site.network.freeze)(node.peer_id)

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(one, number)
            for strikes in range(4):
                nursery.start_soon(strike, strikes == 0)
        assert moves > 0
        assert sorted(gaps)[len(gaps) // 2] < 2.0
        assert max(gaps) < 5.0


async def test_a_peer_that_freezes_for_a_moment_loses_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        entry, others = await mesh(site, "abc")
        gaps: list[float] = []

        async def naps() -> None:
            for _ in range(4):
                await trio.sleep(0.7)
                for node in others:
                    site.network.freeze(node.peer_id)
                await trio.sleep(0.6)
                for node in others:
                    site.network.thaw(node.peer_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(naps)
            for number in range(4):
                nursery.start_soon(stream, entry, number, gaps)
        assert max(gaps) < 2.0
