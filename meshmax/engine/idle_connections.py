"""Connections to one server on which nothing is going on, kept for the next prompt.

Rules: not for long, since a server closes an idle one whenever it likes; the one that was used last goes first; one
on which something came meanwhile (its end, or what nobody asked for) is none. Not here: what is said on them (server_http).
"""

from __future__ import annotations

from typing import Final

import msgspec
import trio

# No more than prompts were under way at once a moment ago, and so than the server answers at a time. With 8 every second
# prompt of 64 clients, who pause between two, made a connection of its own before it could be sent.
MAX_IDLE: Final = 64
IDLE_S: Final = 3.0  # usual servers close theirs after five seconds


class Line(msgspec.Struct, eq=False):
    """``tcp``, and the same or TLS over it: ``stream``. ``since_s``: when it became idle."""

    tcp: trio.abc.Stream
    stream: trio.abc.Stream
    since_s: float = 0.0

    def drop(self) -> None:
        """Close at once and without a checkpoint."""
        if isinstance(self.tcp, trio.SocketStream):
            self.tcp.socket.close()
            return
        for end in (getattr(self.tcp, "send_stream", None), getattr(self.tcp, "receive_stream", None)):
            if end is not None:  # a pair in memory
                end.close()

    @property
    def stale(self) -> bool:
        """Whether it cannot be used any more, as far as can be seen."""
        if trio.current_time() - self.since_s > IDLE_S:
            return True
        return isinstance(self.tcp, trio.SocketStream) and self.tcp.socket.is_readable()


class IdleConnections:
    """See the module."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def put(self, line: Line) -> None:
        """``line`` is idle from now on."""
        line.since_s = trio.current_time()
        self._lines.append(line)
        while len(self._lines) > MAX_IDLE or self._lines[0].stale:
            self._lines.pop(0).drop()
            if not self._lines:
                return

    def try_take(self) -> Line | None:
        """One that can be used, as far as can be seen."""
        while self._lines:
            line = self._lines.pop()
            if not line.stale:
                return line
            line.drop()
        return None

    def drop_all(self) -> None:
        """Keep none."""
        while self._lines:
            self._lines.pop().drop()
