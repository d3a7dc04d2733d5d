from itertools import pairwise

import trio
from starlette.types import Message
from trio.testing import MockClock

from meshmax.api.lines import MAX_WAITING_BYTES, open_lines
from meshmax.core.write_pace import FEW, pause_s


class Client:
    """Notes what is written to it, and when; reads on when it is let."""

    def __init__(self) -> None:
        self.writes: list[tuple[float, bytes]] = []
        self.reads = trio.Event()
        self.reads.set()

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.body" and message["body"]:
            self.writes.append((trio.current_time(), message["body"]))

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.writes)


async def test_with_few_streams_each_line_leaves_when_it_comes(autojump_clock: MockClock) -> None:
    client = Client()
    async with open_lines(client.send, "text/plain", {}, lambda: FEW) as lines:
        for number in range(5):
            await lines.send(b"%d" % number)
            await trio.sleep(0.001)
    assert [data for _, data in client.writes] == [b"0", b"1", b"2", b"3", b"4"]


async def test_with_many_streams_the_first_line_leaves_at_once_and_later_ones_together(
    autojump_clock: MockClock,
) -> None:
    client, began = Client(), trio.current_time()
    async with open_lines(client.send, "text/plain", {}, lambda: 40) as lines:
        for number in range(100):
            await lines.send(b"%02d" % number)
            await trio.sleep(0.01)
    assert client.writes[0] == (began, b"00")
    assert client.body == b"".join(b"%02d" % number for number in range(100))
    apart = [later - earlier for (earlier, _), (later, _) in pairwise(client.writes)]
    assert min(apart[:-1]) >= pause_s(40) - 1e-9
    assert len(client.writes) <= 27


async def test_a_line_that_is_flushed_does_not_wait_for_others(autojump_clock: MockClock) -> None:
    client, began = Client(), trio.current_time()
    async with open_lines(client.send, "text/plain", {}, lambda: 1000) as lines:
        await lines.send(b"first")
        await trio.sleep(0.001)
        await lines.send(b"last")
        lines.flush()
        await trio.sleep(10)
    assert [data for _, data in client.writes] == [b"first", b"last"]
    assert client.writes[1][0] < began + 0.002


async def test_leaving_the_block_sends_what_waits(autojump_clock: MockClock) -> None:
    client, began = Client(), trio.current_time()
    async with open_lines(client.send, "text/plain", {}, lambda: 1000) as lines:
        await lines.send(b"a")
        await trio.sleep(0.001)
        await lines.send(b"b")
    assert client.body == b"ab"
    assert trio.current_time() < began + 0.01


async def test_a_client_that_does_not_read_holds_up_who_sends(autojump_clock: MockClock) -> None:
    client = Client()
    sent = 0
    async with open_lines(client.send, "text/plain", {}) as lines:
        client.reads = trio.Event()
        with trio.move_on_after(1):
            for _ in range(10_000):
                await lines.send(bytes(1024))
                sent += 1
                await trio.lowlevel.checkpoint()
        assert sent <= 2 * MAX_WAITING_BYTES // 1024
        client.reads.set()
    assert len(client.body) == 1024 * (sent + 1)  # the one that waited had been taken
