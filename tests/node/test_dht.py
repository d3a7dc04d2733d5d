"""The DHT in a node: on in a private mesh, silent on an open LAN, begun anew when the mesh changes, kept over restarts."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from meshmax.base.config import Config
from meshmax.base.errors import PeerGone
from meshmax.base.ids import public_key_of
from meshmax.base.membership import SCOPES, Certificate, MeshId
from meshmax.base.providers import KEY_BYTES
from meshmax.base.reachability import NatBehaviour, Reachability
from meshmax.node.dht import JOIN_S, NodeDht, _udp_places, is_client
from meshmax.services.observe import ObserveServer
from meshmax.services.standing import Standing
from meshmax.services.strangers import NoMesh
from meshmax.store.dht_file import load_dht
from meshmax.store.mesh_files import OwnMesh
from meshmax.testing.memory_datagrams import MemoryNet, open_net
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from meshmax.wire.membership import sign_certificate
from tests.net.dht_site import EPOCH_S, unix_now

ROOT = SeededSigner(500)
MESH = MeshId(ROOT.peer_id)


def private(signer: SeededSigner) -> Standing:
    word = Certificate(MESH, signer.peer_id, SCOPES, 1, int(EPOCH_S) - 10, int(EPOCH_S) + 86400)
    return Standing(signer, OwnMesh(MESH, "home", (sign_certificate(word, ROOT.peer_id, ROOT.sign),)))


async def run_sync(work: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return work()


async def nobody(*_: Any) -> Any:
    await trio.lowlevel.checkpoint()
    raise PeerGone("nobody is connected")


@asynccontextmanager
async def node_dht(
    net: MemoryNet, home: Path, seed: int, standing: Standing, config: Config, udp_port: int = 11435
) -> AsyncIterator[Any]:
    signer = SeededSigner(seed)
    home.mkdir(exist_ok=True)
    node: Any = SimpleNamespace(
        config=config,
        signer=signer,
        datagrams=net.open(port=udp_port),
        home=SimpleNamespace(path=home),
        world=SimpleNamespace(random=random.Random(seed), unix_now=unix_now, run_sync=run_sync),
        membership=SimpleNamespace(mesh=standing.mesh, standing=standing, allows=lambda ip, is_lan: True),
        swarm=SimpleNamespace(connections=dict, open_stream=nobody),
        traversal=SimpleNamespace(reachability=lambda: node.where, udp_blocked=False),
        where=Reachability(),
        presence=SimpleNamespace(addresses_of=lambda peer_id: (), view=lambda peer_id: None),
    )
    node.dht = NodeDht(node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.dht.run)
        yield node
        nursery.cancel_scope.cancel()


async def test_members_of_a_private_mesh_meet_and_strangers_do_not(autojump_clock: Any, tmp_path: Path) -> None:
    config = Config()
    async with open_net() as net:
        async with (
            node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), config) as a,
            node_dht(net, tmp_path / "b", 2, private(SeededSigner(2)), config) as b,
            node_dht(net, tmp_path / "c", 3, private(SeededSigner(4)), config) as thief,  # another's certificate
        ):
            await trio.sleep(2)
            assert await b.dht.join([a.datagrams.address]) == 1
            assert await thief.dht.join([a.datagrams.address]) == 0
            assert (b.dht.contacts, b.dht.problem) == (1, "")
        assert load_dht(tmp_path / "b", MESH)


async def test_who_reads_the_datagrams_of_a_private_mesh_does_not_learn_its_id(
    autojump_clock: Any, tmp_path: Path
) -> None:
    heard: list[bytes] = []
    async with open_net() as net:
        net.taps.append(lambda data, _sender, _to: heard.append(data))
        async with (
            node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config()) as a,
            node_dht(net, tmp_path / "b", 2, private(SeededSigner(2)), Config()) as b,
        ):
            await trio.sleep(2)
            assert await b.dht.join([a.datagrams.address]) == 1
    assert heard
    assert not any(public_key_of(ROOT.peer_id) in data or ROOT.peer_id.encode() in data for data in heard)


async def test_an_open_lan_mesh_by_itself_sends_nothing(autojump_clock: Any, tmp_path: Path) -> None:
    async with open_net() as net:
        async with node_dht(net, tmp_path / "a", 1, Standing(SeededSigner(1)), Config()) as a:
            await trio.sleep(600)
            assert (net.sent, a.dht.contacts, a.dht.problem) == (0, 0, "")


async def test_a_failure_of_the_dht_is_none_of_the_node_and_it_begins_again(
    autojump_clock: Any, tmp_path: Path
) -> None:
    fail = True

    async def run_sync_at_times(work: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if fail:
            raise ValueError("nobody expected this")
        return work()

    async with open_net() as net:
        async with node_dht(net, tmp_path / "a", 1, Standing(SeededSigner(1)), Config()) as a:
            a.world.run_sync = run_sync_at_times
            a.membership.standing = private(SeededSigner(1))
            a.membership.mesh = MESH
            await trio.sleep(5)
            assert a.dht.current is None
            fail = False
            await trio.sleep(JOIN_S[1] + 5)
            assert a.dht.current is not None


async def test_it_is_turned_off_by_configuration(autojump_clock: Any, tmp_path: Path) -> None:
    async with open_net() as net:
        async with node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config(dht=False)) as a:
            await trio.sleep(5)
            assert a.dht.current is None


async def test_changing_the_mesh_begins_another_dht(autojump_clock: Any, tmp_path: Path) -> None:
    async with open_net() as net:
        async with node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config()) as a:
            await trio.sleep(2)
            first = a.dht.current
            a.membership.mesh = MeshId(SeededSigner(9).peer_id)
            await trio.sleep(5)
            assert a.dht.current not in (None, first)


async def test_right_after_a_change_of_mesh_nothing_is_asked_or_announced_in_the_old_dht(
    autojump_clock: Any, tmp_path: Path
) -> None:
    async with open_net() as net:
        async with node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config()) as a:
            await trio.sleep(2)
            first = a.dht.current
            other = a.membership.mesh = MeshId(SeededSigner(9).peer_id)
            assert (a.dht.current, a.dht.contacts) == (None, 0)
            a.dht.look_again()
            await trio.sleep(0.2)
            assert a.dht.current not in (None, first)
            assert a.dht.mesh == other


async def test_a_bootstrap_node_that_a_ticket_named_is_joined_by_and_trusted(
    autojump_clock: Any, tmp_path: Path
) -> None:
    standing = private(SeededSigner(2))
    async with open_net() as net:
        async with (
            node_dht(net, tmp_path / "a", 1, private(SeededSigner(4)), Config()) as a,
            node_dht(net, tmp_path / "b", 2, standing, Config()) as b,
        ):
            await trio.sleep(2)
            assert await b.dht.join([a.datagrams.address]) == 0  # it has no certificate of its own
            host, port = a.datagrams.address
            standing.bootstrap = (f"/ip4/{host}/tcp/{port}/p2p/{a.signer.peer_id}",)
            before = b.dht.current
            await trio.sleep(3)
            assert b.dht.current not in (None, before)
            assert b.dht.contacts == 1


# --- ports -----------------------------------------------------------------------------------------------------------

ELSEWHERE = 11999  # a UDP port that nobody would guess from the control port's number


def knows(node: Any, other: Any, udp_port: int) -> None:
    """``node`` is connected to ``other``, which told this UDP port and a control port of another number."""
    status = SimpleNamespace(udp_port=udp_port)
    node.swarm.connections = lambda: {other.signer.peer_id: None}
    node.presence.view = lambda _: SimpleNamespace(status=status)
    node.presence.addresses_of = lambda _: (f"/ip4/{other.datagrams.address[0]}/tcp/11435", "/dns4/a.test/tcp/1")


async def test_a_member_whose_udp_port_is_another_one_is_joined_by_what_it_tells(
    autojump_clock: Any, tmp_path: Path
) -> None:
    async with open_net() as net:
        async with (
            node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config(), ELSEWHERE) as a,
            node_dht(net, tmp_path / "b", 2, private(SeededSigner(2)), Config()) as b,
        ):
            knows(b, a, 0)
            await trio.sleep(10)
            assert b.dht.contacts == 0
            knows(b, a, ELSEWHERE)
            await trio.sleep(70)
            assert b.dht.contacts == 1


async def test_a_bootstrap_node_is_asked_for_its_udp_port_where_it_is_connected(
    autojump_clock: Any, tmp_path: Path
) -> None:
    network = MemoryNetwork()
    async with (
        open_net() as net,
        network.open_swarm(SeededSigner(1), NoMesh()) as bootstrap,
        network.open_swarm(SeededSigner(2)) as swarm,
        node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config(), ELSEWHERE) as a,
        node_dht(net, tmp_path / "b", 2, private(SeededSigner(2)), Config()) as b,
    ):
        ObserveServer(ELSEWHERE, 0, ()).register(bootstrap)
        b.swarm = swarm
        b.membership.standing.bootstrap = (f"/ip4/{a.datagrams.address[0]}/tcp/11435/p2p/{bootstrap.peer_id}",)
        await trio.sleep(10)
        assert b.dht.contacts == 0
        await swarm.dial(bootstrap.peer_id, bootstrap.addresses, guest=True)
        await trio.sleep(70)
        assert b.dht.contacts == 1


async def test_names_that_peers_tell_are_not_looked_up(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def looked_up(*_: Any, **__: Any) -> Any:
        await trio.sleep(60)
        return [(0, 0, 0, "", ("11.0.0.1", 0))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", looked_up)
    texts = ("/ip4/11.0.0.7/tcp/5", "/dns4/a.test/tcp/6", "/ip4/11.0.0.8/tcp/5/p2p-circuit")
    assert await _udp_places(texts, 9) == [("11.0.0.7", 9), ("11.0.0.7", 5)]
    began_s = trio.current_time()
    assert await _udp_places(texts[1:], 9, names=True) == []
    assert trio.current_time() - began_s < 10


@pytest.mark.parametrize(
    ("where", "client"),
    [
        (Reachability(), False),
        (Reachability("public"), False),
        (Reachability("mapped"), False),
        (Reachability("private"), True),
        (Reachability("public", "", NatBehaviour(udp="blocked")), True),
    ],
)
def test_who_is_not_reached_is_a_client(where: Reachability, client: bool) -> None:
    assert is_client(where) is client


async def test_who_is_reached_no_more_leaves_the_tables_of_others(autojump_clock: Any, tmp_path: Path) -> None:
    async with open_net() as net:
        async with (
            node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config()) as a,
            node_dht(net, tmp_path / "b", 2, private(SeededSigner(2)), Config()) as b,
        ):
            await trio.sleep(2)
            assert await a.dht.join(b.datagrams.addresses)
            await trio.sleep(400)
            assert (a.dht.contacts, b.dht.contacts) == (1, 1)
            a.where = Reachability("private")
            await a.dht.find(b"k" * KEY_BYTES)
            assert (a.dht.contacts, b.dht.contacts) == (1, 0)
            await trio.sleep(600)
            assert b.dht.contacts == 0
            a.where = Reachability("public")
            await a.dht.join(b.datagrams.addresses)
            await trio.sleep(400)
            assert b.dht.contacts == 1


async def test_where_udp_is_blocked_there_is_no_dht_until_it_opens(autojump_clock: Any, tmp_path: Path) -> None:
    async with open_net() as net, node_dht(net, tmp_path / "a", 1, private(SeededSigner(1)), Config()) as a:
        await trio.sleep(2)
        assert a.dht.current is not None
        a.traversal.udp_blocked = True
        await trio.sleep(2)
        assert a.dht.current is None
        assert a.dht.why_off == "this network lets no UDP out"
        a.traversal.udp_blocked = False
        a.dht.look_again()
        await trio.sleep(2)
        assert a.dht.current is not None
