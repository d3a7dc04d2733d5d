"""Simultaneous open on this machine: two ports that connect to each other, who is not connected to, what is closed."""

import math
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import psutil
import pytest
import trio

from meshmax.base.traversal import PUNCH_TCP_S, Candidate
from meshmax.net.observer import Observer, open_observer
from meshmax.net.punch import MAX_STRANGERS, MAX_TARGETS, READY_S, TcpPuncher, TcpPunchPort, choose_targets
from meshmax.ports import ByteStream
from meshmax.services.stun_server import StunServer

pytestmark = pytest.mark.loopback

PROMPTLY_S = 20.0  # for what takes milliseconds on an idle machine


def at(ip: str, port: int, kind: str = "srflx", transport: str = "tcp") -> Candidate:
    return Candidate(kind, transport, ip, port)  # type: ignore[arg-type]


def socket_ports() -> list[int]:
    """The local ports of this process's TCP sockets."""
    return [entry.laddr.port for entry in psutil.Process(os.getpid()).net_connections("tcp") if entry.laddr]


class Side:
    """A port, and the connections that it found."""

    def __init__(self, port: TcpPunchPort) -> None:
        self.port = port
        self.send, self.receive = trio.open_memory_channel[ByteStream](math.inf)
        self.found: list[ByteStream] = []

    async def run(self, targets: list[Candidate], late_s: float = 0.0) -> None:
        await trio.sleep(late_s)
        await self.port.run(targets, self.send)

    async def next(self) -> ByteStream:
        with trio.fail_after(PROMPTLY_S):
            stream = await self.receive.receive()
        self.found.append(stream)
        return stream

    def close(self) -> None:
        with suppress(trio.WouldBlock, trio.ClosedResourceError):
            while True:
                self.found.append(self.receive.receive_nowait())
        for stream in self.found:
            stream.close()


@asynccontextmanager
async def sides(count: int = 2, loopback: bool = True) -> AsyncIterator[list[Side]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            port = await stack.enter_async_context(TcpPuncher(loopback=loopback).open_port([]))
            made.append(Side(port))
            stack.callback(made[-1].close)
        yield made


@asynccontextmanager
async def observed() -> AsyncIterator[tuple[Observer, tuple[str, int]]]:
    async with open_observer([("127.0.0.1", 0)], StunServer(trio.current_time).answer) as observer:
        yield observer, observer.addresses[0]


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[str, int]]:
    """Somebody who accepts and never says a word."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener.socket.getsockname()[:2]


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("late_s", [0.0, 0.05, 0.4])
async def test_two_ports_meet_though_one_side_begins_later(late_s: float, ip: str) -> None:
    async with sides() as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.run, [at(ip, other.port.port)])
        nursery.start_soon(other.run, [at(ip, one.port.port)], late_s)
        left, right = await one.next(), await other.next()
        assert (left.remote, right.remote) == ((ip, other.port.port), (ip, one.port.port))
        await left.send_all(b"hello")
        assert await right.receive_some(5) == b"hello"
        await right.send_all(b"there")
        assert await left.receive_some(5) == b"there"
        nursery.cancel_scope.cancel()


async def test_a_side_that_is_only_met_hands_on_who_comes_from_another_port_than_told() -> None:
    async with sides() as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.run, [at("127.0.0.1", 1)])  # a NAT gave the other side another port than it told
        nursery.start_soon(other.run, [at("127.0.0.1", one.port.port)])
        assert (await one.next()).remote == ("127.0.0.1", other.port.port)
        nursery.cancel_scope.cancel()


# --- observers -------------------------------------------------------------------------------------------------------


async def test_the_mapped_address_is_told_and_its_connection_kept_for_as_long_as_the_port() -> None:
    async with observed() as (observer, place):
        async with TcpPuncher().open_port([place]) as port:
            assert at("127.0.0.1", port.port) in port.candidates
            assert all(each.port == port.port for each in port.candidates)
            assert not any(each.kind == "host" and each.ip in ("127.0.0.1", "::1") for each in port.candidates)
            assert observer.connections == 1
        with trio.fail_after(PROMPTLY_S):
            while observer.connections:  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.01)


async def test_an_address_that_is_our_own_is_told_once() -> None:
    async with observed() as (_, place), TcpPuncher(loopback=True).open_port([place]) as port:
        assert [each for each in port.candidates if each.ip == "127.0.0.1"] == [at("127.0.0.1", port.port, "host")]


async def test_an_observer_that_is_silent_or_away_gives_its_place_to_the_next() -> None:
    async with observed() as (observer, place), silent() as dumb:
        began_s = trio.current_time()
        async with TcpPuncher().open_port([("127.0.0.1", 1), dumb, place]) as port:
            assert at("127.0.0.1", port.port) in port.candidates
            assert observer.connections == 1
        assert trio.current_time() - began_s < READY_S


async def test_a_port_is_ready_in_time_where_no_observer_answers() -> None:
    async with silent() as dumb:
        began_s = trio.current_time()
        async with TcpPuncher().open_port([dumb] * 100) as port:
            assert trio.current_time() - began_s < READY_S + 0.5
            assert all(each.kind == "host" for each in port.candidates)
            assert socket_ports().count(port.port) <= 2  # those that listen


# --- who may be connected to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        at("127.0.0.1", 5000),
        at("::1", 5000),
        at("::ffff:127.0.0.1", 5000),
        at("0.0.0.0", 5000),
        at("::", 5000),
        at("224.0.0.1", 5000),
        at("ff02::1", 5000),
        at("169.254.1.1", 5000),
        at("fe80::1", 5000),
        at("fe80::1%eth0", 5000),
        at("255.255.255.255", 5000),
        at("11.22.33.44", 0),
        at("11.22.33.44", 5000, transport="udp"),
        at("example.org", 5000),
        at("", 5000),
        at("11.22.33.1", 4000),
    ],
)
def test_what_is_no_peer_or_is_ourselves_is_never_connected_to(target: Candidate) -> None:
    assert choose_targets([target], own=[at("11.22.33.1", 4000)]) == []


def test_of_many_targets_a_few_are_connected_to_mapped_ones_first() -> None:
    hosts = [at(f"10.0.0.{number}", 5000, "host") for number in range(1, 200)]
    mapped = at("11.22.33.44", 5000)
    assert choose_targets([*hosts, mapped, mapped]) == [mapped, *hosts[: MAX_TARGETS - 1]]


async def test_a_hostile_list_of_targets_costs_a_few_sockets_and_two_seconds() -> None:
    async with sides(1) as (one,), trio.open_nursery() as nursery, silent() as place:
        # A full backlog would be needed for SYNs without an answer; refused ones at least come back again and again.
        targets = [at("127.0.0.1", number) for number in range(1, 1000)]
        most, began_s = 0, trio.current_time()

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, socket_ports().count(one.port.port))
                await trio.sleep(0.02)

        nursery.start_soon(watch)
        await one.run([*targets, at(*place)])
        assert trio.current_time() - began_s < PUNCH_TCP_S + 0.5
        assert most <= 2 + MAX_TARGETS
        nursery.cancel_scope.cancel()


async def test_strangers_are_handed_on_a_few_times_and_keep_nobody_out() -> None:
    async with sides() as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.run, [at("::1", other.port.port)])
        place = ("127.0.0.1", one.port.port)
        strangers = [await trio.open_tcp_stream(*place) for _ in range(MAX_STRANGERS + 3)]
        for stranger in strangers[MAX_STRANGERS:]:
            with trio.fail_after(PROMPTLY_S), suppress(trio.BrokenResourceError):
                assert await stranger.receive_some(1) == b""
        nursery.start_soon(other.run, [at("::1", one.port.port)])
        met = [(await one.next()).remote[0] for _ in range(MAX_STRANGERS + 1)]
        assert sorted(met) == ["127.0.0.1"] * MAX_STRANGERS + ["::1"]
        nursery.cancel_scope.cancel()
        for stranger in strangers:
            stranger.socket.close()


# --- what is closed --------------------------------------------------------------------------------------------------


async def test_the_run_ends_when_nobody_wants_connections_any_more() -> None:
    async with sides() as (one, other), trio.open_nursery() as nursery:
        one.receive.close()
        nursery.start_soon(other.run, [at("127.0.0.1", one.port.port)])
        with trio.fail_after(PUNCH_TCP_S - 0.5):
            await one.run([at("127.0.0.1", other.port.port)])
        with trio.fail_after(PROMPTLY_S), suppress(trio.BrokenResourceError):
            assert await (await other.next()).receive_some(1) == b""
        nursery.cancel_scope.cancel()


async def test_cancelling_closes_everything_but_what_was_handed_on() -> None:
    async with observed() as (_, place):
        async with TcpPuncher(loopback=True).open_port([place]) as port, sides(1) as (other,):
            one = Side(port)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.run, [at("127.0.0.1", other.port.port), at("127.0.0.1", 1), at("127.0.0.1", 2)])
                nursery.start_soon(other.run, [at("127.0.0.1", port.port)])
                stream = await one.next()
                nursery.cancel_scope.cancel()
        assert socket_ports().count(port.port) == 1
        one.close()
        assert stream.remote == ("127.0.0.1", other.port.port)
        assert port.port not in socket_ports()
