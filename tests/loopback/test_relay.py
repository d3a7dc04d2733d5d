"""Our relay with peers that are not ours: py-libp2p's own hosts and its relay client, over real sockets."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from meshmax.net import library
from meshmax.net.swarm import LibrarySwarm, open_swarm
from meshmax.services.relay_server import RelayServer, open_relay_server
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.protocols import RELAY_HOP

pytestmark = pytest.mark.loopback

ECHO = "/test/echo/1.0.0"
PATIENCE_S = 30.0


@asynccontextmanager
async def foreign_host() -> AsyncIterator[Any]:
    """A host of py-libp2p as its users make one, with its relay protocol as the target of circuits."""
    library.load()
    import libp2p
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
    from libp2p.tools.anyio_service.context import background_trio_service
    from multiaddr import Multiaddr

    host = libp2p.new_host(key_pair=create_new_key_pair(), muxer_preference="YAMUX")

    async def echo(stream: Any) -> None:
        while data := await stream.read(65536):
            await stream.write(data)

    host.set_stream_handler(ECHO, echo)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        protocol = CircuitV2Protocol(host, allow_hop=False)
        async with background_trio_service(protocol):
            await protocol.event_started.wait()
            host.circuit_protocol = protocol
            yield host


async def reserve(host: Any, swarm: LibrarySwarm) -> bool:
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.relay.circuit_v2.config import RelayConfig
    from libp2p.relay.circuit_v2.transport import CircuitV2Transport
    from multiaddr import Multiaddr

    info = info_from_p2p_addr(Multiaddr(swarm.addresses[0]))
    await host.connect(info)
    transport = CircuitV2Transport(host, host.circuit_protocol, RelayConfig())
    stream = await host.new_stream(info.peer_id, [RELAY_HOP])
    granted = bool(await transport._make_reservation(stream, info.peer_id))
    await stream.close()
    return granted


async def dial(host: Any, swarm: LibrarySwarm, target: Any) -> None:
    from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
    from libp2p.relay.circuit_v2.transport import CircuitV2Transport
    from multiaddr import Multiaddr

    transport = CircuitV2Transport(host, host.circuit_protocol, RelayConfig(roles=RelayRole.STOP))
    await transport.dial(Multiaddr(f"{swarm.addresses[0]}/p2p-circuit/p2p/{target.get_id()}"))


async def echoed(host: Any, target: Any, sent: bytes) -> bytes:
    stream = await host.new_stream(target.get_id(), [ECHO])
    await stream.write(sent)
    got = b""
    while len(got) < len(sent):
        got += await stream.read(len(sent) - len(got))
    await stream.close()
    return got


@asynccontextmanager
async def relay() -> AsyncIterator[tuple[LibrarySwarm, RelayServer]]:
    async with (
        open_swarm(SeededSigner(1).private_bytes, [("127.0.0.1", 0)], admission=NoMesh(), max_guests=16) as swarm,
        open_relay_server(swarm, time.time) as server,
    ):
        yield swarm, server


def run_quietly(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work``, and have the sockets that the library leaves open collected without its warnings."""
    trio.run(work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_foreign_peer_reserves_and_another_one_talks_to_it_through_us() -> None:
    run_quietly(talk_through_us)


def test_two_circuits_to_one_target_end_without_each_other() -> None:
    run_quietly(end_one_of_two)


async def talk_through_us() -> None:
    async with relay() as (swarm, server), foreign_host() as a, foreign_host() as b:
        with trio.fail_after(PATIENCE_S):
            assert await reserve(b, swarm)
            assert server.relay is not None
            assert [str(peer) for peer in server.relay.reserved()] == [str(b.get_id())]
            await dial(a, swarm, b)
            assert await echoed(a, b, b"through the relay" * 1000) == b"through the relay" * 1000
            assert server.circuits == 1


async def end_one_of_two() -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        swarm, server = await enter(relay())
        b = await enter(foreign_host())
        a = await enter(foreign_host())
        c = await enter(foreign_host())
        with trio.fail_after(PATIENCE_S):
            assert await reserve(b, swarm)
            await dial(a, swarm, b)
            await dial(c, swarm, b)
            assert server.circuits == 2
            assert await echoed(a, b, b"one") == b"one"
            await a.disconnect(b.get_id())
            while server.circuits > 1:  # noqa: ASYNC110  the end is seen from outside
                await trio.sleep(0.05)
            assert await echoed(c, b, b"two") == b"two"
