"""Relaying between two peers: who gets a circuit, what flows through it, and how each way of ending it looks."""

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId
from meshmax.core.relay import Relay, RelayLimits
from meshmax.ports import Stream, Swarm
from meshmax.services import relay_server as module
from meshmax.services.relay_server import RelayServer, open_relay_server
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import MemoryNetwork, SeededSigner
from meshmax.wire import relay as wire
from meshmax.wire.protocols import PING, RELAY_HOP, RELAY_STOP

UNIX_S = 1_700_000_000.0


class Site:
    """A relay that is in no mesh, and peers that are its guests."""

    def __init__(self, stack: AsyncExitStack, limits: RelayLimits) -> None:
        self.network = MemoryNetwork()
        self._stack, self._limits = stack, limits
        self.swarm: Swarm
        self.server: RelayServer

    async def open(self) -> None:
        enter = self._stack.enter_async_context
        self.swarm = await enter(self.network.open_swarm(SeededSigner(99), NoMesh()))
        opened = open_relay_server(self.swarm, lambda: UNIX_S + trio.current_time(), Relay(self._limits))
        self.server = await enter(opened)

    async def peer(self, seed: int, accept: Callable[[Stream], Awaitable[None]] | None = None) -> Swarm:
        swarm = await self._stack.enter_async_context(self.network.open_swarm(SeededSigner(seed)))
        if accept is not None:
            swarm.serve(RELAY_STOP, accept)
        swarm.serve(PING, _pong)
        await swarm.dial(self.swarm.peer_id, self.swarm.addresses, guest=True)
        return swarm

    async def reserve(self, swarm: Swarm) -> wire.RelayStatus:
        return await self.say(swarm, wire.encode_reserve())

    async def say(self, swarm: Swarm, request: bytes) -> wire.RelayStatus:
        stream = await swarm.open_stream(self.swarm.peer_id, RELAY_HOP)
        await stream.send_all(request)
        status = wire.parse_hop_status(await message(stream))
        await stream.aclose()
        return status

    async def circuit(self, swarm: Swarm, target: Swarm) -> Stream:
        stream = await swarm.open_stream(self.swarm.peer_id, RELAY_HOP)
        await stream.send_all(wire.encode_connect(target.peer_id))
        status = wire.parse_hop_status(await message(stream))
        assert status.status == wire.OK
        return stream


async def _pong(stream: Stream) -> None:
    while data := await stream.receive_some(32):
        await stream.send_all(data)


async def message(stream: Stream) -> bytes:
    """The body of one message; byte by byte, so that what follows stays in the stream."""
    data = b""
    while True:
        data += await stream.receive_some(1)
        if taken := wire.try_take(data):
            return taken[0]


async def echo(stream: Stream) -> None:
    """Accept a circuit, and say back what comes until the other side ends."""
    wire.parse_stop_connect(await message(stream))
    await stream.send_all(wire.encode_stop_status(wire.OK))
    while data := await stream.receive_some(65536):
        await stream.send_all(data)
    await stream.send_eof()


async def read_all(stream: Stream) -> bytes:
    data = b""
    while part := await stream.receive_some(65536):
        data += part
    return data


@asynccontextmanager
async def site(limits: RelayLimits = RelayLimits()) -> AsyncIterator[Site]:  # noqa: B008  frozen
    with trio.fail_after(10_000):
        async with AsyncExitStack() as stack:
            made = Site(stack, limits)
            await made.open()
            yield made


async def test_bytes_go_both_ways_whole_and_both_ends_end_in_order(autojump_clock: Any) -> None:
    async with site(RelayLimits(rate_bytes_per_s=10 << 20)) as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        assert (await here.reserve(b)).status == wire.OK
        stream = await here.circuit(a, b)
        sent = random.Random(1).randbytes(3_000_000)
        got = b""

        async def send() -> None:
            for at in range(0, len(sent), 50_000):
                await stream.send_all(sent[at : at + 50_000])
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            got = await read_all(stream)
        assert got == sent
        await trio.sleep(0.1)
        assert here.server.circuits == 0


async def test_a_reservation_says_until_when_it_holds_and_what_a_circuit_may_carry(autojump_clock: Any) -> None:
    async with site() as here:
        b = await here.peer(2)
        status = await here.reserve(b)
        assert status.expires_at_s == pytest.approx(UNIX_S + trio.current_time() + 3600, abs=2)
        assert status.limit == wire.Limit(1800, 64 << 20, 128 << 10)


async def test_what_either_side_says_together_with_its_handshake_is_not_lost(autojump_clock: Any) -> None:
    async def hasty(stream: Stream) -> None:
        await message(stream)
        await stream.send_all(wire.encode_stop_status(wire.OK) + b"first words")
        assert await stream.receive_some(100) == b"hasty words"
        await stream.send_eof()

    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, hasty)
        await here.reserve(b)
        stream = await a.open_stream(here.swarm.peer_id, RELAY_HOP)
        await stream.send_all(wire.encode_connect(b.peer_id) + b"hasty words")
        assert wire.parse_hop_status(await message(stream)).status == wire.OK
        assert await read_all(stream) == b"first words"


async def test_the_target_learns_who_asks_and_the_limits(autojump_clock: Any) -> None:
    told: list[wire.Connect] = []

    async def accept(stream: Stream) -> None:
        told.append(wire.parse_stop_connect(await message(stream)))
        await stream.send_all(wire.encode_stop_status(wire.OK))

    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, accept)
        await here.reserve(b)
        await here.circuit(a, b)
        assert told == [wire.Connect(a.peer_id, wire.Limit(1800, 64 << 20, 128 << 10))]


@pytest.mark.parametrize("target", ["nobody", "itself", "no reservation"])
async def test_who_cannot_be_reached_through_us_is_refused_with_a_status(autojump_clock: Any, target: str) -> None:
    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        targets: dict[str, tuple[PeerId, int]] = {
            "nobody": (SeededSigner(77).peer_id, wire.NO_RESERVATION),
            "itself": (a.peer_id, wire.PERMISSION_DENIED),
            "no reservation": (b.peer_id, wire.NO_RESERVATION),
        }
        peer_id, expected = targets[target]
        assert (await here.say(a, wire.encode_connect(peer_id))).status == expected


@pytest.mark.parametrize("garbage", [b"\x00", b"\xff\xff\xff\xff", b"\x02\x08\x02", b"\x03\xff\xff\xff"])
async def test_garbage_is_answered_with_a_status_and_costs_only_its_stream(autojump_clock: Any, garbage: bytes) -> None:
    async with site() as here:
        a = await here.peer(1)
        assert (await here.say(a, garbage)).status == wire.MALFORMED_MESSAGE
        assert (await here.reserve(a)).status == wire.OK


async def test_who_says_nothing_is_not_waited_for(autojump_clock: Any) -> None:
    async with site() as here:
        a = await here.peer(1)
        stream = await a.open_stream(here.swarm.peer_id, RELAY_HOP)
        began = trio.current_time()
        with pytest.raises(PeerGone):
            await stream.receive_some(1)
        assert trio.current_time() - began < module.REQUEST_TIMEOUT_S + 1


async def test_a_target_that_refuses_is_mute_or_speaks_garbage_fails_the_circuit_alone(autojump_clock: Any) -> None:
    async def refuse(stream: Stream) -> None:
        await message(stream)
        await stream.send_all(wire.encode_stop_status(wire.PERMISSION_DENIED))

    async def mute(stream: Stream) -> None:
        await trio.sleep_forever()

    async def garbage(stream: Stream) -> None:
        await stream.send_all(b"\x00\x00\x00")

    async with site() as here:
        a = await here.peer(1)
        for seed, accept in enumerate((refuse, mute, garbage), 2):
            b = await here.peer(seed, accept)
            await here.reserve(b)
            assert (await here.say(a, wire.encode_connect(b.peer_id))).status == wire.CONNECTION_FAILED
        assert here.server.circuits == 0


async def test_a_target_that_left_is_reported_and_loses_its_place(autojump_clock: Any) -> None:
    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        await here.reserve(b)
        here.network.kill(b.peer_id)
        assert (await here.say(a, wire.encode_connect(b.peer_id))).status == wire.CONNECTION_FAILED
        assert (await here.say(a, wire.encode_connect(b.peer_id))).status == wire.NO_RESERVATION


@pytest.mark.parametrize("leaver", ["asker", "target"])
async def test_when_one_side_goes_the_other_learns_at_once_and_other_circuits_go_on(
    autojump_clock: Any, leaver: str
) -> None:
    ended = trio.Event()

    async def accept(stream: Stream) -> None:
        await message(stream)
        await stream.send_all(wire.encode_stop_status(wire.OK))
        try:
            while data := await stream.receive_some(100):
                if data == b"leave" and leaver == "target":
                    await stream.reset()
                    return
                await stream.send_all(data)
        except PeerGone:
            ended.set()

    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, accept)
        await here.reserve(b)
        one, two = await here.circuit(a, b), await here.circuit(a, b)
        if leaver == "asker":
            await one.reset()
            with trio.fail_after(5):
                await ended.wait()
        else:
            await one.send_all(b"leave")
            with pytest.raises(PeerGone), trio.fail_after(5):
                await one.receive_some(100)
        await two.send_all(b"still here")
        assert await two.receive_some(100) == b"still here"
        assert here.server.circuits == 1


async def test_a_circuit_that_is_used_up_is_reset_at_both_ends(autojump_clock: Any) -> None:
    async with site(RelayLimits(data_bytes=100_000)) as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        await here.reserve(b)
        stream = await here.circuit(a, b)
        got = 0
        with contextlib.suppress(PeerGone):
            while got < 1_000_000:
                await stream.send_all(bytes(10_000))
                got += len(await stream.receive_some(10_000))
        assert 50_000 <= got <= 100_000
        await trio.sleep(0.1)
        assert here.server.circuits == 0


async def test_a_circuit_ends_with_its_time_and_an_idle_one_earlier(autojump_clock: Any) -> None:
    async with site(RelayLimits(duration_s=100, idle_s=20)) as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        await here.reserve(b)
        idle, busy = await here.circuit(a, b), await here.circuit(a, b)
        began = trio.current_time()

        async def until_gone(stream: Stream, every_s: float) -> float:
            try:
                while True:
                    await trio.sleep(every_s)
                    await stream.send_all(b"x")
                    await stream.receive_some(1)
            except PeerGone:
                return trio.current_time() - began

        lasted: dict[str, float] = {}

        async def watch(name: str, stream: Stream, every_s: float) -> None:
            lasted[name] = await until_gone(stream, every_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, "idle", idle, 25)
            nursery.start_soon(watch, "busy", busy, 10)
        assert 20 <= lasted["idle"] <= 26
        assert 100 <= lasted["busy"] <= 111


async def test_a_circuit_keeps_to_its_rate(autojump_clock: Any) -> None:
    async with site(RelayLimits(rate_bytes_per_s=100_000)) as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        await here.reserve(b)
        stream = await here.circuit(a, b)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for _ in range(100):
                    await stream.send_all(bytes(10_000))
                await stream.send_eof()

            nursery.start_soon(send)
            assert len(await read_all(stream)) == 1_000_000
        assert 9 < trio.current_time() - began < 12


async def test_a_slow_reader_holds_up_its_own_circuit_and_little_memory(autojump_clock: Any) -> None:
    async def deaf(stream: Stream) -> None:
        await message(stream)
        await stream.send_all(wire.encode_stop_status(wire.OK))
        await trio.sleep_forever()

    async with site(RelayLimits(rate_bytes_per_s=100 << 20, idle_s=60)) as here:
        a, b, c = await here.peer(1), await here.peer(2, deaf), await here.peer(3, echo)
        await here.reserve(b)
        await here.reserve(c)
        held, free = await here.circuit(a, b), await here.circuit(a, c)
        sent = 0
        with trio.move_on_after(10):
            while sent < 10_000_000:
                await held.send_all(bytes(10_000))
                sent += 10_000
        assert sent < 2_000_000  # the buffers of two streams
        await free.send_all(b"free")
        assert await free.receive_some(100) == b"free"


async def test_a_peer_with_a_reservation_is_kept_and_one_that_is_frozen_loses_its_place(autojump_clock: Any) -> None:
    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        await here.reserve(b)
        await trio.sleep(20 * 60)
        a = await here.peer(3)  # the first one was idle, and let go
        stream = await here.circuit(a, b)
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        await stream.aclose()
        here.network.freeze(b.peer_id)
        await trio.sleep(2 * module.PING_S)
        relay = here.server.relay
        assert relay is not None
        assert relay.reserved() == ()


async def test_a_flood_of_requests_is_paced_and_others_are_served(autojump_clock: Any) -> None:
    async with site() as here:
        a, b = await here.peer(1), await here.peer(2, echo)
        statuses = [(await here.reserve(a)).status for _ in range(30)]
        assert statuses.count(wire.RESOURCE_LIMIT_EXCEEDED) >= 10
        assert (await here.reserve(b)).status == wire.OK


@pytest.mark.parametrize("at_s", [0.0, 0.5, 5.0, 9.9])
async def test_at_whatever_moment_of_a_ping_that_is_not_answered_a_peer_asks_anew_it_keeps_its_place(
    autojump_clock: Any, at_s: float
) -> None:
    async with site() as here:
        b = await here.peer(1, echo)
        await here.reserve(b)
        pinged = trio.Event()

        async def mute(stream: Stream) -> None:  # as over the connection that it had before its router forgot it
            pinged.set()
            await trio.sleep_forever()

        b.serve(PING, mute)
        await pinged.wait()
        await trio.sleep(at_s)
        assert (await here.reserve(b)).status == wire.OK
        b.serve(PING, _pong)
        await trio.sleep(module.PING_TIMEOUT_S + 2.0)
        assert here.server.relay is not None
        assert b.peer_id in here.server.relay.reserved()
