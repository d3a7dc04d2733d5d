"""Yamux as this project uses it: bounded in what a peer makes us hold, and thrifty with frames and turns of the event loop.

What is decided here: a peer that sends past its bounds loses its connection; credit is given back in large pieces (the library
sends a window update after each read, however small, which was most of the frames of a short exchange); a stream
begins, and is acknowledged, with its first data, not with a frame of its own; what needs no waiting
takes no lock (the library takes five in turn for a read, each a turn of the event loop), and a stream that comes or is opened
passes through no task or channel of the library. Whatever frames a peer sends, the others have their turns, and of its pings,
or streams that it begins twice, few are answered. Not here: streams as ports.Stream
(net.stream), which parts of the library run (net.library).
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from typing import Any, Final

import trio

from meshmax.net import limits

CREDIT_BYTES: Final = 4 * 1024  # read and not given back yet; on a slow path a writer should not wait long for it
CREDIT_TIMEOUT_S: Final = 30.0  # for whom a writer waits; over a busy relay both the bytes and the credit take seconds
MAX_FRAME_BYTES: Final = (
    65_519  # of one Noise message: a frame that is longer leaves in two, and needs the library's lock
)
FRAMES_A_TURN: Final = 64  # worked off before others have a turn; a message of the cipher may hold five thousand
ANSWERS_AT_ONCE: Final = 16  # to pings: the library sends one each 30 s, other programs some in a row
ANSWERS_PER_S: Final = 2.0  # later; each costs a message of the cipher, more than the frame that asks for it
SYN: Final = 1  # flag of a stream's first frame
ACK: Final = 2  # flag of the first frame of who was asked
RST: Final = 8  # flag of a stream's last frame, at once
_DATA: Final = 0
_WINDOW_UPDATE: Final = 1
_PING: Final = 2
_HEADER: Final = struct.Struct("!BBHII")  # version, type, flags, stream, length


@functools.cache
def bounded_yamux() -> Any:
    """The class; the library is imported by whoever asks for it."""
    from libp2p.stream_muxer.yamux import yamux

    yamux.YamuxStream = _thrifty_stream()  # it makes this class for each stream
    yamux.read_exactly = _taking_turns(yamux.read_exactly)  # it reads each header and body with this

    class BoundedYamux(_Bounds, yamux.Yamux):  # type: ignore[misc]
        """See the module."""

    return BoundedYamux


def _taking_turns(read_exactly: Any) -> Any:
    """The library's function, which gives others a turn now and then.

    Nothing else is done of every frame: for pings and kinds that nobody knows not even a lock is taken, so that a message of
    the cipher, which is full of them, would be worked off in one go.
    """
    taken = 0

    async def read(reader: Any, count: int, *retries: int) -> bytes:
        nonlocal taken
        taken += 1
        if taken % FRAMES_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        data: bytes = await reader.read(count)
        return data if len(data) == count else await read_exactly(_Begun(data, reader), count, *retries)

    return read


class _Begun:
    """A reader of which ``data`` has come already."""

    def __init__(self, data: bytes, reader: Any) -> None:
        self._data, self._reader = data, reader

    async def read(self, count: int) -> bytes:
        data, self._data = self._data, b""
        return data or bytes(await self._reader.read(count))


class _FreeLock:
    """A lock that takes hardly a turn of the event loop where nobody holds it; of trio's the part that the library uses.

    Now and then it does, or a peer could keep all others waiting with a message full of frames of no length.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()
        self._taken = 0

    async def __aenter__(self) -> None:
        self._taken += 1
        if self._taken % FRAMES_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        if self._held:
            await self._waiting.park()  # whoever is woken holds it
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._held = False


class _Bounds:
    """Over the library's connection: ends that of a peer that sends past its windows, which the library only logs."""

    allowed_bytes = limits.MAX_GUEST_BUFFER_BYTES  # unread, of all streams; more once the peer is a member
    new_stream_send_channel: Any
    stream_backlog_semaphore: trio.Semaphore
    event_shutting_down: trio.Event
    next_stream_id: int
    streams: dict[int, Any]
    stream_buffers: dict[int, bytearray]
    stream_events: dict[int, trio.Event]
    secured_conn: Any
    on_close: Any
    _write_lock: trio.Lock

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.streams_lock = _FreeLock()  # taken once for most frames that come
        self._answers_s = -math.inf  # when the next one is due at that pace
        self._comers = self.new_stream_send_channel = _Comers(self.new_stream_send_channel)

    async def start(self) -> None:
        """See the library's."""
        try:
            await super().start()  # type: ignore[misc]
        finally:  # nothing more comes; what it would be told to knows the connection: a ring of references
            self._comers.take = self.on_close = None
            self.remove_stream = _nothing

    def hand_over(self, take: Callable[[Any], None]) -> None:
        """From now on ``take`` is given each stream that the peer opens, at once; the library's swarm hears of none."""
        self._comers.take = take

    def open_now(self) -> Any:
        """A stream that the peer hears of with the first data. Raises trio.WouldBlock where 256 are open."""
        if self.event_shutting_down.is_set():
            raise trio.ClosedResourceError("the connection is closed")
        self.stream_backlog_semaphore.acquire_nowait()
        stream_id, self.next_stream_id = self.next_stream_id, self.next_stream_id + 2
        stream = _thrifty_stream()(stream_id, self, True)
        stream._owns_backlog_slot, stream.unsaid = True, SYN
        self.streams[stream_id] = stream
        self.stream_buffers[stream_id], self.stream_events[stream_id] = bytearray(), trio.Event()
        return stream

    async def _write_frame(self, data: bytes) -> None:
        # From the cipher's number to the wire's queue nothing waits, so frames cannot overtake each other.
        if len(data) == _HEADER.size and self._is_left_out(data):
            await trio.lowlevel.checkpoint_if_cancelled()
        elif len(data) <= MAX_FRAME_BYTES and not self._write_lock.locked():
            await self.secured_conn.write(data)
        else:
            await super()._write_frame(data)  # type: ignore[misc]

    def _is_left_out(self, header: bytes) -> bool:
        """Whether the frame, which has no body, need not be sent."""
        _, kind, flags, stream_id, credit = _HEADER.unpack(header)
        if kind == _PING:
            return flags == ACK and not self._may_answer()
        stream = self.streams.get(stream_id)
        if kind != _WINDOW_UPDATE or credit or stream is None:
            return False
        if flags == RST:  # where it is not we that end the stream, the peer has begun it twice
            return not (stream.resetting or self._may_answer())
        if flags in (SYN, ACK):  # all that it says: it leaves with the stream's first data
            stream.unsaid |= flags
            return True
        return False

    def _may_answer(self) -> bool:
        """One frame more that asks for nothing but an answer."""
        now = trio.current_time()
        due_s = max(self._answers_s, now - (ANSWERS_AT_ONCE - 1) / ANSWERS_PER_S)
        if due_s > now:
            return False
        self._answers_s = due_s + 1.0 / ANSWERS_PER_S
        return True

    async def _read_data_body(self, length: int) -> bytes:
        held = sum(map(len, self.stream_buffers.values()))
        if held + length > self.allowed_bytes:
            raise trio.TooSlowError  # the one exception for which the library closes the connection
        session = self.secured_conn
        if getattr(session, "high_watermark", 0) - getattr(session, "low_watermark", 0) >= length:
            return bytes(await session.read(length))  # came with its header: there is nothing to have a deadline for
        return bytes(await super()._read_data_body(length))  # type: ignore[misc]

    def _sweep_stale_streams(self, now: float | None = None) -> int:
        # It drops what a slow reader has not read a minute after both ends closed, and calls that the end.
        for stream_id, stream in self.streams.items():
            if self.stream_buffers.get(stream_id):
                stream._closed_at = 0.0  # to the sweep: never
        return int(super()._sweep_stale_streams(now))  # type: ignore[misc]


async def _nothing(_stream: Any) -> None:
    await trio.lowlevel.checkpoint()


class _Comers:
    """In the place of the channel on which the library hands over the streams that the peer opens; ``take`` gets them first."""

    def __init__(self, channel: trio.MemorySendChannel[Any]) -> None:
        self._channel = channel
        self.take: Callable[[Any], None] | None = None

    async def send(self, stream: Any) -> None:
        if self.take is not None:
            self.take(stream)
        else:
            await self._channel.send(stream)

    def close(self) -> None:
        self._channel.close()


class _Thrift:
    """Over the library's stream, whose attributes it uses. ``unsaid``: the flags that its next frame has to carry."""

    unsaid = 0
    resetting = False  # by us
    stream_id: int
    conn: Any
    recv_window: int
    target_recv_window: int
    send_closed: bool
    window_lock: Any
    close_lock: Any
    _credit_bytes = 0
    _closed = False
    _credited: trio.Event | None = None  # while a writer waits for credit

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.window_lock, self.close_lock = _FreeLock(), _FreeLock()

    # The library sets these two as attributes, in many places, and tells nobody.
    @property
    def send_window(self) -> int:
        """Bytes that the peer allows us to send still."""
        return self._credit_bytes

    @send_window.setter
    def send_window(self, size_bytes: int) -> None:
        self._credit_bytes = size_bytes
        self._wake()

    @property
    def closed(self) -> bool:
        """Whether both ways are over, in order or not."""
        return self._closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = closed
        self._wake()

    def _wake(self) -> None:
        if self._credited is not None:  # events have no truth
            self._credited.set()

    async def write(self, data: bytes) -> None:
        while data:
            if self.send_closed or self.closed:
                raise trio.BrokenResourceError("the stream is closed")
            count = min(len(data), self.send_window, limits.WRITE_STEP_BYTES)
            if count <= 0:
                await self._wait_credit()
                continue
            flags, self.unsaid = self.unsaid, 0
            self.send_window -= count
            await self.conn._write_frame(_HEADER.pack(0, _DATA, flags, self.stream_id, count) + data[:count])
            data = data[count:]

    async def _wait_credit(self) -> None:
        with trio.move_on_after(CREDIT_TIMEOUT_S):
            while self.send_window <= 0 and not self.closed:
                if self._credited is None or self._credited.is_set():  # else another writer waits for it, too
                    self._credited = trio.Event()
                await self._credited.wait()
            return
        raise trio.BrokenResourceError(f"the peer read nothing for {CREDIT_TIMEOUT_S:g} s")

    async def reset(self) -> None:
        self.resetting = True
        await super().reset()  # type: ignore[misc]

    async def close(self) -> None:
        await self.say()
        await super().close()  # type: ignore[misc]

    async def say(self) -> None:
        """Say what waits for data to go out with; nothing where nothing does."""
        flags, self.unsaid = self.unsaid, 0
        if flags:  # a frame of data without data: to `_write_frame` this one is not to be put off
            await self.conn._write_frame(_HEADER.pack(0, _DATA, flags, self.stream_id, 0))

    def take(self, max_bytes: int) -> bytes:
        """What is there to read, at once; b"": nothing, or the library has to say what. Credit is the caller's to give."""
        buffer = self.conn.stream_buffers.get(self.stream_id)
        if not buffer or self.closed:
            return b""
        data = bytes(buffer[:max_bytes])
        del buffer[:max_bytes]
        return data

    @property
    def owes(self) -> bool:
        """Whether there is enough credit to be given back."""
        buffered = len(self.conn.stream_buffers.get(self.stream_id, b""))
        owed = self.target_recv_window - self.recv_window - buffered
        return owed >= CREDIT_BYTES

    async def give_credit(self, read_bytes: int) -> None:
        """After ``read_bytes`` were read: give credit back, if it is enough. Not to be cancelled."""
        if self.owes:
            await super()._auto_tune_and_send_window_update(bytes_read=read_bytes)  # type: ignore[misc]

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        await self.give_credit(bytes_read)


@functools.cache
def _thrifty_stream() -> Any:
    from libp2p.stream_muxer.yamux import yamux

    class ThriftyStream(_Thrift, yamux.YamuxStream):  # type: ignore[misc]
        """See the module."""

    return ThriftyStream
