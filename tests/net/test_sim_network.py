from typing import Any

import pytest
import trio

from meshmax.base.errors import ConnectError
from meshmax.ports import Sighting, Stream
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import SimNetwork

ECHO = "/meshmax/echo/1.0.0"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def test_a_frozen_peer_is_not_noticed_until_it_is_disconnected_and_can_come_back(autojump_clock: Any) -> None:
    network = SimNetwork(latency_s=0.02)
    one, two = SeededSigner(1).private_bytes, SeededSigner(2).private_bytes
    async with network.open_swarm(one) as a, network.open_swarm(two) as b, a.subscribe() as events:
        b.serve(ECHO, echo)
        await a.dial(b.peer_id, b.addresses)
        assert (await events.receive()).kind == "connected"
        network.freeze(b.peer_id)
        await trio.sleep(60)
        assert b.peer_id in a.connections()
        await a.disconnect(b.peer_id)
        assert (await events.receive()).kind == "disconnected"
        with pytest.raises(ConnectError):
            await a.dial(b.peer_id, b.addresses)
        network.thaw(b.peer_id)
        await a.dial(b.peer_id, b.addresses)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"back")
        assert await stream.receive_some(10) == b"back"
        network.kill(b.peer_id)
        assert (await events.receive()).kind == "connected"
        assert (await events.receive()).kind == "disconnected"


async def test_a_partition_stops_bytes_and_healing_lets_them_through(autojump_clock: Any) -> None:
    network = SimNetwork()
    one, two = SeededSigner(1).private_bytes, SeededSigner(2).private_bytes
    async with network.open_swarm(one) as a, network.open_swarm(two) as b:
        b.serve(ECHO, echo)
        await a.dial(b.peer_id, b.addresses)
        stream = await a.open_stream(b.peer_id, ECHO)
        network.partition(a.peer_id, b.peer_id)
        await stream.send_all(b"x")
        with trio.move_on_after(5) as scope:
            await stream.receive_some(1)
        assert scope.cancelled_caught
        network.heal(a.peer_id, b.peer_id)
        with trio.fail_after(1):
            assert await stream.receive_some(1) == b"x"


async def test_everybody_on_the_lan_is_sighted_soon(autojump_clock: Any) -> None:
    network = SimNetwork()
    sink, source = trio.open_memory_channel[Sighting](10)
    one, two = SeededSigner(1).private_bytes, SeededSigner(2).private_bytes
    async with network.open_swarm(one) as a, network.open_swarm(two) as b, trio.open_nursery() as nursery:
        nursery.start_soon(network.discovery(a.peer_id).run, sink)
        with trio.fail_after(1):
            assert await source.receive() == Sighting(b.peer_id, b.addresses, "mdns")
        nursery.cancel_scope.cancel()
