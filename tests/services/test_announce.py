"""What a node announces is found by others, moves with it, and goes with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
import trio.testing

from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.providers import ProviderRecord
from meshmax.core.announce import TTL_S, Word
from meshmax.services.announce import IN_MESH, LOOK_S, Announcer
from meshmax.testing.memory_dht import MemoryDht, MemoryDhtSite
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.dht import dht_key

EPOCH_S = 1_790_000_000.0
LLAMA, QWEN = Word("name", "registry.ollama.ai/library/llama:latest"), Word("model", "ab" * 32)


class Node:
    """A node of the DHT with an announcer, and one that looks."""

    def __init__(self, site: MemoryDhtSite, dht: MemoryDht, looker: MemoryDht, signer: SeededSigner) -> None:
        self.site, self.dht, self.looker, self.signer = site, dht, looker, signer
        self.words: list[Word] = [LLAMA]
        self.addresses: tuple[str, ...] = ("/ip4/10.0.0.1/tcp/11435",)
        self.mesh = OPEN_MESH
        self.current: MemoryDht | None = dht
        self.announcer = Announcer(
            signer,
            lambda: self.current,
            lambda: self.mesh,
            lambda: self.words,
            lambda: self.addresses,
            site.unix_now,
            Random(1),
        )

    async def found(self, word: Word, mesh: MeshId = OPEN_MESH) -> tuple[ProviderRecord, ...]:
        return await self.looker.find(dht_key(mesh, word.kind, word.text))


@asynccontextmanager
async def open_node() -> AsyncIterator[Node]:
    site = MemoryDhtSite(lambda: EPOCH_S + trio.current_time())
    signer = SeededSigner(1)
    async with site.open(signer) as dht, site.open(SeededSigner(2)) as looker, trio.open_nursery() as nursery:
        await looker.join([dht.address])
        node = Node(site, dht, looker, signer)
        nursery.start_soon(node.announcer.run)
        yield node
        nursery.cancel_scope.cancel()


async def test_models_names_and_the_peer_itself_are_found(autojump_clock: trio.testing.MockClock) -> None:
    async with open_node() as node:
        await trio.sleep(2 * LOOK_S)
        for word in (LLAMA, IN_MESH, Word("peer", node.signer.peer_id)):
            (record,) = await node.found(word)
            assert (record.peer_id, record.addresses) == (node.signer.peer_id, node.addresses)
        assert await node.found(QWEN) == ()
        assert node.announcer.snapshot() == (3, 3)


async def test_news_are_announced_without_waiting_and_what_is_gone_is_withdrawn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_node() as node:
        await trio.sleep(2 * LOOK_S)
        node.words = [QWEN]
        node.announcer.changed()
        await trio.sleep(2.0)
        assert await node.found(QWEN)
        assert await node.found(LLAMA) == ()


async def test_records_follow_our_addresses(autojump_clock: trio.testing.MockClock) -> None:
    async with open_node() as node:
        await trio.sleep(2 * LOOK_S)
        node.addresses = ("/ip4/10.0.0.99/tcp/11435",)
        await trio.sleep(2 * LOOK_S)
        assert (await node.found(LLAMA))[0].addresses == node.addresses


async def test_records_are_renewed_and_never_expire_while_we_run(autojump_clock: trio.testing.MockClock) -> None:
    async with open_node() as node:
        for _ in range(20):
            await trio.sleep(TTL_S / 4)
            assert await node.found(LLAMA)


async def test_nothing_is_announced_by_who_has_no_address_or_no_node_and_all_of_it_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_node() as node:
        addresses, node.addresses = node.addresses, ()
        node.dht.cut()
        await trio.sleep(60.0)
        assert node.announcer.snapshot()[0] == 0
        node.dht.cut(False)
        await trio.sleep(60.0)
        assert await node.found(LLAMA) == ()
        node.addresses = addresses
        await trio.sleep(2 * LOOK_S)
        assert await node.found(LLAMA)


async def test_in_another_mesh_everything_is_announced_under_its_keys(autojump_clock: trio.testing.MockClock) -> None:
    async with open_node() as node:
        await trio.sleep(2 * LOOK_S)
        node.mesh = MeshId(SeededSigner(9).peer_id)
        await trio.sleep(2 * LOOK_S)
        assert await node.found(LLAMA, node.mesh)


async def test_when_the_dht_ends_while_much_is_announced_nothing_more_is_told_to_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_node() as node:
        node.words = [Word("model", f"{number:064x}") for number in range(200)]
        node.announcer.changed()
        while node.announcer.snapshot()[0] < 3:  # noqa: ASYNC110  it looks from outside
            await trio.sleep(0.01)
        node.current = None
        await trio.sleep(0.5)  # what was on its way
        told = sum([bool(await node.found(word)) for word in node.words])
        await trio.sleep(60)
        assert sum([bool(await node.found(word)) for word in node.words]) == told < 200


@pytest.mark.parametrize("at_s", [0.0, 0.4, 3.0, 20.0, 60.0])
async def test_at_whatever_moment_of_announcing_much_our_addresses_change_what_is_announced_then_tells_the_new_ones(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_node() as node:
        node.words = [Word("model", f"{number:064x}") for number in range(200)]
        node.announcer.changed()
        await trio.sleep(at_s)
        node.addresses = ("/ip4/10.0.0.99/tcp/11435",)
        await trio.sleep(2 * LOOK_S)
        before = {word for word in node.words if await node.found(word)}
        await trio.sleep(2 * LOOK_S)
        new = [found[0] for word in node.words if word not in before and (found := await node.found(word))]
        assert new
        assert {record.addresses for record in new} == {node.addresses}
