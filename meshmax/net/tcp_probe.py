"""How TCP observers see one local port of ours: RFC 5780, 4.3, over TCP.

The connections to all of them come from one port, which SO_REUSEADDR and SO_REUSEPORT allow, and stay open until all have
answered, so that a NAT has no reason to forget the mapping between two of them. Not here: what follows (core.reachability).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import trio

from meshmax.base.errors import RemoteProtocolError
from meshmax.core.reachability import MappedSeen
from meshmax.net.observer import receive_message
from meshmax.net.tcp import TcpBytes
from meshmax.wire import stun

TCP_S: Final = 3.0  # for all of them: a lost SYN is sent again after one second
MAX_OBSERVERS: Final = 4  # asked at once

Address = tuple[str, int]


async def tcp_mapped(observers: Sequence[Address]) -> tuple[MappedSeen, ...]:
    """See ports.Probes."""
    asked = list(dict.fromkeys(observers))[:MAX_OBSERVERS]
    found: list[MappedSeen] = []
    if not asked:
        return ()
    family = socket.AF_INET6 if ":" in asked[0][0] else socket.AF_INET
    with ExitStack() as stack, trio.move_on_after(TCP_S):
        try:
            first = stack.enter_context(await _bound(family, 0))
            port = int(first.getsockname()[1])
            others = [stack.enter_context(await _bound(family, port)) for _ in asked[1:]]
        except OSError:
            return ()
        async with trio.open_nursery() as nursery:
            for sock, observer in zip((first, *others), asked, strict=True):
                nursery.start_soon(_ask, sock, observer, port, found)
    return tuple(found)


async def _ask(sock: trio.socket.SocketType, observer: Address, port: int, found: list[MappedSeen]) -> None:
    transaction = secrets.token_bytes(stun.TRANSACTION_BYTES)
    try:
        await sock.connect(observer)
        stream = TcpBytes(trio.SocketStream(sock))
        await stream.send_all(stun.encode_request(transaction))
        answer = stun.parse_answer(await receive_message(stream), transaction)
    except (OSError, RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
        return
    if answer.mapped is not None:
        found.append(MappedSeen(observer, port, answer.mapped))


async def _bound(family: socket.AddressFamily, port: int) -> trio.socket.SocketType:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        await sock.bind(("::" if family is socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104 -- it does not listen
    except BaseException:
        sock.close()
        raise
    return sock
