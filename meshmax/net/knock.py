"""Whether somebody listens at a TCP port: connect, and hang up at once. No byte is sent or read."""

from __future__ import annotations

import errno
import socket
from typing import Final

import trio

from meshmax.base.doctor import TriedOutcome

KNOCK_TIMEOUT_S: Final = 2.0  # a SYN that was lost is sent again after one second

_REFUSED: Final = frozenset({errno.ECONNREFUSED, errno.ECONNRESET})


async def knock(ip: str, port: int) -> TriedOutcome:
    """``open``, ``refused``, ``silent`` after KNOCK_TIMEOUT_S, or ``unreachable``. ``ip`` is an IP address, with its zone."""
    outcome: TriedOutcome = "silent"
    with trio.move_on_after(KNOCK_TIMEOUT_S):
        try:
            found = await trio.socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            family, kind, protocol, _, address = found[0]
            with trio.socket.socket(family, kind, protocol) as sock:
                await sock.connect(address)
            outcome = "open"
        except OSError as error:
            outcome = "refused" if error.errno in _REFUSED else "unreachable"
    return outcome
