"""Draining at work: what is refused before the engine is touched, what goes on, what is ended and carried on elsewhere."""

import pytest
import trio
import trio.testing

from meshmax.base.drain import DrainView
from meshmax.base.errors import Draining, OutOfScope, PeerGone, Refused
from meshmax.base.ids import PeerId
from meshmax.base.inference import Delta, Finish, GenerateRequest, Moved
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.core.why import story
from meshmax.ports import Stream
from meshmax.services.drain_exchange import ASK_TIMEOUT_S, REQUEST_TIMEOUT_S, DrainServer, ask_drain
from meshmax.services.residency import ModelResidency
from meshmax.wire.drain import DrainAsk, StandAsk, UndrainAsk
from meshmax.wire.protocols import DRAIN
from tests.services.infer_site import WORDS, Node, Site, ask, open_site, text_of

Clock = trio.testing.MockClock
PRIVATE = MeshId("a private mesh")


async def take(residency: ModelResidency, ended: list[str]) -> None:
    """Ask the residency itself, and tell how that ended."""
    try:
        async with residency.open_answer(ask()) as events:
            ended.append("whole" if await text_of(events) == WORDS else "broken")
    except Draining:
        ended.append("draining")


async def test_a_drained_node_refuses_before_its_engine_is_touched(autojump_clock: Clock) -> None:
    async with open_site(1) as site:
        node = site[0]
        assert node.drain.drain(60.0) == DrainView("drained")
        with pytest.raises(Draining):
            async with node.residency.open_answer(ask()):
                pass
        assert node.engine.models == []
        assert node.drain.undrain() == DrainView()
        async with node.residency.open_answer(ask()) as events:
            assert await text_of(events) == WORDS


async def test_what_is_only_to_be_unloaded_is_unloaded_while_draining(autojump_clock: Clock) -> None:
    async with open_site(1) as site:
        async with site[0].residency.open_answer(ask()) as events:
            await text_of(events)
        site[0].drain.drain(60.0)
        async with site[0].residency.open_answer(ask(GenerateRequest(), keep_alive_s=0.0)) as events:
            assert [event async for event in events] == [Finish("unload")]


async def test_an_answer_that_runs_goes_on_and_the_node_is_drained_after_it(autojump_clock: Clock) -> None:
    ended: list[str] = []
    async with open_site(1, echo_tokens_per_s=10) as site, trio.open_nursery() as nursery:
        drain = site[0].drain
        nursery.start_soon(take, site[0].residency, ended)
        await trio.sleep(1)
        began = trio.current_time()
        assert drain.drain(60.0) == DrainView("draining", 1, 60.0)
        assert await drain.wait_drained() == DrainView("drained")
        assert 8 < trio.current_time() - began < 10
    assert ended == ["whole"]


async def test_at_the_deadline_what_runs_is_ended_and_what_waits_is_sent_away_at_once(autojump_clock: Clock) -> None:
    ended: list[str] = []
    async with open_site(1, echo_tokens_per_s=10, parallel=1) as site, trio.open_nursery() as nursery:
        drain = site[0].drain
        for _ in range(3):
            nursery.start_soon(take, site[0].residency, ended)
        await trio.sleep(1)
        drain.drain(3.0)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["draining", "draining"]
        assert drain.view.running == 1
        began = trio.current_time()
        assert await drain.wait_drained() == DrainView("drained", ended=1)
        assert trio.current_time() - began == pytest.approx(3.0)
    assert ended == ["draining"] * 3
    assert site[0].residency.load().running == 0


async def test_a_load_that_somebody_waits_for_is_not_waited_for(autojump_clock: Clock) -> None:
    ended: list[str] = []
    async with open_site(1, load_s=30.0) as site, trio.open_nursery() as nursery:
        nursery.start_soon(take, site[0].residency, ended)
        await trio.sleep(1)
        site[0].drain.drain(60.0)
        assert await site[0].drain.wait_drained() == DrainView("drained")
    assert ended == ["draining"]


async def test_undraining_in_the_middle_ends_nothing(autojump_clock: Clock) -> None:
    ended: list[str] = []
    async with open_site(1, echo_tokens_per_s=10) as site, trio.open_nursery() as nursery:
        nursery.start_soon(take, site[0].residency, ended)
        await trio.sleep(1)
        site[0].drain.drain(3.0)
        await trio.sleep(1)
        site[0].drain.undrain()
        nursery.start_soon(take, site[0].residency, ended)
    assert ended == ["whole", "whole"]


async def test_why_tells_whether_a_peer_was_drained_or_stopped(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10) as site:
        only_on(site, 1, 2)
        for number, stopping, words in ((1, False, "it is being drained."), (2, True, "it was stopped.")):
            async with site[0].router.open_answer(ask()) as answer:
                assert answer.route.peer_id == site[number].peer_id
                await anext(answer.events)
                site[number].drain.drain(0.0, stopping=stopping)
                if stopping:
                    site[1].drain.undrain()
                _ = [event async for event in answer.events]
            told = story(site[0].router.routes()[0])
            assert any(words in line for line in told), told


def only_on(site: Site, *holders: int) -> None:
    for number, node in enumerate(site.nodes):
        if number not in holders:
            node.has.clear()


@pytest.mark.parametrize("first", [0, 1])
async def test_the_answer_of_a_drained_peer_goes_on_at_another_to_the_byte(first: int, autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10) as site:  # the first is the entry itself, or another peer
        only_on(site, first, 2)
        async with site[0].router.open_answer(ask()) as answer:
            assert answer.route.peer_id == site[first].peer_id
            events = [await anext(answer.events)]
            site[first].drain.drain(2.0)
            events += [event async for event in answer.events]
        assert [event.peer_id for event in events if isinstance(event, Moved)] == [site[2].peer_id]
        assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS
        (route,) = site[0].router.routes()
        assert [(a.kind, a.error) for a in route.attempts] == [("first", "draining"), ("continuation", "")]
        assert site[first].drain.view == DrainView("drained", ended=1)
        async with site[0].router.open_answer(ask()) as answer:  # it is no failure of that peer: undrained, it is asked
            assert answer.route.peer_id == site[2].peer_id
        site[first].drain.undrain()
        site[2].drain.drain(0.0)
        async with site[0].router.open_answer(ask()) as answer:
            assert answer.route.peer_id == site[first].peer_id


@pytest.mark.parametrize("only", [0, 1])
async def test_an_answer_whose_only_holder_is_drained_goes_on_there_when_it_is_undrained(
    only: int, autojump_clock: Clock
) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site, trio.open_nursery() as nursery:
        only_on(site, only)

        async def undrain_later() -> None:
            await trio.sleep(20)
            site[only].drain.undrain()
            site[0].router.on_news()

        async with site[0].router.open_answer(ask()) as answer:
            events = [await anext(answer.events)]
            site[only].drain.drain(0.0)
            nursery.start_soon(undrain_later)
            events += [event async for event in answer.events]
        assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS
        (route,) = site[0].router.routes()
        assert [a.kind for a in route.attempts] == ["first", "continuation"]
        assert [wait.took_s for wait in route.waits] == [pytest.approx(20, abs=1.0)]


@pytest.mark.parametrize(("only", "who"), [(0, "this peer"), (1, "peer1")])
async def test_an_answer_that_nobody_could_carry_on_names_the_peer_that_was_drained(
    only: int, who: str, autojump_clock: Clock
) -> None:
    async with open_site(2, echo_tokens_per_s=10) as site:
        only_on(site, only)
        failed: Draining | None = None
        try:
            async with site[0].router.open_answer(ask()) as answer:
                await anext(answer.events)
                site[only].drain.drain(0.0)
                _ = [event async for event in answer.events]
        except Draining as error:
            failed = error
        said = f"{who} was drained before its answer was whole, and no other peer could carry it on"
        assert failed is not None
        assert failed.message == said


async def test_what_waits_at_a_peer_that_is_drained_begins_at_another(autojump_clock: Clock) -> None:
    async with open_site(3, echo_tokens_per_s=10, load_s=30.0) as site:
        only_on(site, 1, 2)
        site[2].change = lambda view: view
        got: list[str] = []

        async def run() -> None:
            async with site[0].router.open_answer(ask()) as answer:
                got.append(await text_of(answer.events))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(1)
            busy = next(node for node in site.nodes[1:] if node.drain.view.running)
            busy.drain.drain(60.0)
            assert await busy.drain.wait_drained() == DrainView("drained")
        assert got == [WORDS]


# --- other peers -----------------------------------------------------------------------------------------------------


def serve(node: Node, mesh: MeshId = PRIVATE, admins: tuple[PeerId, ...] = ()) -> None:
    def require(peer: PeerId) -> None:
        if peer not in admins:
            raise OutOfScope("the certificate lacks the scope 'admin'")

    DrainServer(node.drain, lambda: mesh, require).register(node.swarm)


async def test_an_admin_drains_another_peer_asks_how_it_stands_and_undrains_it(autojump_clock: Clock) -> None:
    ended: list[str] = []
    async with open_site(2, echo_tokens_per_s=10) as site, trio.open_nursery() as nursery:
        a, b = site.nodes
        serve(b, admins=(a.peer_id,))
        nursery.start_soon(take, b.residency, ended)
        await trio.sleep(1)
        assert (await ask_drain(a.swarm, b.peer_id, DrainAsk(60.0))).state == "draining"
        assert (await ask_drain(a.swarm, b.peer_id, DrainAsk(60.0))).running == 1
        await b.drain.wait_drained()
        assert await ask_drain(a.swarm, b.peer_id, StandAsk()) == DrainView("drained")
        assert await ask_drain(a.swarm, b.peer_id, UndrainAsk()) == DrainView()
        assert b.drain.view == DrainView()


@pytest.mark.parametrize(
    ("mesh", "error", "words"), [(PRIVATE, OutOfScope, "admin"), (OPEN_MESH, Refused, "open mesh")]
)
async def test_nobody_else_drains_a_peer(mesh: MeshId, error: type[Refused], words: str, autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        a, b = site.nodes
        serve(b, mesh, (a.peer_id,) if mesh == OPEN_MESH else ())
        for request in (DrainAsk(0.0), UndrainAsk(), StandAsk()):
            with pytest.raises(error, match=words):
                await ask_drain(a.swarm, b.peer_id, request)
        assert b.drain.view == DrainView()


async def test_a_peer_that_does_not_answer_is_not_waited_for(autojump_clock: Clock) -> None:
    async with open_site(2) as site:

        async def silent(_stream: Stream) -> None:
            await trio.sleep_forever()

        site[1].swarm.serve(DRAIN, silent)
        began = trio.current_time()
        with pytest.raises(PeerGone):
            await ask_drain(site[0].swarm, site[1].peer_id, StandAsk())
        assert trio.current_time() - began <= ASK_TIMEOUT_S + 1


async def test_who_opens_a_stream_and_says_nothing_is_let_go(autojump_clock: Clock) -> None:
    async with open_site(2) as site:
        serve(site[1])
        stream = await site[0].swarm.open_stream(site[1].peer_id, DRAIN)
        left = False
        with trio.fail_after(REQUEST_TIMEOUT_S + 1):
            try:
                left = not await stream.receive_some(100)
            except PeerGone:
                left = True
        assert left
