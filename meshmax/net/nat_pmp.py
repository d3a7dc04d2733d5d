"""Port mappings by NAT-PMP (RFC 6886); satisfies ports.PortMapper.

The router asked is the default gateway of IPv4. A question is sent again after 0.25 s and then twice as late each time, as the
RFC has it, but for ANSWER_S in all instead of a minute: a router that speaks this answers at once. Only what comes from the
gateway's address and port counts: the socket is connected to it. Not here: messages (wire.nat_pmp), what is asked for
(core.port_mapping).
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import trio

from meshmax.base.errors import ConnectError, Refused, RemoteProtocolError
from meshmax.base.reachability import MappingProtocol
from meshmax.net.gateway import default_gateway
from meshmax.wire.nat_pmp import (
    MAX_MESSAGE_BYTES,
    PORT,
    ExternalAddress,
    Failed,
    Mapped,
    ask_address,
    ask_mapping,
    decode_answer,
)

FIRST_RESEND_S: Final = 0.25
ANSWER_S: Final = 2.0


class NatPmp:
    """See the module. ``gateway``: the IPv4 address of the router, or None."""

    name: Literal["nat-pmp"] = "nat-pmp"

    def __init__(self, gateway: Callable[[], Awaitable[str | None]] = default_gateway, port: int = PORT) -> None:
        self._gateway, self._port = gateway, port
        self._router = ""

    async def find(self) -> str:
        """See ports.PortMapper."""
        gateway = await self._gateway()
        if gateway is None:
            raise ConnectError("this machine has no default gateway for IPv4")
        self._router = gateway
        answer = await self._ask(ask_address(), lambda got: isinstance(got, ExternalAddress))
        assert isinstance(answer, ExternalAddress)
        return answer.ip

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        """See ports.PortMapper. A taken external port is no error here: the router chooses another."""
        question = ask_mapping(protocol, port, external_port, lifetime_s)
        answer = await self._ask(
            question, lambda got: isinstance(got, Mapped) and (got.protocol, got.port) == (protocol, port)
        )
        assert isinstance(answer, Mapped)
        if not answer.lifetime_s:
            raise Refused("the router gives the mapping no time")
        return answer.external_port, answer.lifetime_s

    async def remove(self, protocol: MappingProtocol, port: int, external_port: int) -> None:
        """See ports.PortMapper; the router knows it by our port."""
        del external_port
        question = ask_mapping(protocol, port, 0, 0)
        await self._ask(question, lambda got: isinstance(got, Mapped) and (got.protocol, got.port) == (protocol, port))

    async def _ask(
        self, question: bytes, fits: Callable[[ExternalAddress | Mapped | Failed], bool]
    ) -> ExternalAddress | Mapped:
        try:
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect((self._router, self._port))
                answer, pause_s, until_s = None, FIRST_RESEND_S, trio.current_time() + ANSWER_S
                while answer is None and (left_s := until_s - trio.current_time()) > 0:
                    await sock.send(question)
                    with trio.move_on_after(min(pause_s, left_s)):
                        answer = await _receive(sock, question[1], fits)
                    pause_s *= 2
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if answer is not None:
                return answer
            reason = f"no answer in {ANSWER_S:.0f} s"
        raise ConnectError("the router does not speak NAT-PMP", [(self._router, "nat-pmp", reason)])


async def _receive(
    sock: trio.socket.SocketType, opcode: int, fits: Callable[[ExternalAddress | Mapped | Failed], bool]
) -> ExternalAddress | Mapped:
    """The answer that fits, others passed over. Raises Refused, OSError."""
    while True:
        data = await sock.recv(MAX_MESSAGE_BYTES + 1)
        try:
            answer = decode_answer(data)
        except RemoteProtocolError:
            continue
        if isinstance(answer, Failed):
            if answer.opcode == opcode:
                raise Refused(f"the router refuses: {answer.sentence}")
        elif fits(answer):
            return answer
