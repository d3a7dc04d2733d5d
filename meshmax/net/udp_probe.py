"""STUN from fresh UDP ports (RFC 8489, 6.2.1), and probes that arrive there; satisfies ports.ProbePort.

Rules: a question goes out at RETRANSMIT_S and is given up after STUN_S: who waits longer waits where UDP is blocked. An answer
counts if it has the transaction (96 random bits) of a question that is out and comes from where that was sent; one from
elsewhere is counted and dropped, as is all else that nobody waits for. Not here: what follows (core.reachability).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshmax.base.errors import ConnectError, RemoteProtocolError
from meshmax.net.datagrams import MAX_DATAGRAM_BYTES
from meshmax.ports.probes import Arrival
from meshmax.telemetry.metrics import STUN_ASKED
from meshmax.wire import stun
from meshmax.wire.look_back import try_nonce

STUN_S: Final = 1.5  # for an answer; round trips around the world take 0.4 s
RETRANSMIT_S: Final = (
    0.0,
    0.25,
    0.75,
)  # when the question is sent; RFC 8489 would begin with 0.5 s, and go on for 39.5 s
ERROR_PAUSE_S: Final = 0.05  # after an error that ICMP brought, so that a port that only fails costs little
MAX_EXPECTED: Final = 16  # probes at once

Address = tuple[str, int]


class UdpProbePort:
    """See the module. Made by `open_probe_port`."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self.local_port = int(sock.getsockname()[1])
        self._asked: dict[bytes, _Question] = {}
        self._expected: dict[bytes, Arrival] = {}

    async def mapped(self, server: Address) -> Address | None:
        """See ports.ProbePort."""
        question = _Question(server)
        self._asked[question.transaction] = question
        try:
            with trio.move_on_after(STUN_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_on, question)
                    await question.answered.wait()
                    nursery.cancel_scope.cancel()
        finally:
            del self._asked[question.transaction]
        STUN_ASKED.labels(outcome="answered" if question.mapped else "silent").inc()
        return question.mapped

    async def _send_on(self, question: _Question) -> None:
        began_s = trio.current_time()
        for at_s in RETRANSMIT_S:
            await trio.sleep_until(began_s + at_s)
            try:
                request = stun.encode_request(question.transaction, ipv6=":" in question.server[0])
                await self._socket.sendto(request, question.server)
            except OSError:  # no way there at this moment; the next attempt may find one
                continue

    def expect(self, nonce: bytes) -> Arrival:
        """See ports.ProbePort; the oldest is forgotten where there are too many."""
        arrival = self._expected[nonce] = Arrival()
        if len(self._expected) > MAX_EXPECTED:
            del self._expected[next(iter(self._expected))]
        return arrival

    async def run(self) -> None:
        """Receive until cancelled."""
        while True:
            try:
                data, sender = await self._socket.recvfrom(MAX_DATAGRAM_BYTES)
            except OSError:
                await trio.sleep(ERROR_PAUSE_S)
                continue
            self.arrived(data, (str(sender[0]).partition("%")[0], int(sender[1])))

    def arrived(self, data: bytes, sender: Address) -> None:
        """Take a datagram."""
        nonce = try_nonce(data)
        if nonce is not None:
            arrival = self._expected.get(nonce)
            if arrival is not None and not arrival.there.is_set():
                arrival.sender = sender
                arrival.there.set()
            return
        question = self._asked.get(data[8 : stun.HEADER_BYTES]) if len(data) >= stun.HEADER_BYTES else None
        if question is None:
            STUN_ASKED.labels(outcome="unasked").inc()
        elif sender != question.server:
            STUN_ASKED.labels(outcome="wrong source").inc()
        else:
            question.take(data)


class _Question:
    """One that is out."""

    def __init__(self, server: Address) -> None:
        self.server = server
        self.transaction = secrets.token_bytes(stun.TRANSACTION_BYTES)
        self.answered = trio.Event()
        self.mapped: Address | None = None

    def take(self, data: bytes) -> None:
        """An answer; what is none is as if it had not come."""
        try:
            answer = stun.parse_answer(data, self.transaction)
        except RemoteProtocolError:
            STUN_ASKED.labels(outcome="invalid").inc()
            return
        self.mapped = answer.mapped
        self.answered.set()


@asynccontextmanager
async def open_probe_port(*, ipv6: bool = False) -> AsyncIterator[UdpProbePort]:
    """A UDP port on every address of one family, until the end of the block. Raises ConnectError."""
    try:
        sock = trio.socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    except OSError as error:
        raise ConnectError(f"no UDP port is to be had: {error}") from error
    with sock:
        try:
            await sock.bind(("::" if ipv6 else "0.0.0.0", 0))  # noqa: S104 -- which address is used is what we ask
        except OSError as error:
            raise ConnectError(f"no UDP port is to be had: {error}") from error
        port = UdpProbePort(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.run)
            try:
                yield port
            finally:
                nursery.cancel_scope.cancel()


def send_from_other_port(bound: Sequence[Address], data: bytes, to: Address) -> bool:
    """Send a datagram from the address that is bound for ``to``, from a port that is used once; whether it went out.

    ``bound``: where the main port is, as in ports.Datagrams. Never waits.
    """
    of_family = [host for host, _ in bound if (":" in host) is (":" in to[0])]
    for host in of_family:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.bind((host, 0))
                sock.sendto(data, to)
                return True
        except OSError:  # no way from that address
            continue
    return False
