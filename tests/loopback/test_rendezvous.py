"""Rendezvous on real sockets: between our swarms, and with another implementation of the protocol."""

import gc
import random
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from meshmax.base.membership import OPEN_MESH
from meshmax.net.swarm import LibrarySwarm, open_swarm
from meshmax.ports import Sighting
from meshmax.services.rendezvous import Rendezvous
from meshmax.services.rendezvous_server import open_rendezvous_server
from meshmax.services.rendezvous_stream import RendezvousStream
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire import rendezvous
from meshmax.wire.multiaddr import encode_multiaddr, peer_id_bytes
from meshmax.wire.protocols import RENDEZVOUS
from meshmax.wire.rendezvous import (
    Discover,
    DiscoverResponse,
    Message,
    Register,
    RegisterResponse,
    Unregister,
    encode_peer_info,
    try_read_peer_info,
)

pytestmark = pytest.mark.loopback
LOOPBACK = [("127.0.0.1", 0)]
SIGNERS = [SeededSigner(seed) for seed in range(1, 5)]


@pytest.fixture(autouse=True)
def forget_sockets_of_the_library() -> Iterator[None]:
    """As it is, the library leaves those that it dialled to the garbage collection, which warns."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@asynccontextmanager
async def foreign_host(seed: int) -> AsyncIterator[Any]:
    """A host of the library as it is, over TCP, Noise and Yamux."""
    import libp2p
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
    from libp2p.stream_muxer.yamux.yamux import Yamux
    from multiaddr import Multiaddr

    key = create_new_key_pair(SeededSigner(seed).private_bytes)
    noise = Transport(key, noise_privkey=new_noise_key().private_key)
    host = libp2p.new_host(key, sec_opt={PROTOCOL_ID: noise}, muxer_opt={YAMUX: Yamux})
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


def place(swarm: LibrarySwarm) -> tuple[Any, tuple[str, ...]]:
    return swarm.peer_id, tuple(address.partition("/p2p/")[0] for address in swarm.addresses)


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  it looks from outside
        await trio.sleep(0.01)


async def find(swarm: LibrarySwarm, signer: SeededSigner, server: LibrarySwarm, found: list[Sighting]) -> None:
    send, receive = trio.open_memory_channel[Sighting](8)
    rung = Rendezvous(
        swarm,
        signer,
        lambda: dict([place(server)]),
        lambda: swarm.addresses,
        lambda: OPEN_MESH,
        time.time,
        random.Random(1),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rung.run, send)
        found.append(await receive.receive())
        nursery.cancel_scope.cancel()


async def test_two_swarms_find_each_other_at_a_third() -> None:
    with trio.fail_after(60):
        async with (
            open_swarm(SIGNERS[0].private_bytes, LOOPBACK) as server,
            open_swarm(SIGNERS[1].private_bytes, LOOPBACK) as first,
            open_swarm(SIGNERS[2].private_bytes, LOOPBACK) as second,
            open_rendezvous_server(server) as serving,
            trio.open_nursery() as nursery,
        ):
            send, _receive = trio.open_memory_channel[Sighting](8)
            rung = Rendezvous(
                first,
                SIGNERS[1],
                lambda: dict([place(server)]),
                lambda: first.addresses,
                lambda: OPEN_MESH,
                time.time,
                random.Random(1),
            )
            nursery.start_soon(rung.run, send)
            await until(lambda: len(serving.registrations) == 1)
            found: list[Sighting] = []
            await find(second, SIGNERS[2], server, found)
            assert found == [Sighting(first.peer_id, place(first)[1], "rendezvous")]
            await second.dial(first.peer_id, found[0].addresses)
            assert len(serving.registrations) == 1  # the second one ended in order
            nursery.cancel_scope.cancel()


async def ask(swarm: LibrarySwarm, peer_id: Any, message: Message, *, answered: bool = True) -> Message | None:
    stream = await swarm.open_stream(peer_id, RENDEZVOUS)
    messages = RendezvousStream(stream, rendezvous.MAX_RESPONSE_BYTES)
    await messages.send(message)
    answer = await messages.receive() if answered else None
    await stream.aclose()
    return answer


async def test_our_messages_are_served_by_another_implementation() -> None:
    from libp2p.discovery.rendezvous import RendezvousService

    with trio.fail_after(60):
        async with foreign_host(9) as host, open_swarm(SIGNERS[1].private_bytes, LOOPBACK) as swarm:
            service = RendezvousService(host)
            peer_id = SeededSigner(9).peer_id
            await swarm.dial(peer_id, [str(host.get_addrs()[0])], guest=True)
            address = encode_multiaddr("/ip4/10.0.0.5/tcp/11435")
            info = encode_peer_info(peer_id_bytes(swarm.peer_id), [address])
            granted = await ask(swarm, peer_id, Register("ns", info, 7200))
            assert granted == RegisterResponse(rendezvous.OK, "OK", 7200)
            page = await ask(swarm, peer_id, Discover("ns", 10))
            assert isinstance(page, DiscoverResponse)
            (registration,) = page.registrations
            assert try_read_peer_info(registration.record) == (swarm.peer_id, ("/ip4/10.0.0.5/tcp/11435",))
            await ask(swarm, peer_id, Unregister("ns", peer_id_bytes(swarm.peer_id)), answered=False)
            await until(lambda: not service.registrations["ns"])


async def test_a_node_that_takes_no_signed_records_is_told_of_as_a_problem() -> None:
    from libp2p.discovery.rendezvous import RendezvousService

    with trio.fail_after(60):
        async with foreign_host(9) as host, open_swarm(SIGNERS[1].private_bytes, LOOPBACK) as swarm:
            RendezvousService(host)
            at = (SeededSigner(9).peer_id, (str(host.get_addrs()[0]).partition("/p2p/")[0],))
            send, _receive = trio.open_memory_channel[Sighting](8)
            rung = Rendezvous(
                swarm,
                SIGNERS[1],
                lambda: dict([at]),
                lambda: swarm.addresses,
                lambda: OPEN_MESH,
                time.time,
                random.Random(1),
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rung.run, send)
                await until(lambda: bool(rung.problem))
                assert "it did not register us" in rung.problem
                nursery.cancel_scope.cancel()


async def test_another_implementation_registers_discovers_and_leaves_at_our_server() -> None:
    from libp2p.discovery.rendezvous.client import RendezvousClient
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    with trio.fail_after(60):
        async with (
            open_swarm(SIGNERS[0].private_bytes, LOOPBACK) as server,
            open_rendezvous_server(server) as serving,
            foreign_host(8) as first,
            foreign_host(9) as second,
        ):
            clients = []
            for host in (first, second):
                info = info_from_p2p_addr(Multiaddr(server.addresses[0]))
                await host.connect(info)
                client = RendezvousClient(host, info.peer_id)
                assert await client.register("ns", 7200) == 7200
                clients.append(client)
            peers, cookie = await clients[0].discover("ns")
            assert {str(peer.peer_id) for peer in peers} == {SeededSigner(8).peer_id, SeededSigner(9).peer_id}
            assert {str(address) for peer in peers for address in peer.addrs} == {
                str(host.get_addrs()[0]).partition("/p2p/")[0] for host in (first, second)
            }
            assert (await clients[0].discover("ns", cookie=cookie))[0] == []
            await clients[1].unregister("ns")
            await until(lambda: len(serving.registrations) == 1)
