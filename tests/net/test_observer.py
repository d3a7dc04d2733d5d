"""The TCP observer in simulated time: who is answered, who makes way, who is cut off."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from meshmax.base.errors import ConfigError
from meshmax.net import observer as module
from meshmax.net.observer import Observer, open_observer
from meshmax.ports import ByteStream
from meshmax.services import stun_server
from meshmax.services.stun_server import StunServer
from meshmax.testing.memory_transport import MemoryTransport, MemoryWires
from meshmax.wire import stun

PORT = 11437


class Site:
    def __init__(self, wires: MemoryWires, observer: Observer, host: str) -> None:
        self.wires, self.observer, self.host = wires, observer, host

    async def connect(self, ip: str = "") -> ByteStream:
        client = MemoryTransport(self.wires, ip) if ip else self.wires.attach()
        return await client.connect(self.host, self.observer.addresses[0][1])


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    wires = MemoryWires()
    server = wires.attach()
    answer = StunServer(trio.current_time).answer
    async with open_observer([("0.0.0.0", PORT)], answer, transport=server) as observer:
        yield Site(wires, observer, server.interface_addresses()[0])


async def ask(stream: ByteStream, number: int = 1) -> stun.BindingAnswer:
    transaction = bytes([number]) * 12
    await stream.send_all(stun.encode_request(transaction))
    return stun.parse_answer(await receive(stream), transaction)


async def receive(stream: ByteStream) -> bytes:
    data = b""
    while len(data) < 20 or len(data) < stun.message_length(data[:20]):
        part = await stream.receive_some(1000)
        if not part:
            raise trio.BrokenResourceError
        data += part
    return data


async def is_over(stream: ByteStream) -> bool:
    try:
        return not await stream.receive_some(1)
    except (OSError, trio.BrokenResourceError):
        return True


async def test_who_asks_learns_where_it_comes_from_as_often_as_it_asks(autojump_clock: Any) -> None:
    async with site() as here:
        stream = await here.connect("10.0.7.7")
        first = await ask(stream, 1)
        await trio.sleep(module.IDLE_S - 1)
        assert await ask(stream, 2) == stun.BindingAnswer(b"\2" * 12, first.mapped)
        assert first.mapped is not None
        assert first.mapped[0] == "10.0.7.7"


async def test_a_question_in_pieces_and_two_at_once_are_answered(autojump_clock: Any) -> None:
    async with site() as here:
        stream = await here.connect()
        one, two = stun.encode_request(b"a" * 12), stun.encode_request(b"b" * 12, fingerprint=False)
        for byte in one[:-1]:
            await stream.send_all(bytes([byte]))
        await stream.send_all(one[-1:] + two)
        data = b""
        while len(data) < 40 + 32:
            data += await stream.receive_some(1000)
        assert stun.parse_answer(data[:40], b"a" * 12).mapped == stun.parse_answer(data[40:], b"b" * 12).mapped


async def test_who_says_nothing_is_cut_off_soon_and_who_falls_silent_later(autojump_clock: Any) -> None:
    async with site() as here:
        began = trio.current_time()
        mute, silent = await here.connect(), await here.connect()
        await ask(silent)
        assert await is_over(mute)
        assert trio.current_time() - began < module.FIRST_S + 1
        assert await is_over(silent)
        assert trio.current_time() - began < module.IDLE_S + 2
        await trio.sleep(0.1)
        assert here.observer.connections == 0


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(20), b"\x00\x01\xff\xfc" + b"!\x12\xa4B" + bytes(12)]
)
async def test_what_is_no_stun_ends_the_connection(autojump_clock: Any, garbage: bytes) -> None:
    async with site() as here:
        stream = await here.connect()
        began = trio.current_time()
        await stream.send_all(garbage)
        assert await is_over(stream)
        assert trio.current_time() - began < 1


async def test_one_source_has_a_share_and_its_most_silent_connection_makes_way(autojump_clock: Any) -> None:
    async with site() as here:
        other = await here.connect("10.0.9.9")
        await ask(other)
        streams = [await here.connect("10.0.7.7") for _ in range(module.MAX_PER_SOURCE)]
        for stream in reversed(streams):
            await ask(stream)
        newest = await here.connect("10.0.7.7")
        await ask(newest)
        assert await is_over(streams[-1])
        assert here.observer.connections == module.MAX_PER_SOURCE + 1
        await ask(streams[0], 3)
        await ask(other, 3)


async def test_all_together_are_bounded(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 5)
    async with site() as here:
        streams = [await here.connect() for _ in range(6)]
        await ask(streams[-1])
        assert await is_over(streams[0])
        assert here.observer.connections == 5


async def test_who_asks_too_often_is_cut_off(autojump_clock: Any) -> None:
    async with site() as here:
        stream = await here.connect()
        answers = 0
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            for number in range(200):
                await ask(stream, number)
                answers += 1
        assert stun_server.BURST <= answers < 150  # a few more for the time that the first ones took


async def test_at_the_end_everything_is_closed(autojump_clock: Any) -> None:
    async with site() as here:
        stream = await here.connect()
        await ask(stream)
    assert await is_over(stream)
    with pytest.raises(OSError, match="refused"):
        await here.connect()


async def test_nothing_to_listen_on_is_an_error(autojump_clock: Any) -> None:
    with pytest.raises(ConfigError):
        async with open_observer([], lambda *_: None):
            pass
