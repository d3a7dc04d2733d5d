"""Real nodes in virtual time are drained: the mesh knows at once, streams go on elsewhere, their own clients are served."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.config import EngineConfig
from meshmax.base.drain import DrainView
from meshmax.base.errors import Draining, OutOfScope, Refused
from meshmax.base.inference import Ask, Delta, GenerateRequest, Moved, RoutedEvent
from meshmax.base.route import Wishes
from meshmax.node import Node
from tests.sim.site import Site, ask, online, open_site, pull, until

SLOW = EngineConfig(kind="echo", echo_tokens_per_s=10)
WORDS = " ".join(f"word{n}" for n in range(100))
FOREVER_S = 600.0


async def two_holders_and_a_client(site: Site) -> tuple[Node, Node, Node]:
    a, b, c = [await site.node(name, SLOW) for name in "abc"]
    await until(lambda: all(len(online(node)) == 2 for node in (a, b, c)))
    await site.add(a, "m")
    await until(lambda: len(b.catalog.entries()) == 1)
    await pull(b, "m")
    await until(lambda: len(c.catalog.resolve("m").entry.holders) == 2)
    return a, b, c


async def stream(entry: Node, answers: list[tuple[str, int]]) -> None:
    """Ask ``entry``; the text, and how often it moved."""
    digest = entry.catalog.resolve("m").digest
    events: list[RoutedEvent] = []
    async with entry.router.open_answer(Ask("r", digest, "m", GenerateRequest(WORDS))) as answer:
        events += [event async for event in answer.events]
    text = "".join(event.text for event in events if isinstance(event, Delta))
    answers.append((text, sum(isinstance(event, Moved) for event in events)))


def told(node: Node, peer: Node) -> str:
    view = node.presence.view(peer.peer_id)
    return view.state if view else "unknown"


async def test_draining_is_known_everywhere_at_once_and_so_is_its_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await two_holders_and_a_client(site)
        assert await a.draining.drain(a.peer_id, 60.0) == DrainView("drained")
        assert await until(lambda: told(b, a) == told(c, a) == "draining") < 1
        assert a.state == "draining"
        assert await ask(c, "m", "who is it") == ("who is it", "b")
        assert await ask(a, "m", "and here") == ("and here", "b")  # its own clients do not notice
        await a.draining.undrain(a.peer_id)
        assert await until(lambda: told(b, a) == told(c, a) == "online") < 1
        assert str(a.state) == "running"


async def test_every_stream_of_a_drained_peer_comes_whole_to_the_byte(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await two_holders_and_a_client(site)
        answers: list[tuple[str, int]] = []
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(stream, (a, c)[number % 2], answers)
                await trio.sleep(0.3)
            busiest = max((a, b), key=lambda node: node.draining.here.view.running)
            running = busiest.draining.here.view.running
            assert running > 0
            busiest.draining.here.drain(1.0)
            view = await busiest.draining.here.wait_drained()
            assert view.state == "drained"
            assert busiest.residency.load().running == 0
        assert [text for text, _ in answers] == [WORDS] * 8
        assert sum(moved for _, moved in answers) >= view.ended > 0


async def test_a_drained_peer_that_nobody_can_stand_in_for_says_so(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        await site.add(a, "m")
        await a.draining.drain(a.peer_id, 0.0)
        with pytest.raises(Draining, match="is being drained: a"):  # from this very moment
            await ask(a, "m", "hello")
        await trio.sleep(1)
        with pytest.raises(Draining, match="is being drained: a"):
            await ask(a, "m", "hello")
        for route in a.router.routes():
            assert (route.state, route.request_id) == ("failed", "r")
            assert "drain" in route.line
        assert len(a.router.routes()) == 2


async def test_this_peer_alone_is_refused_where_it_is_drained(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, _, _ = await two_holders_and_a_client(site)
        await a.draining.drain(a.peer_id, 0.0)
        digest = a.catalog.resolve("m").digest
        with pytest.raises(Draining):
            async with a.router.open_answer(
                Ask("r", digest, "m", GenerateRequest("hello")), Wishes(policy="local-only")
            ):
                pass


async def test_in_the_open_mesh_nobody_drains_another(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.node("a"), await site.node("b")
        await until(lambda: len(online(a)) == 1)
        with pytest.raises(Refused, match="meshmax mesh new"):
            await a.draining.drain(b.peer_id, 0.0)
        assert b.state == "running"


async def test_a_restart_takes_prompts_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        await a.draining.drain(a.peer_id, 0.0)
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        assert (a.state, a.draining.here.view) == ("running", DrainView())


async def test_a_node_that_ends_waits_for_what_is_under_way_and_says_what(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await two_holders_and_a_client(site)
        await b.draining.drain(b.peer_id, 0.0)
        await until(lambda: told(c, b) == told(a, b) == "draining")
        said: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, c, "m", WORDS)
            nursery.start_soon(ask, a, "m", "few words")
            await trio.sleep(0.15)
            a.draining.begin_end(FOREVER_S)
            assert a.draining.ending
            began = trio.current_time()
            await a.draining.wait_end(lambda own, peers: said.append((own, peers)))
            assert 5 < trio.current_time() - began < 11
        assert said == [(1, 1), (0, 1)]
        with pytest.raises(Refused):
            await a.draining.undrain(a.peer_id)


async def test_a_node_that_ends_waits_no_longer_than_its_deadline(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await two_holders_and_a_client(site)
        await b.draining.drain(b.peer_id, 0.0)
        await until(lambda: told(c, b) == "draining")
        got: list[tuple[str, int]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream, c, got)
            await trio.sleep(1)
            await b.draining.undrain(b.peer_id)
            await until(lambda: told(c, b) == "online")
            began = trio.current_time()
            a.draining.begin_end(2.0)
            await a.draining.wait_end(lambda own, peers: None)
            assert trio.current_time() - began <= 3.1
        assert got == [(WORDS, 1)]


async def test_in_a_private_mesh_an_admin_drains_another_peer_and_nobody_else_does(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = [await site.node(name) for name in "abc"]
        await a.membership.create("home")
        for node, scopes in ((b, ("infer", "pull", "admin")), (c, ("infer", "pull"))):
            await node.membership.join(await a.membership.ticket(scopes, 86400.0, 1))  # type: ignore[arg-type]
        await until(lambda: all(len(online(node)) == 2 for node in (a, b, c)))
        assert await b.draining.drain(a.peer_id, 60.0) == DrainView("drained")
        await until(lambda: told(c, a) == "draining")
        assert await b.draining.view(a.peer_id) == DrainView("drained")
        for what in (c.draining.undrain(a.peer_id), c.draining.drain(b.peer_id, 0.0), c.draining.view(a.peer_id)):
            with pytest.raises(OutOfScope, match="admin"):
                await what
        assert await b.draining.undrain(a.peer_id) == DrainView()
        assert a.state == "running"
