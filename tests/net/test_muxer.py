"""How many frames an exchange takes, and that thrift with them loses nothing, between real libp2p hosts in simulated time."""

import struct
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import trio

from meshmax.base.errors import Busy, PeerGone
from meshmax.net.muxer import ANSWERS_AT_ONCE, ANSWERS_PER_S, CREDIT_TIMEOUT_S, FRAMES_A_TURN, SYN, bounded_yamux
from meshmax.net.negotiation import parse_proposal, proposal
from meshmax.net.swarm import LibrarySwarm
from meshmax.ports import Stream
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.sim_network import SimNetwork

ECHO: Final = "/meshmax/echo/1.0.0"
POUR: Final = "/meshmax/pour/1.0.0"
MUTE: Final = "/meshmax/mute/1.0.0"
POURED_BYTES: Final = 3_000_000  # many times a stream's first window
DATA, WINDOW_UPDATE, PING = 0, 1, 2
ACK, FIN, RST = 2, 4, 8

Pair = tuple[LibrarySwarm, LibrarySwarm]


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def pour(stream: Stream) -> None:
    await stream.send_all(bytes(POURED_BYTES))


async def mute(stream: Stream) -> None:
    assert await stream.receive_some(4) == b"word"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    network = SimNetwork(0.05)
    async with network.open_swarm(bytes(32)) as a, network.open_swarm(SeededSigner(2).private_bytes) as b:
        b.serve(ECHO, echo)
        b.serve(POUR, pour)
        b.serve(MUTE, mute)
        await a.dial(b.peer_id, b.addresses)
        await trio.sleep(5)  # the round trip is measured
        yield a, b


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Type and flags of every frame that either end writes about a stream."""
    seen: list[tuple[int, int]] = []
    yamux = bounded_yamux()
    write = yamux._write_frame

    async def record(self: Any, data: bytes) -> None:
        _, kind, flags, stream_id, length = struct.unpack("!BBHII", data[:12])
        if stream_id and (kind, flags, length) not in ((WINDOW_UPDATE, SYN, 0), (WINDOW_UPDATE, ACK, 0)):  # put off
            seen.append((kind, flags))
        await write(self, data)

    monkeypatch.setattr(yamux, "_write_frame", record)
    return seen


async def test_a_request_and_its_answer_take_a_frame_each_and_one_to_end(
    autojump_clock: Any, pair: Pair, frames: list[tuple[int, int]]
) -> None:
    a, b = pair
    stream = await a.open_stream(b.peer_id, ECHO, eager=True)
    await stream.send_all(b"word")
    assert await stream.receive_some(4) == b"word"
    await stream.reset()
    await trio.sleep(1)
    assert frames == [(DATA, SYN), (DATA, ACK), (WINDOW_UPDATE, RST)]


async def test_who_waits_for_more_before_it_says_anything_acknowledges_the_stream_by_itself(
    autojump_clock: Any, pair: Pair, frames: list[tuple[int, int]]
) -> None:
    a, b = pair
    heard = bytearray()

    async def listen(stream: Stream) -> None:
        while data := await stream.receive_some(4):
            heard.extend(data)

    b.serve(MUTE, listen)
    stream = await a.open_stream(b.peer_id, MUTE, eager=True)
    await stream.send_all(b"wo")
    await trio.sleep(1)
    assert frames == [(DATA, SYN), (DATA, ACK)]
    await stream.send_all(b"rd")
    await stream.send_eof()
    assert await stream.receive_some(4) == b""
    await stream.aclose()
    assert heard == b"word"


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("piece_bytes", [1000, 65536])
async def test_what_is_longer_than_the_window_comes_whole_however_small_the_pieces_in_which_it_is_read(
    autojump_clock: Any, pair: Pair, frames: list[tuple[int, int]], piece_bytes: int, eager: bool
) -> None:
    a, b = pair
    stream = await a.open_stream(b.peer_id, POUR, eager=eager)
    came = 0
    while data := await stream.receive_some(piece_bytes):
        came += len(data)
    assert came == POURED_BYTES
    await stream.aclose()
    assert frames.count((WINDOW_UPDATE, 0)) < POURED_BYTES / 4000


async def test_a_peer_that_only_listens_ends_a_stream_in_order(autojump_clock: Any, pair: Pair) -> None:
    a, b = pair
    stream = await a.open_stream(b.peer_id, MUTE, eager=True)
    await stream.send_all(b"word")
    assert await stream.receive_some(4) == b""
    await stream.aclose()


async def test_a_stream_that_is_closed_before_a_word_was_said_leaves_nothing_behind(
    autojump_clock: Any, pair: Pair
) -> None:
    a, b = pair
    for _ in range(300):  # more than may be open
        stream = await a.open_stream(b.peer_id, ECHO, eager=True)
        await stream.aclose()
        stream = await a.open_stream(b.peer_id, ECHO, eager=True)
        await stream.reset()
        await trio.sleep(0.5)
    await trio.sleep(20)
    assert not a.streams(b.peer_id)
    assert not b.streams(a.peer_id)


def test_a_proposal_is_seen_only_where_it_is_whole_and_nothing_else_comes_before_it() -> None:
    whole = proposal(ECHO)
    assert parse_proposal(whole) == (ECHO, len(whole))
    assert parse_proposal(whole + b"word") == (ECHO, len(whole))
    assert all(parse_proposal(whole[:cut]) is None for cut in range(len(whole)))
    assert parse_proposal(b"x" + whole) is None
    assert parse_proposal(whole[:-1] + b"x") is None


async def test_a_writer_without_credit_goes_on_when_the_peer_reads_and_ends_when_the_connection_is_lost(
    autojump_clock: Any, pair: Pair
) -> None:
    a, b = pair
    reads = trio.Event()

    async def read_late(stream: Stream) -> None:
        await reads.wait()
        assert await stream.receive_some(200_000)
        await trio.sleep_forever()

    b.serve(ECHO, read_late)
    stream = await a.open_stream(b.peer_id, ECHO)
    ended: list[float] = []

    async def write() -> None:
        await stream.send_all(bytes(256 * 1024))  # the window
        await stream.send_all(b"more")
        ended.append(trio.current_time())
        with pytest.raises(PeerGone):
            await stream.send_all(bytes(POURED_BYTES))
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.sleep(1)
        assert not ended
        read_s = trio.current_time()
        reads.set()
        await trio.sleep(1)
        assert ended == [pytest.approx(read_s + 0.05, abs=0.001)]  # as long as the credit is on its way
        lost_s = trio.current_time()
        await a.disconnect(b.peer_id)
        await trio.sleep(1)
        assert ended[1] < lost_s + 0.5


async def test_a_connection_that_carries_all_the_streams_it_can_says_so_and_goes_on_when_one_ends(
    autojump_clock: Any, pair: Pair
) -> None:
    a, b = pair
    (link,) = a._links.of(b.peer_id)
    muxed = [link.connection.muxed_conn.open_now() for _ in range(256)]
    with pytest.raises(Busy):
        await a.open_stream(b.peer_id, ECHO, eager=True)
    assert not a.streams(b.peer_id)
    await muxed.pop().reset()
    stream = await a.open_stream(b.peer_id, ECHO, eager=True)
    await stream.send_all(b"word")
    assert await stream.receive_some(4) == b"word"


async def test_two_writers_without_credit_both_go_on_when_it_comes(autojump_clock: Any, pair: Pair) -> None:
    a, b = pair
    reads, came = trio.Event(), 0

    async def read_late(stream: Stream) -> None:
        nonlocal came
        await reads.wait()
        while data := await stream.receive_some(65536):
            came += len(data)

    b.serve(ECHO, read_late)
    stream = await a.open_stream(b.peer_id, ECHO)
    with trio.fail_after(CREDIT_TIMEOUT_S - 5):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(stream.send_all, bytes(400_000))  # the window is less than one of them
            await trio.sleep(1)
            reads.set()
        await stream.send_eof()
        await trio.sleep(1)
    assert came == 800_000


class OneMessage:
    """A secured connection over which one message came, and no more will but what ``come`` brings."""

    is_initiator = True

    def __init__(self, data: bytes, piece_bytes: int = 1 << 20) -> None:
        self.left, self.written = bytearray(data), list[bytes]()
        self._piece_bytes, self._news = piece_bytes, trio.Event()

    def come(self, data: bytes) -> None:
        self.left += data
        self._news.set()

    async def read(self, count: int) -> bytes:
        while not self.left:
            self._news = trio.Event()
            await self._news.wait()
        data = bytes(self.left[: min(count, self._piece_bytes)])
        del self.left[: len(data)]
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written.append(data)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(DATA, 0), (WINDOW_UPDATE, 0), (DATA, ACK), (PING, ACK), (PING, 0), (PING, FIN), (9, 0), (255, 0xFFFF)],
)
async def test_a_message_full_of_frames_of_no_length_keeps_nobody_waiting(kind: int, flags: int) -> None:
    frames = 5000
    message = OneMessage(struct.pack("!BBHII", 0, kind, flags, 99, 0) * frames)
    muxer = bounded_yamux()(message, "peer", is_initiator=True)
    turns = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.handle_incoming)
        while message.left:
            turns += 1
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert turns >= frames // FRAMES_A_TURN


async def test_of_a_flood_of_pings_few_are_answered_and_later_ones_are_again(autojump_clock: Any) -> None:
    ping = struct.pack("!BBHII", 0, PING, SYN, 0, 7)
    message = OneMessage(ping * 5000)
    muxer = bounded_yamux()(message, "peer", is_initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.handle_incoming)
        await trio.sleep(0.1)
        assert message.written == [struct.pack("!BBHII", 0, PING, ACK, 0, 7)] * ANSWERS_AT_ONCE
        for _ in range(10):  # at the pace of who is no flood
            await trio.sleep(1 / ANSWERS_PER_S)
            message.come(ping)
        await trio.sleep(1)
        assert len(message.written) == ANSWERS_AT_ONCE + 10
        nursery.cancel_scope.cancel()


async def test_of_a_stream_that_is_begun_again_and_again_few_beginnings_are_answered(autojump_clock: Any) -> None:
    begins, resets = (struct.pack("!BBHII", 0, WINDOW_UPDATE, flags, 99, 0) for flags in (SYN, RST))
    message, streams = OneMessage(begins * 5000), list[Any]()
    muxer = bounded_yamux()(message, "peer", is_initiator=True)
    muxer.hand_over(streams.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.handle_incoming)
        await trio.sleep(0.1)
        assert message.written == [resets] * ANSWERS_AT_ONCE
        (stream,) = streams
        await stream.reset()  # which is no answer, and is said
        assert message.written == [resets] * (ANSWERS_AT_ONCE + 1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("piece_bytes", [1, 5, 11, 12])
async def test_a_header_that_comes_in_pieces_is_put_together(autojump_clock: Any, piece_bytes: int) -> None:
    ping = struct.pack("!BBHII", 0, PING, SYN, 0, 7)
    message = OneMessage(b"", piece_bytes)
    muxer = bounded_yamux()(message, "peer", is_initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.handle_incoming)
        message.come(ping * 3)
        await trio.sleep(1)
        assert len(message.written) == 3
        nursery.cancel_scope.cancel()
