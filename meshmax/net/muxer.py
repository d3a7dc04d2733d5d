"""Yamux as this project uses it: bounded in what a peer makes us hold, and thrifty with frames and turns of the event loop.

What is decided here: a peer that sends past its bounds loses its connection; credit is given back in large pieces (the library
sends a window update after each read, however small, which was most of the frames of a short exchange); a stream
begins with its first data, not with a frame of its own; what needs no waiting
takes no lock (the library takes five in turn for a read, each a turn of the event loop). Not here: streams as ports.Stream
(net.stream), which parts of the library run (net.library).
"""

from __future__ import annotations

import functools
import struct
from typing import Any, Final

import trio

from meshmax.net import limits

CREDIT_BYTES: Final = 4 * 1024  # read and not given back yet; on a slow path a writer should not wait long for it
CREDIT_TIMEOUT_S: Final = 30.0  # for whom a writer waits; over a busy relay both the bytes and the credit take seconds
MAX_FRAME_BYTES: Final = (
    65_519  # of one Noise message: a frame that is longer leaves in two, and needs the library's lock
)
FRAMES_A_TURN: Final = 64  # worked off before others have a turn; a message of the cipher may hold five thousand
SYN: Final = 1  # flag of a stream's first frame
_DATA: Final = 0
_WINDOW_UPDATE: Final = 1
_HEADER: Final = struct.Struct("!BBHII")  # version, type, flags, stream, length


@functools.cache
def bounded_yamux() -> Any:
    """The class; the library is imported by whoever asks for it."""
    from libp2p.stream_muxer.yamux import yamux

    yamux.YamuxStream = _thrifty_stream()  # it makes this class for each stream

    class BoundedYamux(yamux.Yamux):  # type: ignore[misc]
        """Yamux that ends the connection of a peer that sends past its windows, which the library only logs."""

        allowed_bytes = limits.MAX_GUEST_BUFFER_BYTES  # unread, of all streams; more once the peer is a member

        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.streams_lock = _FreeLock()  # taken once for each frame that comes

        async def _write_frame(self, data: bytes) -> None:
            # From the cipher's number to the wire's queue nothing waits, so frames cannot overtake each other.
            if _is_bare_syn(data):
                self.streams[_HEADER.unpack(data)[3]].unsaid = SYN  # leaves with the first data
                await trio.lowlevel.checkpoint()
            elif len(data) <= MAX_FRAME_BYTES and not self._write_lock.locked():
                await self.secured_conn.write(data)
            else:
                await super()._write_frame(data)

        async def _read_data_body(self, length: int) -> bytes:
            held = sum(map(len, self.stream_buffers.values()))
            if held + length > self.allowed_bytes:
                raise trio.TooSlowError  # the one exception for which the library closes the connection
            return bytes(await super()._read_data_body(length))

        def _sweep_stale_streams(self, now: float | None = None) -> int:
            # It drops what a slow reader has not read a minute after both ends closed, and calls that the end.
            for stream_id, stream in self.streams.items():
                if self.stream_buffers.get(stream_id):
                    stream._closed_at = 0.0  # to the sweep: never
            return int(super()._sweep_stale_streams(now))

    return BoundedYamux


class _FreeLock:
    """A lock that takes hardly a turn of the event loop where nobody holds it; of trio's the part that the library uses.

    Now and then it does, or a peer could keep all others waiting with a message full of frames of no length.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._taken = 0

    async def __aenter__(self) -> None:
        self._taken += 1
        if self._taken % FRAMES_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def _is_bare_syn(frame: bytes) -> bool:
    if len(frame) != _HEADER.size:
        return False
    _, kind, flags, _, credit = _HEADER.unpack(frame)
    return bool(kind == _WINDOW_UPDATE and flags == SYN and credit == 0)


class _Thrift:
    """Over the library's stream, whose attributes it uses. ``unsaid``: the flags that its next frame has to carry."""

    unsaid = 0
    stream_id: int
    conn: Any
    recv_window: int
    target_recv_window: int
    send_closed: bool
    _credit_bytes = 0
    _closed = False
    _credited: trio.Event | None = None  # while a writer waits for credit

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

    async def close(self) -> None:
        await self._say_syn()
        await super().close()  # type: ignore[misc]

    async def _say_syn(self) -> None:
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
