"""Simultaneous open on this machine: two ports that connect to each other, who is not connected to, what is closed."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshmax.base.traversal import Candidate
from meshmax.net.observer import Observer, open_observer
from meshmax.net.punch import TcpPuncher, TcpPunchPort
from meshmax.ports import ByteStream
from meshmax.services.stun_server import StunServer

pytestmark = pytest.mark.loopback


@asynccontextmanager
async def observed() -> AsyncIterator[Observer]:
    async with open_observer([("127.0.0.1", 0)], StunServer(trio.current_time).answer) as observer:
        yield observer


def at(ip: str, port: int, kind: str = "srflx") -> Candidate:
    return Candidate(kind, "tcp", ip, port)  # type: ignore[arg-type]


def target_of(port: TcpPunchPort) -> Candidate:
    return at("127.0.0.1", port.port)


def channel() -> tuple[trio.MemorySendChannel[ByteStream], trio.MemoryReceiveChannel[ByteStream]]:
    return trio.open_memory_channel(math.inf)


async def meet(one: TcpPunchPort, other: TcpPunchPort, late_s: float = 0.0) -> tuple[ByteStream, ByteStream]:
    """The first connection that both ends of which were handed on."""
    met: list[tuple[ByteStream, ByteStream]] = []
    ends: dict[tuple[str, int], list[ByteStream]] = {}
    async with trio.open_nursery() as nursery:

        async def side(port: TcpPunchPort, towards: TcpPunchPort, wait_s: float) -> None:
            send, receive = channel()
            await trio.sleep(wait_s)
            nursery.start_soon(port.run, [target_of(towards)], send)
            async for stream in receive:
                met_at = ends.setdefault(("", 0), [])
                met_at.append(stream)
                if len(met_at) == 2:
                    met.append((met_at[0], met_at[1]))
                    nursery.cancel_scope.cancel()

        with trio.fail_after(5):
            nursery.start_soon(side, one, other, 0.0)
            nursery.start_soon(side, other, one, late_s)
            while not met:
                await trio.sleep(0.01)
    return met[0]


async def exchange(one: ByteStream, other: ByteStream) -> bytes:
    await one.send_all(b"hello")
    with trio.fail_after(2):
        return await other.receive_some(5)


@pytest.mark.parametrize("late_s", [0.0, 0.05, 0.4])
async def test_two_ports_meet_though_one_side_begins_later(late_s: float) -> None:
    puncher = TcpPuncher(loopback=True)
    async with puncher.open_port([]) as one, puncher.open_port([]) as other:
        left, right = await meet(one, other, late_s)
        try:
            assert await exchange(left, right) == b"hello"
            assert await exchange(right, left) == b"hello"
        finally:
            left.close()
            right.close()
