"""A mesh of eight real nodes in virtual time: they meet, spread statuses, share a model, answer, and lose a peer."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.config import EngineConfig
from meshmax.base.errors import ModelNotFound
from tests.sim.site import ask, online, open_site, pull, until

NAMES = ["a", "b", "c", "d", "e", "f", "g", "h"]


async def test_eight_nodes_meet_share_a_model_answer_and_lose_a_peer(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        nodes = [await site.node(name) for name in NAMES]
        a, b, c = nodes[:3]
        met_s = await until(lambda: all(len(online(node)) == 7 for node in nodes))
        assert met_s < 10

        await site.add(a, "m")
        spread_s = await until(lambda: all(any(e.name == "m:latest" for e in node.catalog.entries()) for node in nodes))
        assert spread_s < 3

        assert await ask(b, "m", "how are you") == ("how are you", "a")

        transfer = await pull(b, "m")
        assert transfer.state == "done"
        assert sum(source.bytes for source in transfer.peers.values()) >= 4 << 20
        await until(lambda: len(c.catalog.resolve("m").entry.holders) == 2)

        site.network.kill(a.peer_id)
        gone_s = await until(lambda: all("a" not in online(node) for node in nodes[1:]))
        assert gone_s < 10
        assert await ask(c, "m", "still there") == ("still there", "b")


async def test_a_frozen_peer_is_gone_for_all_within_ten_seconds_and_comes_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        nodes = [await site.node(name) for name in NAMES[:4]]
        await until(lambda: all(len(online(node)) == 3 for node in nodes))
        site.network.freeze(nodes[0].peer_id)
        assert await until(lambda: all("a" not in online(node) for node in nodes[1:])) < 10
        site.network.thaw(nodes[0].peer_id)
        await until(lambda: all(len(online(node)) == 3 for node in nodes), deadline_s=120)


async def test_two_peers_pull_one_model_from_the_same_holder_at_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = [await site.node(name) for name in NAMES[:3]]
        await until(lambda: all(len(online(node)) == 2 for node in (a, b, c)))
        await site.add(a, "m", 24 << 20)
        await until(lambda: len(b.catalog.entries()) == len(c.catalog.entries()) == 1)
        transfers = []
        async with trio.open_nursery() as nursery:
            for node in (b, c):

                async def fetch(node=node) -> None:  # type: ignore[no-untyped-def]
                    transfers.append(await pull(node, "m"))

                nursery.start_soon(fetch)
        assert [transfer.state for transfer in transfers] == ["done", "done"]
        assert b.catalog.resolve("m").stored
        assert c.catalog.resolve("m").stored


async def test_a_peer_that_is_still_pulling_serves_onward_what_it_has(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = [await site.node(name) for name in NAMES[:3]]
        await until(lambda: all(len(online(node)) == 2 for node in (a, b, c)))
        await site.add(a, "m", 48 << 20)
        await until(lambda: len(b.catalog.entries()) == len(c.catalog.entries()) == 1)
        served_while_incomplete = 0
        site.network.wires.latency_s = 0.1  # a LAN would be through before anybody heard of b's first chunk
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, b, "m")
            async with c.pulls.open_pull("m") as progress:
                async for transfer in progress:
                    if b.catalog.resolve("m").stored is None and b.peer_id in transfer.peers:
                        served_while_incomplete = max(served_while_incomplete, transfer.peers[b.peer_id].bytes)
        assert transfer.state == "done"
        assert served_while_incomplete >= 1 << 20


async def test_what_an_interrupted_pull_left_is_known_by_name_and_can_be_freed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = [await site.node(name) for name in NAMES[:2]]
        await site.add(a, "m", 24 << 20)
        await until(lambda: len(b.catalog.entries()) == 1)
        site.network.wires.latency_s = 0.1
        async with b.pulls.open_pull("m") as progress:
            async for transfer in progress:
                if transfer.bytes_done > 4 << 20:
                    break
            assert await b.leftovers.list() == ()
        (left,) = await b.leftovers.list()
        assert left.name == "m:latest"
        assert 4 << 20 <= left.here_bytes < 24 << 20 <= left.size_bytes
        assert await b.leftovers.drop("m")  # which waits for the pull to let go of its files
        assert await b.leftovers.list() == ()
        assert list(b.store.blobs.layout.partials.glob("*.data")) == []


async def test_a_prompt_goes_to_the_next_peer_when_the_best_one_is_cut_off_before_it_spoke(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = [await site.node(name) for name in NAMES[:3]]
        await until(lambda: all(len(online(node)) == 2 for node in (a, b, c)))
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        await pull(b, "m")
        await until(lambda: len(c.catalog.resolve("m").entry.holders) == 2)
        _, first = await ask(c, "m", "hello")
        best, other = (a, b) if first == "a" else (b, a)
        site.network.partition(c.peer_id, best.peer_id)
        assert await ask(c, "m", "hello again") == ("hello again", other.name)
        (route, *_) = c.router.routes()
        assert [attempt.peer_id for attempt in route.attempts] == [best.peer_id, other.peer_id]


async def test_a_slow_answer_is_no_frozen_one(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    slow = EngineConfig(kind="echo", echo_tokens_per_s=0.05)  # a token every twenty seconds
    async with open_site(tmp_path) as site:
        a, b = await site.node("a", slow), await site.node("b", slow)
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        assert await ask(b, "m", "one two three") == ("one two three", "a")


async def test_a_name_nobody_knows_is_not_found_and_a_deleted_one_is_forgotten_by_all(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.node("a"), await site.node("b")
        await until(lambda: len(online(a)) == len(online(b)) == 1)
        with pytest.raises(ModelNotFound):
            b.catalog.resolve("m")
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        await a.catalog.delete("m")
        await until(lambda: not b.catalog.entries())
