"""A node of the DHT over its life: private meshes, bootstrap nodes, partitions, churn, restarts; in virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from meshmax.base.ids import PeerId, public_key_of
from meshmax.base.membership import MeshId
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord
from meshmax.net.dht import KademliaDht, open_dht
from meshmax.net.dht_protocol import CONFIRM_LATEST_S, Membership
from meshmax.net.dht_table import TableNode
from meshmax.net.dht_upkeep import KEYS_AT_ONCE, TURN_S
from meshmax.testing.memory_datagrams import MemoryDatagrams, MemoryNet, open_net
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.dht import Ping, encode_datagram, overlay_tag
from meshmax.wire.provider_records import encode_record, sign_record
from tests.net.dht_site import key_of, open_crowd, unix_now

KEY = key_of("llama")
MESH = MeshId("12D3KooWprivate")
ROOT = b"signed by the root"


def rules(trusted: tuple[PeerId, ...] = (), revoked: set[PeerId] | None = None, chain: bytes = ROOT) -> Membership:
    """Who shows ``ROOT`` is a member, unless revoked."""
    gone = revoked if revoked is not None else set()
    return Membership(lambda peer, shown: shown == ROOT and peer not in gone, lambda: chain, trusted)


def opened(net: MemoryNet, seed: int, mesh: MeshId = MESH, **options: Any) -> Any:
    @asynccontextmanager
    async def both() -> Any:
        port = net.open()
        async with open_dht(
            SeededSigner(seed), port, mesh, random=random.Random(seed), unix_now=unix_now, **options
        ) as dht:
            yield dht, port
        port.close()

    return both()


async def provide(dht: KademliaDht, seed: int) -> int:
    signer, now_s = SeededSigner(seed), int(unix_now())
    record = ProviderRecord(KEY, signer.peer_id, now_s, now_s, now_s + 7200, ("/ip4/11.0.0.1/tcp/1",))
    return await dht.announce(sign_record(record, signer.sign))


# --- private meshes and bootstrap nodes ------------------------------------------------------------------------------


async def test_members_of_a_private_mesh_find_each_others_records(autojump_clock: Any) -> None:
    async with open_net() as net, opened(net, 1, membership=rules()) as (a, port):
        async with opened(net, 2, membership=rules()) as (b, _), opened(net, 3, membership=rules()) as (c, _):
            assert await b.join([port.address]) == await c.join([port.address]) == 1
            assert await provide(b, 2) == 1
            assert len(await c.find(KEY)) == 1
            assert a.contacts == 0  # nobody has proven to it yet that he can be reached
            await trio.sleep(300)
            assert a.contacts == 2


async def test_who_has_no_certificate_is_told_nothing_and_believed_nothing(autojump_clock: Any) -> None:
    async with open_net() as net, opened(net, 1, membership=rules()) as (a, port):
        async with opened(net, 2, membership=rules(chain=b"forged")) as (stranger, theirs):
            assert await stranger.join([port.address]) == 0
            assert await a.join([theirs.address]) == 0
            await trio.sleep(300)
            assert a.contacts == stranger.contacts == 0
            assert await stranger.find(KEY) == ()


async def test_a_member_that_is_revoked_falls_out(autojump_clock: Any) -> None:
    revoked: set[PeerId] = set()
    async with open_net() as net, opened(net, 1, membership=rules(revoked=revoked)) as (a, port):
        async with opened(net, 2, membership=rules()) as (b, theirs):
            assert await b.join([port.address]) == 1
            assert await a.join([theirs.address]) == 1
            revoked.add(SeededSigner(2).peer_id)
            await trio.sleep(2500)
            assert a.contacts == 0


async def test_meshes_that_share_a_bootstrap_node_stay_apart_and_are_found(autojump_clock: Any) -> None:
    other = MeshId("12D3KooWother")
    async with open_net() as net, opened(net, 1, MeshId(""), others=8) as (bootstrap, port):
        trusted = (SeededSigner(1).peer_id,)
        async with (
            opened(net, 2, membership=rules(trusted)) as (a, _),
            opened(net, 3, membership=rules(trusted)) as (b, _),
            opened(net, 4, other, membership=rules(trusted)) as (c, _),
        ):
            for dht in (a, b, c):
                assert await dht.join([port.address]) == 1
            assert await provide(a, 2) == 1
            assert len(await b.find(KEY)) == 1
            assert await c.find(KEY) == ()
            assert bootstrap.contacts == 0
            await trio.sleep(800)
            assert (a.contacts, b.contacts, c.contacts) == (2, 2, 1)


async def test_a_bootstrap_node_serves_so_many_meshes_and_no_more_of_one_source(autojump_clock: Any) -> None:
    async with open_net() as net, opened(net, 1, MeshId(""), others=64) as (bootstrap, port):
        joined = 0
        for number in range(12):
            guest = net.open(ip="11.200.0.7", port=1000 + number)
            mesh = MeshId(f"mesh{number}")
            async with open_dht(
                SeededSigner(50 + number), guest, mesh, random=random.Random(number), unix_now=unix_now
            ) as dht:
                joined += await dht.join([port.address])
        assert joined == 8
        assert len(bootstrap.endpoint._overlays) == 9
        assert overlay_tag(MeshId("mesh0")) in bootstrap.endpoint._overlays


async def test_spoofed_datagrams_of_invented_meshes_push_out_no_mesh_that_is_served(autojump_clock: Any) -> None:
    async with open_net() as net, opened(net, 1, MeshId(""), others=8) as (bootstrap, port):
        trusted = (SeededSigner(1).peer_id,)
        async with (
            opened(net, 2, membership=rules(trusted), client=lambda: True) as (a, _),
            opened(net, 3, membership=rules(trusted), client=lambda: True) as (b, _),
        ):
            assert await a.join([port.address]) == 1
            assert await provide(a, 2) == 1
            signer = SeededSigner(77)
            for number in range(100):
                data = encode_datagram(
                    overlay_tag(MeshId(f"invented {number}")),
                    public_key_of(signer.peer_id),
                    bootstrap.endpoint.node_id,
                    int(unix_now() * 1000),
                    number.to_bytes(8, "big"),
                    False,
                    Ping(),
                    signer.sign,
                )
                net.spoof(data, (f"12.0.{number}.1", 7), port.address)
            await trio.sleep(1)
            assert len(bootstrap.endpoint._overlays) == 9
            assert await b.join([port.address]) == 1
            assert len(await b.find(KEY)) == 1


async def test_a_newcomer_is_handed_records_while_others_have_their_turn(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_crowd(4) as crowd:
        keys = [key_of(f"word {number}") for number in range(3 * KEYS_AT_ONCE)]
        protocol = crowd.nodes[0].protocol
        asked: list[int] = []
        hand_over = protocol.hand_over

        def noted(newcomer: TableNode, some: Sequence[bytes]) -> None:
            asked.append(len(some))
            hand_over(newcomer, some)

        monkeypatch.setattr(protocol, "hand_over", noted)
        for key in keys:
            protocol.storage.store(encode_record(crowd.encoded(1, key)), "a")
        await crowd.add(100, join=[crowd.ports[0].address])
        await trio.sleep(CONFIRM_LATEST_S + 3 * TURN_S)
        assert asked
        assert max(asked) == KEYS_AT_ONCE


# --- what happens to networks ----------------------------------------------------------------------------------------


async def test_two_halves_find_each_other_again_after_a_partition(autojump_clock: Any) -> None:
    async with open_crowd(16) as crowd:
        ips = {port.address[0]: index % 2 for index, port in enumerate(crowd.ports)}
        crowd.net.cut(lambda a, b: ips[a] != ips[b])
        await trio.sleep(600)
        await crowd.nodes[0].announce(crowd.encoded(0, KEY))
        assert len(await crowd.nodes[2].find(KEY)) == 1
        assert await crowd.nodes[1].find(KEY) == ()
        crowd.net.cut(None)
        await crowd.nodes[1].join([crowd.ports[0].address])
        assert len(await crowd.nodes[1].find(KEY)) == 1


async def test_records_are_found_while_nodes_come_and_go_and_datagrams_are_lost(autojump_clock: Any) -> None:
    async with open_crowd(30, loss=0.05) as crowd:
        for index in range(3):
            await crowd.nodes[index].announce(crowd.encoded(index, KEY))
        for round_ in range(5):  # a sixth leaves, as many come: eighty per cent in all
            for index in range(5 + 5 * round_, 10 + 5 * round_):
                crowd.ports[index].close()
            for seed in range(5):
                await crowd.add(100 + 10 * round_ + seed, join=[crowd.ports[0].address])
            await trio.sleep(900)
        hits = [len(await crowd.nodes[index].find(KEY)) for index in range(30, 50)]
        assert sum(hit >= 1 for hit in hits) >= 19
        assert sum(hit == 3 for hit in hits) >= 16


async def test_records_are_handed_to_nodes_that_join_nearer(autojump_clock: Any) -> None:
    async with open_crowd(4) as crowd:
        await crowd.nodes[0].announce(crowd.encoded(0, KEY))
        newcomer = await crowd.add(100, join=[crowd.ports[1].address])
        await trio.sleep(900)
        assert len(newcomer.protocol.storage.records.records(KEY, unix_now())) == 1


async def test_a_node_that_restarts_with_its_table_needs_nobody_to_join_by(autojump_clock: Any) -> None:
    async with open_crowd(12) as crowd:
        await crowd.nodes[0].announce(crowd.encoded(0, KEY))
        kept = crowd.nodes[5].dump()
        crowd.ports[5].close()
        again = await crowd.add(6, ip=crowd.ports[5].address[0], state=kept)
        assert len(again.protocol.storage.records) == 1
        await trio.sleep(10)
        assert again.contacts >= 8
        assert len(await again.find(KEY)) == 1


async def test_a_kept_table_that_is_damaged_is_begun_anew(autojump_clock: Any) -> None:
    async with open_crowd(2) as crowd:
        kept = crowd.nodes[0].dump()
        for seed, state in enumerate((b"x", kept[:-3], kept[:20], b"\x92\x91\xc4\x01a\xc0")):
            dht = await crowd.add(100 + seed, state=state)
            assert dht.contacts == 0


async def test_all_records_of_a_key_are_found_page_by_page(autojump_clock: Any) -> None:
    async with open_crowd(3) as crowd:
        for seed in range(MAX_PROVIDERS):
            signer, now_s = crowd.signer(500 + seed), int(unix_now())
            word = ProviderRecord(KEY, signer.peer_id, 1, now_s, now_s + 7200, (f"/ip4/11.3.{seed}.1/tcp/11435",))
            await crowd.nodes[seed % 3].announce(sign_record(word, signer.sign))
        assert len(await crowd.nodes[2].find(KEY)) >= MAX_PROVIDERS - 5
        assert 2 <= len(await crowd.nodes[2].find(KEY, enough=2)) <= MAX_PROVIDERS


async def test_a_clock_that_is_off_is_told(autojump_clock: Any) -> None:
    async with open_crowd(4) as crowd:
        async with open_dht(
            SeededSigner(99), crowd.net.open(), MeshId(""), random=random.Random(9), unix_now=lambda: unix_now() - 7200
        ) as late:
            assert await late.join([crowd.ports[0].address]) == 0
            port: MemoryDatagrams = late.endpoint._datagrams  # type: ignore[assignment]
            for node in crowd.nodes:
                await node.join([port.address])
            assert "clock is 2.0 h behind" in late.problem


async def test_leaving_leaves_no_task_behind(autojump_clock: Any) -> None:
    async with open_net() as net:
        before = trio.lowlevel.current_statistics().tasks_living
        async with opened(net, 1) as (_, port), opened(net, 2) as (b, _):
            await b.join([port.address])
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_a_cancelled_look_up_leaves_nothing_waiting(autojump_clock: Any) -> None:
    async with open_crowd(8) as crowd:
        dht: KademliaDht = crowd.nodes[0]
        for moment in (0.0, 0.005, 0.02, 0.05, 0.1):
            with trio.move_on_after(moment):
                await dht.announce(crowd.encoded(0, KEY))
        assert dht.endpoint._pending == {}
        assert await dht.announce(crowd.encoded(0, KEY)) == 7
