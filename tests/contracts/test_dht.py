"""What every Dht does: the real one over datagrams in memory, the same over real loopback sockets, and the fake."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing

from meshmax.base.errors import ManifestInvalid
from meshmax.base.membership import OPEN_MESH
from meshmax.base.model import Signed
from meshmax.base.providers import ProviderRecord
from meshmax.net.datagrams import open_datagrams
from meshmax.net.dht import open_dht
from meshmax.ports import Dht
from meshmax.testing.memory_datagrams import open_net
from meshmax.testing.memory_dht import MemoryDhtSite
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.dht import dht_key
from meshmax.wire.provider_records import sign_record

EPOCH_S = 1.8e9
KEY = dht_key(OPEN_MESH, "model", "sha256-of-a-model")


class Site:
    """A network of Dhts: `open` a node by number, its address is then in `addresses`."""

    def __init__(
        self,
        open_one: Callable[[SeededSigner], AbstractAsyncContextManager[tuple[Dht, tuple[str, int]]]],
        now: Callable[[], float],
    ) -> None:
        self._open, self.now = open_one, now
        self.addresses: dict[int, tuple[str, int]] = {}

    @asynccontextmanager
    async def open(self, number: int) -> AsyncIterator[Dht]:
        async with self._open(SeededSigner(number)) as (dht, address):
            self.addresses[number] = address
            yield dht

    def record(self, number: int, sequence: int = 1, *, key: bytes = KEY, ttl_s: int = 3600) -> Signed:
        signer, now_s = SeededSigner(number), int(self.now())
        addresses = ("/ip4/11.1.2.3/tcp/11435",) if ttl_s else ()
        return sign_record(ProviderRecord(key, signer.peer_id, sequence, now_s, now_s + ttl_s, addresses), signer.sign)


def _virtual_now() -> float:
    return EPOCH_S + trio.current_time()


@asynccontextmanager
async def fake_site() -> AsyncIterator[Site]:
    network = MemoryDhtSite(_virtual_now)

    @asynccontextmanager
    async def open_one(signer: SeededSigner) -> AsyncIterator[tuple[Dht, tuple[str, int]]]:
        async with network.open(signer) as dht:
            yield dht, dht.address

    yield Site(open_one, _virtual_now)


@asynccontextmanager
async def memory_site() -> AsyncIterator[Site]:
    async with open_net(seed=1) as net:

        @asynccontextmanager
        async def open_one(signer: SeededSigner) -> AsyncIterator[tuple[Dht, tuple[str, int]]]:
            port = net.open()
            async with open_dht(signer, port, OPEN_MESH, random=random.Random(1), unix_now=_virtual_now) as dht:
                yield dht, port.address
            port.close()

        yield Site(open_one, _virtual_now)


@asynccontextmanager
async def socket_site() -> AsyncIterator[Site]:
    @asynccontextmanager
    async def open_one(signer: SeededSigner) -> AsyncIterator[tuple[Dht, tuple[str, int]]]:
        async with (
            open_datagrams([("127.0.0.1", 0)]) as datagrams,
            open_dht(signer, datagrams, OPEN_MESH, random=random.SystemRandom(), unix_now=time.time) as dht,
        ):
            yield dht, datagrams.addresses[0]

    yield Site(open_one, time.time)


Opens = Callable[[], AbstractAsyncContextManager[Site]]


@pytest.fixture(
    params=[
        fake_site,
        memory_site,
        pytest.param(socket_site, marks=pytest.mark.loopback),
    ]
)
def open_site(request: pytest.FixtureRequest) -> Opens:
    return cast("Opens", request.param)


@pytest.fixture
def clock(open_site: object) -> trio.testing.MockClock | None:
    return None if open_site is socket_site else trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
async def site(open_site: Opens, clock: object) -> AsyncIterator[Site]:
    async with open_site() as opened:
        yield opened


@asynccontextmanager
async def three(site: Site) -> AsyncIterator[tuple[Dht, Dht, Dht]]:
    """Nodes 1, 2 and 3, of which 2 and 3 have joined by 1."""
    async with site.open(1) as a, site.open(2) as b, site.open(3) as c:
        assert await b.join([site.addresses[1]]) == 1
        assert await c.join([site.addresses[1]]) == 1
        yield a, b, c


def peers(records: tuple[ProviderRecord, ...]) -> set[str]:
    return {record.peer_id for record in records}


async def test_what_one_node_announces_another_finds(site: Site) -> None:
    async with three(site) as (_, b, c):
        assert await b.announce(site.record(2)) >= 1
        (found,) = await c.find(KEY)
        assert (found.key, found.peer_id) == (KEY, SeededSigner(2).peer_id)
        assert found.addresses == ("/ip4/11.1.2.3/tcp/11435",)


async def test_a_key_has_as_many_providers_as_announced_it(site: Site) -> None:
    async with three(site) as (_, b, c):
        await b.announce(site.record(2))
        await c.announce(site.record(3))
        for dht in (b, c):
            assert peers(await dht.find(KEY)) == {SeededSigner(2).peer_id, SeededSigner(3).peer_id}


async def test_a_key_that_nobody_announced_has_no_providers(site: Site) -> None:
    async with three(site) as (_, b, _c):
        assert await b.find(dht_key(OPEN_MESH, "model", "nobody's")) == ()


async def test_a_newer_record_of_a_provider_replaces_the_older(site: Site) -> None:
    async with three(site) as (_, b, c):
        await b.announce(site.record(2, 1))
        await b.announce(site.record(2, 2))
        (found,) = await c.find(KEY)
        assert found.sequence == 2


async def test_an_older_record_is_refused_by_who_announced_a_newer(site: Site) -> None:
    async with three(site) as (_, b, _c):
        await b.announce(site.record(2, 2))
        with pytest.raises(ManifestInvalid):
            await b.announce(site.record(2, 1))


async def test_a_provider_that_withdrew_is_found_no_more(site: Site) -> None:
    async with three(site) as (_, b, c):
        await b.announce(site.record(2, 1))
        await b.announce(site.record(2, 2, ttl_s=0))
        assert await c.find(KEY) == ()
        assert await b.find(KEY) == ()


async def test_a_record_that_is_not_its_signers_is_not_announced(site: Site) -> None:
    async with three(site) as (_, b, _c):
        forged = Signed(SeededSigner(3).peer_id, site.record(2).payload, site.record(2).signature)
        with pytest.raises(ManifestInvalid):
            await b.announce(forged)


async def test_a_node_alone_finds_what_it_announced_itself_and_nothing_else(site: Site) -> None:
    async with site.open(1) as a:
        assert a.contacts == 0
        assert a.problem
        assert await a.announce(site.record(1)) == 0
        assert peers(await a.find(KEY)) == {SeededSigner(1).peer_id}
        assert await a.find(dht_key(OPEN_MESH, "model", "other")) == ()


async def test_joining_where_nobody_answers_counts_nobody(site: Site) -> None:
    async with site.open(1) as a:
        assert await a.join([("127.0.0.1", 9)]) == 0
        assert a.contacts == 0


async def test_a_node_that_joined_has_contacts_and_no_problem(site: Site) -> None:
    async with three(site) as (_, b, c):
        assert b.contacts >= 1
        assert c.contacts >= 1
        assert (b.problem, c.problem) == ("", "")


async def test_who_announced_when_alone_is_told_that_nodes_have_come(site: Site) -> None:
    async with site.open(1), site.open(2) as b:
        await b.announce(site.record(2))
        assert b.moved(KEY) == 0
        assert b.moved(dht_key(OPEN_MESH, "model", "never announced")) == 0
        await b.join([site.addresses[1]])
        assert b.moved(KEY) >= 1
        await b.announce(site.record(2))
        assert b.moved(KEY) == 0
