"""One blocking TCP socket of a lane, driven by one worker thread, ended from trio's.

Rules: nothing waits for ever inside a frame: where no byte moves for ``stall_s``, or one frame takes FRAME_S, the peer counts
as gone; between two frames a reader waits as long as it is open. `shut` may be called from any thread and wakes whoever
waits; `close` only once no thread uses the socket, so that a descriptor is never used after it was given away. OSError
becomes PeerGone here. Not here: what the bytes mean (wire.lane_frames).
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Final

from meshmax.base.errors import PeerGone
from meshmax.base.units import KIB

# No byte for so long inside a frame: a link of 18 kB/s still passes 1 MiB, whichever end holds it back. The control
# connection's heartbeat notices a dead peer long before; this is for one that is alive and does not go on.
STALL_S: Final = 60.0
FRAME_S: Final = 600.0  # one frame in all: 1.7 kB/s; slower peers are better served by nobody
# A fetcher's send buffer takes MAX_WANTS wants and cancels, one a packet, of which the kernel counts about 1 KiB each,
# even when the server does not read for a while: `send_now` never waits.
FETCHER_SEND_BUFFER_BYTES: Final = 512 * KIB

# A path that ends without a word, as where a NAT forgets it or the peer's power fails, is noticed by the system: of what was
# said nothing is acknowledged for DEAD_S, or of probes that go out after KEEP_ALIVE_S of silence. The probes also keep mappings
# of NATs, and renew one that was forgotten while only the other side had something to say.
KEEP_ALIVE_S: Final = 3
DEAD_S: Final = 15  # longer than a change of the Wi-Fi cell, or a router that is set anew
_KEEP_ALIVE: Final = (
    ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE", KEEP_ALIVE_S),  # macOS has its own name
    ("TCP_KEEPINTVL", KEEP_ALIVE_S),
    ("TCP_KEEPCNT", DEAD_S // KEEP_ALIVE_S - 1),
)

_DONT_WAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)  # not on Windows, where a buffer that takes it all must do


class LaneSocket:
    """A connected socket, made blocking. Owns it."""

    def __init__(self, sock: socket.socket, stall_s: float = STALL_S) -> None:
        """Raises PeerGone if the peer has gone already."""
        self._socket = sock
        self._stall_s = stall_s
        try:
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
            # The kernel sizes the buffers: 256 KiB fixed was as fast, 4 MiB slower (it leaves the processor's cache).
            # Not settimeout(): that makes the descriptor non-blocking, and MSG_WAITALL needs a blocking one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(stall_s))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(stall_s))
        except OSError as error:
            sock.close()
            raise PeerGone(f"the peer left the lane: {error.strerror}") from error
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(sock, select.POLLIN)

    def end_when_dead(self) -> None:
        """Count what is sent and not acknowledged for DEAD_S as the end. Not for who sends to a reader that may pause."""
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            with suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)

    def fill(self, buffer: memoryview, idle: bool = False) -> bool:
        """Fill ``buffer``. ``idle``: at the start of a frame, where waiting may take any time and False means that the peer
        ended its stream. Raises PeerGone: lost, stalled, or cut inside a frame."""
        size, got, began_s = len(buffer), 0, 0.0
        while got < size:
            try:
                count = self._socket.recv_into(buffer[got:] if got else buffer, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                if idle and not got:
                    continue
                raise PeerGone(f"the peer stopped inside a frame for {self._stall_s:g} s") from None
            except OSError as error:
                raise PeerGone(f"the lane was lost: {error.strerror}") from error
            if not count:
                if idle and not got:
                    return False
                raise PeerGone("the peer ended the lane inside a frame")
            got += count
            if got < size:
                began_s = _in_time(began_s)
        return True

    def readable(self, within_s: float = 0.0) -> bool:
        """Whether `fill` would get a byte, or the end, without waiting, now or ``within_s``. `shut` counts as the end."""
        if self._poll is not None:
            return bool(self._poll.poll(1000 * within_s))
        return bool(select.select([self._socket], [], [], within_s)[0])

    def send(self, data: memoryview) -> None:
        """Send everything. Raises PeerGone: lost, or the peer does not read."""
        size, sent, began_s = len(data), 0, 0.0
        while sent < size:
            try:
                sent += self._socket.send(data[sent:] if sent else data)
            except BlockingIOError:
                raise PeerGone(f"the peer did not read for {self._stall_s:g} s") from None
            except OSError as error:
                raise PeerGone(f"the lane was lost: {error.strerror}") from error
            if sent < size:
                began_s = _in_time(began_s)

    def send_now(self, data: memoryview) -> bool:
        """Send a small frame without waiting: whether it went out whole. If not, the lane is of no more use."""
        try:
            return self._socket.send(data, _DONT_WAIT) == len(data)
        except OSError:
            return False

    def shut(self) -> None:
        """End both directions; wakes the worker thread. Any thread; idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the descriptor; idempotent."""
        self._socket.close()


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _in_time(began_s: float) -> float:
    """When the frame began to be slow, which is now if ``began_s`` is 0. Raises PeerGone after FRAME_S."""
    now_s = time.monotonic()
    if began_s and now_s - began_s > FRAME_S:
        raise PeerGone(f"one frame took longer than {FRAME_S:g} s")
    return began_s or now_s


def _timeval(seconds: float) -> bytes | int:
    if sys.platform == "win32":
        return int(seconds * 1000)
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
