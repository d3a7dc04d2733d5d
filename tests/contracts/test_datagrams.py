"""What every Datagrams does: real UDP on loopback, and the network in memory."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import pytest
import trio
import trio.testing

from meshmax.net.datagrams import open_datagrams
from meshmax.ports import Datagrams
from meshmax.testing.memory_datagrams import open_net

DHT, STUN = range(0xD8, 0xD9), range(4)
PATIENCE_S = 5.0


class Wires(Protocol):
    def open(self, host: int) -> AbstractAsyncContextManager[Datagrams]: ...


class Loopback:
    def open(self, host: int) -> AbstractAsyncContextManager[Datagrams]:
        return open_datagrams([("127.0.0.1", 0)])


class Memory:
    @asynccontextmanager
    async def open(self, host: int) -> AsyncIterator[Datagrams]:
        if host == 1:
            async with open_net(seed=1) as self._net:
                yield self._net.open()
        else:
            yield self._net.open()


@pytest.fixture(params=["memory", pytest.param("loopback", marks=pytest.mark.loopback)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wires(kind: str) -> Wires:
    kinds: dict[str, Callable[[], Wires]] = {"memory": Memory, "loopback": Loopback}
    return kinds[kind]()


@pytest.fixture
def clock(kind: str) -> trio.testing.MockClock | None:
    return None if kind == "loopback" else trio.testing.MockClock(autojump_threshold=0)


class Inbox:
    """What came in, and a way to wait for it."""

    def __init__(self) -> None:
        self.datagrams: list[tuple[bytes, tuple[str, int]]] = []
        self._come = trio.Event()

    def put(self, data: bytes, sender: tuple[str, int]) -> None:
        self.datagrams.append((data, sender))
        self._come.set()

    async def first(self, count: int = 1) -> Sequence[tuple[bytes, tuple[str, int]]]:
        with trio.fail_after(PATIENCE_S):
            while len(self.datagrams) < count:
                self._come = trio.Event()
                await self._come.wait()
        return self.datagrams


async def test_a_datagram_arrives_whole_with_the_address_that_answers_it(wires: Wires, clock: Any) -> None:
    async with wires.open(1) as a, wires.open(2) as b:
        at_a, at_b = Inbox(), Inbox()
        a.receive(DHT, at_a.put)
        b.receive(DHT, at_b.put)
        a.send(b"\xd8 question", b.addresses[0])
        ((data, sender),) = await at_b.first()
        assert (data, sender) == (b"\xd8 question", a.addresses[0])
        b.send(b"\xd8 answer", sender)
        assert await at_a.first() == [(b"\xd8 answer", b.addresses[0])]


async def test_each_protocol_gets_the_datagrams_that_begin_with_its_bytes_and_nobody_the_rest(
    wires: Wires, clock: Any
) -> None:
    async with wires.open(1) as a, wires.open(2) as b:
        dht, stun = Inbox(), Inbox()
        b.receive(DHT, dht.put)
        b.receive(STUN, stun.put)
        for first in (0x16, 0xD8, 0x00, 0x80, 0x03, 0xD7, 0xD8):
            a.send(bytes([first, 1]), b.addresses[0])
        assert [data[0] for data, _ in await dht.first(2)] == [0xD8, 0xD8]
        assert [data[0] for data, _ in await stun.first(2)] == [0x00, 0x03]


async def test_a_byte_has_one_receiver(wires: Wires, clock: Any) -> None:
    async with wires.open(1) as a:
        a.receive(STUN, Inbox().put)
        with pytest.raises(ValueError, match="receiver already"):
            a.receive(range(3, 5), Inbox().put)


async def test_a_receiver_that_fails_costs_one_datagram(wires: Wires, clock: Any, kind: str) -> None:
    if kind == "memory":
        pytest.skip("in simulations a receiver's mistake ends the test")
    async with wires.open(1) as a, wires.open(2) as b:
        inbox = Inbox()

        def picky(data: bytes, sender: tuple[str, int]) -> None:
            if data == b"\xd8bad":
                raise RuntimeError("no")
            inbox.put(data, sender)

        b.receive(DHT, picky)
        for data in (b"\xd8bad", b"\xd8good"):
            a.send(data, b.addresses[0])
        assert (await inbox.first())[0][0] == b"\xd8good"


@pytest.mark.parametrize(
    "to", [("127.0.0.1", 1), ("0.0.0.1", 9), ("example.invalid", 9), ("", 9), ("::1", 9), ("127.0.0.1", 0), ("1.2.3.4", 99999)]
)  # fmt: skip
async def test_what_cannot_be_sent_is_dropped_and_the_rest_goes_on(
    wires: Wires, clock: Any, to: tuple[str, int]
) -> None:
    async with wires.open(1) as a, wires.open(2) as b:
        inbox = Inbox()
        b.receive(DHT, inbox.put)
        a.send(b"\xd8lost", to)
        a.send(b"", b.addresses[0])
        a.send(b"\xd8" * 70_000, b.addresses[0])
        a.send(b"\xd8kept", b.addresses[0])
        assert (await inbox.first())[0][0] == b"\xd8kept"


async def test_a_receiver_may_send_from_where_it_is_called(wires: Wires, clock: Any) -> None:
    async with wires.open(1) as a, wires.open(2) as b:
        b.receive(DHT, lambda data, sender: b.send(data.upper(), sender))
        inbox = Inbox()
        a.receive(DHT, inbox.put)
        a.send(b"\xd8ping", b.addresses[0])
        assert (await inbox.first())[0][0] == b"\xd8PING"
