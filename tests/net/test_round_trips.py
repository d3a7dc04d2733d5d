"""How many round trips there are until a connection can be used, between real libp2p hosts in simulated time."""

import math
from functools import partial
from typing import Any, Final

import pytest
import trio

from meshmax.base.errors import VersionMismatch
from meshmax.net.swarm import LibrarySwarm
from meshmax.ports import Stream
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import CONTROL_PORT, SimNetwork

ONE_WAY_S: Final = 0.05
ROUND_TRIP_S: Final = 2 * ONE_WAY_S
ADMISSION: Final = 1  # round trips of the admission below
ECHO: Final = "/meshmax/echo/1.0.0"


class OneWord:
    """Members say the same word: one round trip."""

    async def admit(self, stream: Stream, direction: str) -> None:
        if direction == "out":
            await stream.send_all(b"word")
        assert await stream.receive_some(4) == b"word"
        if direction == "in":
            await stream.send_all(b"word")

    def check(self, peer_id: str, protocol: str) -> None:
        pass


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def round_trips_since(began_s: float) -> int:
    return math.ceil((trio.current_time() - began_s) / ROUND_TRIP_S - 0.01)


async def test_dialling_a_member_takes_a_round_trip_for_tcp_one_for_noise_and_those_of_the_admission(
    autojump_clock: Any,
) -> None:
    network, word = SimNetwork(ONE_WAY_S), OneWord()
    async with network.open_swarm(bytes(32), word) as a, network.open_swarm(SeededSigner(2).private_bytes, word) as b:
        began_s = trio.current_time()
        await a.dial(b.peer_id, b.addresses)
        assert round_trips_since(began_s) == 2 + ADMISSION


async def test_adopting_a_byte_stream_takes_a_round_trip_for_noise_and_those_of_the_admission(
    autojump_clock: Any,
) -> None:
    network, word = SimNetwork(ONE_WAY_S), OneWord()
    here, there = network.wires.attach(), network.wires.attach()
    async with network.open_swarm(bytes(32), word) as a, network.open_swarm(SeededSigner(2).private_bytes, word) as b:
        listener = await there.listen("", CONTROL_PORT)
        near = await here.connect(there.ip, CONTROL_PORT)
        far = await listener.accept()
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(b.adopt, far, a.peer_id, "in", "punched-tcp", "/ip4/10.0.0.1/tcp/1"))
            await a.adopt(near, b.peer_id, "out", "punched-tcp", "/ip4/10.0.0.2/tcp/1")
            assert round_trips_since(began_s) == 1 + ADMISSION
        listener.close()


@pytest.fixture
async def pair() -> Any:
    network = SimNetwork(ONE_WAY_S)
    async with network.open_swarm(bytes(32)) as a, network.open_swarm(SeededSigner(2).private_bytes) as b:
        b.serve(ECHO, echo)
        yield a, b


async def test_without_admission_dialling_ends_when_the_peer_has_agreed_to_all(
    autojump_clock: Any, pair: tuple[LibrarySwarm, LibrarySwarm]
) -> None:
    a, b = pair
    began_s = trio.current_time()
    await a.dial(b.peer_id, b.addresses)
    assert round_trips_since(began_s) == 3


async def test_opening_a_stream_takes_one_round_trip(
    autojump_clock: Any, pair: tuple[LibrarySwarm, LibrarySwarm]
) -> None:
    a, b = pair
    await a.dial(b.peer_id, b.addresses)
    began_s = trio.current_time()
    await a.open_stream(b.peer_id, ECHO)
    assert round_trips_since(began_s) == 1


async def test_an_eager_stream_is_answered_after_one_round_trip_in_all(
    autojump_clock: Any, pair: tuple[LibrarySwarm, LibrarySwarm]
) -> None:
    a, b = pair
    await a.dial(b.peer_id, b.addresses)
    began_s = trio.current_time()
    stream = await a.open_stream(b.peer_id, ECHO, eager=True)
    await stream.send_all(b"hello")
    assert await stream.receive_some(10) == b"hello"
    assert round_trips_since(began_s) == 1


async def test_that_an_eager_streams_protocol_is_not_served_shows_with_the_answer(
    autojump_clock: Any, pair: tuple[LibrarySwarm, LibrarySwarm]
) -> None:
    a, b = pair
    await a.dial(b.peer_id, b.addresses)
    stream = await a.open_stream(b.peer_id, "/meshmax/other/1.0.0", eager=True)
    await stream.send_all(b"hello")
    with pytest.raises(VersionMismatch):
        await stream.receive_some(10)
