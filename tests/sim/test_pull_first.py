"""A model that only a storing peer has is fetched by who can answer with it, while the client waits; real nodes, virtual time."""

from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.config import EngineConfig, RoutingConfig
from meshmax.base.errors import MeshmaxError, ModelNotFound, NoProviders
from meshmax.base.inference import Ask, Delta, GenerateRequest, Moved
from meshmax.base.model import CHUNK_BYTES
from meshmax.base.route import Wishes
from meshmax.core.catalog import last_holder
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.node import Node, open_node
from tests.sim.site import Site, ask, online, open_site, pull, until

STORES = EngineConfig(kind="none")
SIZE = 24 << 20


def request(node: Node, request_id: str = "r", prompt: str = "hello there") -> Ask:
    return Ask(request_id, node.catalog.resolve("m").digest, "m", GenerateRequest(prompt))


async def store_and(site: Site, *names: str) -> list[Node]:
    """A node that only stores, and has the model; then those of these names."""
    nodes = [await site.node("store", STORES), *[await site.node(name) for name in names]]
    await until(lambda: all(len(online(node)) == len(names) for node in nodes))
    await site.add(nodes[0], "m", SIZE)
    await until(lambda: all(node.catalog.entries() for node in nodes))
    site.network.wires.latency_s = 0.1  # fetching takes seconds
    return nodes


def has(node: Node) -> bool:
    return node.catalog.resolve("m").stored is not None


async def test_the_peer_that_is_asked_fetches_it_itself_and_tells_so_from_the_first_moment(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        _, a, _ = await store_and(site, "a", "b")
        began = trio.current_time()
        async with a.router.open_answer(request(a)) as answer:
            assert trio.current_time() - began < 1
            assert not has(a)
            assert answer.route.line == "fetching m:latest to this peer first"
            assert (answer.route.state, answer.route.peer_id) == ("running", a.peer_id)
            (under_way,) = a.router.routes()
            assert under_way.attempts[0].kind == "fetch"
            assert a.router.route("r") == under_way
            assert a.pulls.transfers()[0].state == "running"
            text = "".join([event.text async for event in answer.events if isinstance(event, Delta)])
        assert text == "hello there"
        took_s = trio.current_time() - began
        (route,) = a.router.routes()
        assert route.line.startswith("fetched m:latest to this peer first, ")
        assert [attempt.kind for attempt in route.attempts] == ["fetch", "first"]
        assert route.state == "done"
        assert route.first_token_s is not None
        assert route.total_s is not None
        assert route.attempts[1].at_s <= route.first_token_s <= route.total_s <= took_s + 0.01
        assert [candidate.verdict for candidate in route.candidates] == ["chosen"]
        assert a.router.under_way == 0  # type: ignore[attr-defined]


async def test_a_peer_without_an_engine_has_another_fetch_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, b = await store_and(site, "b")
        async with store.router.open_answer(request(store)) as answer:
            assert answer.route.line == "fetching m:latest to b first"
            assert "".join([event.text async for event in answer.events if isinstance(event, Delta)]) == "hello there"
            assert answer.route.peer_id == b.peer_id
        assert has(b)
        assert await ask(store, "m", "again") == ("again", "b")


async def test_requests_that_come_meanwhile_wait_for_the_same_pull_which_ends_with_the_last_of_them(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        _, a = await store_and(site, "a")
        async with AsyncExitStack() as stack:
            for number in range(3):
                await stack.enter_async_context(a.router.open_answer(request(a, f"r{number}")))
            (transfer,) = a.pulls.transfers()
            assert transfer.state == "running"
            async with a.router.open_answer(request(a, "r4")):
                pass
            assert a.pulls.transfers()[0].state == "running"
        await until(lambda: [transfer.state for transfer in a.pulls.transfers()] == ["cancelled"])
        assert {route.state for route in a.router.routes()} == {"cancelled"}
        assert len(a.router.routes()) == 4


async def test_where_it_is_not_allowed_the_refusal_says_who_could_and_how(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        _, a = await store_and(site, "a")
        with pytest.raises(
            NoProviders, match=r"store only stores.*a could hold it: `meshmax pull m`.*X-Meshmax-Pull: false forbids"
        ):
            async with a.router.open_answer(request(a), Wishes(pull=False)):
                pass
        config, world = site.parts("c")
        config = msgspec.structs.replace(config, routing=RoutingConfig(pull=False))
        async with open_node(config, world) as c:
            await until(lambda: bool(c.catalog.entries()) and online(c) == {"store", "a"})
            with pytest.raises(NoProviders, match=r"c, a could hold it.*switched off here: routing.pull"):
                await ask(c, "m", "hello")
            (route,) = c.router.routes()
            assert (route.state, route.request_id) == ("failed", "r")
            assert route.line.startswith("nobody was asked: no peer that could answer has model 'm' (store only stores")
            assert "); c, a could hold it" in route.line
            async with c.router.open_answer(request(c, "r2"), Wishes(pull=True)) as answer:
                assert answer.route.line.startswith("fetching")


async def test_this_peer_alone_asks_no_other_to_fetch(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(tmp_path) as site:
        store, b = await store_and(site, "b")
        with pytest.raises(NoProviders):
            async with store.router.open_answer(request(store), Wishes(policy="local-only")):
                pass
        assert b.pulls.transfers() == ()


async def test_a_source_that_goes_away_ends_the_request_with_the_reason(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, a = await store_and(site, "a")
        async with a.router.open_answer(request(a)) as answer:
            await trio.sleep(0.3)
            site.network.partition(a.peer_id, store.peer_id)
            with pytest.raises(MeshmaxError, match="could not be fetched"), trio.fail_after(120):
                await anext(answer.events)
            assert answer.route.state == "failed"
        (route,) = a.router.routes()
        assert (route.state, route.attempts[0].error) == ("failed", "no_providers")


async def test_a_source_that_is_stopped_in_order_ends_the_request_soon_and_is_known_to_have_had_the_model(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        config, world = site.parts("store", STORES)
        stop = trio.Event()

        async def hold() -> None:
            async with open_node(config, world) as store:
                await until(lambda: online(store) == {"a"})
                await site.add(store, "m", SIZE)
                await stop.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            await until(lambda: bool(a.catalog.entries()))
            site.network.wires.latency_s = 0.1
            async with a.router.open_answer(request(a)) as answer:
                await begun(a)
                stop.set()
                began = trio.current_time()
                with pytest.raises(NoProviders, match="no peer that can be reached has the missing"):
                    await anext(answer.events)
                assert trio.current_time() - began < PATIENCE_S + 5
        gone = last_holder("m", a.presence.lost())
        assert gone is not None
        assert gone.status is not None
        assert (gone.status.name, gone.status.leaving) == ("store", True)
        assert last_holder("n", a.presence.lost()) is None


async def test_a_taker_that_goes_away_ends_the_request(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_site(tmp_path) as site:
        store, b = await store_and(site, "b")
        async with store.router.open_answer(request(store)) as answer:
            site.network.kill(b.peer_id)
            with pytest.raises(MeshmaxError), trio.fail_after(120):
                await anext(answer.events)


async def test_a_drained_peers_only_copy_moves_to_who_can_answer(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in "ab"]
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        await site.add(a, "m")
        await until(lambda: bool(b.catalog.entries()))
        await a.draining.drain(a.peer_id, 0.0)
        await trio.sleep(1)
        for node in (a, b):
            text = []
            async with node.router.open_answer(request(node)) as answer:
                async for event in answer.events:
                    assert not isinstance(event, Moved)
                    text.append(event.text if isinstance(event, Delta) else "")
                assert answer.route.peer_id == b.peer_id
            assert "".join(text) == "hello there"


async def begun(node: Node) -> None:
    """A pull is under way, and some of the model is there."""
    await until(lambda: any(transfer.bytes_done > CHUNK_BYTES for transfer in node.pulls.transfers()))


async def test_what_another_peer_fetches_for_a_client_ends_with_the_last_who_waits_and_what_came_is_kept(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, b = await store_and(site, "b")
        async with store.router.open_answer(request(store)):
            async with store.router.open_answer(request(store, "r2")):
                await begun(b)
            await trio.sleep(0.2)
            assert [transfer.state for transfer in b.pulls.transfers()] == ["running"]
        await until(lambda: [transfer.state for transfer in b.pulls.transfers()] == ["cancelled"], 5)
        kept = b.pulls.transfers()[0].bytes_done
        assert CHUNK_BYTES < kept < SIZE
        began = trio.current_time()
        last = await pull(b, "m")
        assert last.state == "done"
        assert sum(peer.bytes for peer in last.peers.values()) < SIZE - kept + 2 * CHUNK_BYTES
        assert trio.current_time() - began < 60


@pytest.mark.parametrize("detached", [False, True])
async def test_a_persons_own_pull_goes_on_when_the_client_elsewhere_goes_away(
    detached: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, b = await store_and(site, "b")
        async with trio.open_nursery() as nursery:
            async with store.router.open_answer(request(store)):
                await begun(b)
                if detached:
                    await b.pulls.start_download("m")
                else:
                    nursery.start_soon(pull, b, "m")
                    await trio.sleep(0.1)
            await until(lambda: has(b))
        assert [transfer.state for transfer in b.pulls.transfers()] == ["done"]


async def test_what_another_peer_fetches_ends_when_the_asking_peer_dies(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        _, b = await store_and(site, "b")
        asker = await site.node("asker", STORES)
        await until(lambda: bool(asker.catalog.entries()) and len(online(asker)) == 2)
        async with asker.router.open_answer(request(asker)):
            await begun(b)
            site.network.kill(asker.peer_id)
            await until(lambda: [transfer.state for transfer in b.pulls.transfers()] == ["cancelled"], 30)


async def test_where_the_peer_that_fetches_dies_another_one_fetches_and_answers(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        nodes = await store_and(site, "b", "c")
        store, by_id = nodes[0], {node.peer_id: node for node in nodes}
        async with store.router.open_answer(request(store)) as answer:
            first = by_id[answer.route.peer_id]
            await begun(first)
            site.network.kill(first.peer_id)
            assert "".join([event.text async for event in answer.events if isinstance(event, Delta)]) == "hello there"
            (second,) = {*nodes[1:]} - {first}
            assert answer.route.peer_id == second.peer_id
        (route,) = store.router.routes()
        assert [(attempt.kind, bool(attempt.error)) for attempt in route.attempts] == [
            ("fetch", True),
            ("fetch", False),
            ("first", False),
        ]


async def test_what_only_parts_of_are_left_is_made_whole_and_answers(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, a, b = await store_and(site, "a", "b")
        half = await a.pulls.start_download("m")
        await until(lambda: a.pulls.transfers()[0].bytes_done > SIZE * 0.6)
        await a.pulls.steer(half.id, "pause")
        await b.pulls.start_download("m")  # what is rarest first: what a lacks
        while await lacking(a) & await lacking(b):  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        assert await lacking(b)
        site.network.kill(store.peer_id)
        await until(lambda: online(a) == {"b"} and online(b) == {"a"})
        with pytest.raises(ModelNotFound):
            a.catalog.resolve("m")
        digest = a.catalog.resolve("m", parts=True).digest
        await a.pulls.steer(half.id, "resume")
        asked = Ask("r", digest, "m", GenerateRequest("hello there"))
        async with a.router.open_answer(asked) as answer:
            text = "".join([event.text async for event in answer.events if isinstance(event, Delta)])
        assert text == "hello there"


async def lacking(node: Node) -> set[int]:
    """The chunks of the model's weights that a node does not have."""
    model = node.pulling(node.catalog.resolve("m", parts=True).digest)
    weights = max(model.manifest.blobs, key=lambda blob: blob.size) if model else None
    known = await node.store.blobs.haves(weights.digest) if weights else None
    return set(known[1].missing()) if known else set(range(SIZE // CHUNK_BYTES))


async def test_a_request_that_waits_for_a_slot_is_told_of_before_its_answer_begins(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        slow = EngineConfig(kind="echo", echo_tokens_per_s=1.0, parallel=1)
        a = await site.node("a", slow)
        await site.add(a, "m")
        async with a.router.open_answer(request(a, prompt="w " * 100)), trio.open_nursery() as nursery:

            async def wait() -> None:
                async with a.router.open_answer(request(a, "r2")):
                    raise AssertionError("there is one slot")

            nursery.start_soon(wait)
            await trio.sleep(20)
            route = a.router.route("r2")
            assert route is not None
            assert route.state == "running"
            assert route.line
            nursery.cancel_scope.cancel()


async def test_a_model_that_was_removed_and_added_again_under_its_name_is_used_by_everybody(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, a = await store_and(site, "a")
        old = a.catalog.resolve("m").digest
        await trio.sleep(60)
        await store.catalog.delete("m")
        await site.add(store, "m", SIZE // 2)
        new = store.catalog.resolve("m").digest
        assert new != old
        await until(lambda: [entry.digest for entry in a.catalog.entries()] == [new])
        assert a.catalog.resolve("m").digest == new
        assert await ask(store, "m", "hello there") == ("hello there", "a")
        stored = a.catalog.resolve("m").stored
        assert stored is not None
        assert stored.manifest.digest == new


async def test_a_pull_of_a_name_that_another_peer_uses_otherwise_says_how_to_choose_its_model(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, thief = [await site.node(name) for name in ("a", "thief")]
        config, world = site.parts("owner", STORES)
        async with open_node(config, world) as owner:
            await site.add(owner, "m", SIZE)
            await until(lambda: bool(a.catalog.entries()))
        await site.add(thief, "m", SIZE // 2)
        theirs = thief.catalog.resolve("m").digest
        await until(lambda: [entry.digest for entry in a.catalog.entries()] == [theirs])
        with pytest.raises(NoProviders, match=f"use m:latest@{theirs[:12]} if that is meant"):
            await pull(a, "m")
        assert (await pull(a, f"m@{theirs}")).state == "done"


@pytest.mark.parametrize("name", ["m", "n"])
@pytest.mark.parametrize("here", [True, False])
async def test_what_is_fetched_gets_the_name_that_was_asked_for(
    name: str, here: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, a = await store_and(site, "a")
        await store.catalog.copy("m", "n")
        await until(lambda: len(a.catalog.entries()) == 2)
        assert await ask(a if here else store, name, "hello there") == ("hello there", "a")
        assert [stored.name for stored in a.catalog.local()] == [f"{name}:latest"]


async def test_prompts_for_one_model_under_two_names_fetch_it_once_and_under_both(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        store, a = await store_and(site, "a")
        await store.catalog.copy("m", "n")
        await until(lambda: len(a.catalog.entries()) == 2)
        async with trio.open_nursery() as nursery:
            for number, name in enumerate(("m", "n")):
                nursery.start_soon(answer_of, a, msgspec.structs.replace(request(a, f"r{number}"), name=name))
        assert {stored.name for stored in a.catalog.local()} == {"m:latest", "n:latest"}
        assert len(a.pulls.transfers()) == 1


async def answer_of(node: Node, request: Ask) -> None:
    async with node.router.open_answer(request) as answer:
        async for _ in answer.events:
            pass
