"""Messages of NAT-PMP (RFC 6886, 3.2 and 3.3): what a client asks of its gateway, and what that answers.

Requests have 2 or 12 bytes, answers 12 or 16; anything else is no message. Not here: retransmission, whose answer counts
(net.nat_pmp).
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

import msgspec

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.reachability import MappingProtocol

PORT: Final = 5351  # of the gateway
MAX_MESSAGE_BYTES: Final = 1100  # of PCP, which answers on the same port; longer is nobody's
RESULTS: Final = {
    1: "it does not speak this version",
    2: "it is switched off there, or we are not authorised",
    3: "it has no address outside itself",
    4: "it has no room for more",
    5: "it does not do that",
}

_ANSWER: Final = 128
_OPCODES: Final[dict[MappingProtocol, int]] = {"udp": 1, "tcp": 2}
_ADDRESS: Final = struct.Struct(">BBHI4s")
_MAP: Final = struct.Struct(">BBHHHI")
_MAPPED: Final = struct.Struct(">BBHIHHI")


class Failed(msgspec.Struct, frozen=True):
    """The gateway says no: a result code other than 0 (RFC 6886, 3.5). ``opcode`` as asked."""

    opcode: int
    result: int

    @property
    def sentence(self) -> str:
        """Why, for people."""
        return RESULTS.get(self.result, f"it answers with code {self.result}")


class ExternalAddress(msgspec.Struct, frozen=True):
    """The gateway's own address outside. ``epoch_s``: since it knows its mappings; one that is smaller forgot them."""

    epoch_s: int
    ip: str


class Mapped(msgspec.Struct, frozen=True):
    """A mapping for so long; 0 seconds: it is gone. The external port may be another than was asked for."""

    protocol: MappingProtocol
    epoch_s: int
    port: int
    external_port: int
    lifetime_s: int


def ask_address() -> bytes:
    """The question for the external address."""
    return b"\0\0"


def ask_mapping(protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> bytes:
    """The question for a mapping; with 0 seconds (and external port 0) for its end. 0: any external port."""
    return _MAP.pack(0, _OPCODES[protocol], 0, port, external_port, lifetime_s)


def decode_answer(data: bytes) -> ExternalAddress | Mapped | Failed:
    """Raises RemoteProtocolError."""
    if len(data) < 8 or len(data) > MAX_MESSAGE_BYTES or data[1] < _ANSWER:
        raise RemoteProtocolError("this is no answer of NAT-PMP")
    version, opcode, result = data[0], data[1] - _ANSWER, int.from_bytes(data[2:4], "big")
    if result or version:  # a gateway that speaks another version says so in its own
        return Failed(opcode, result or 1)
    if opcode == 0 and len(data) == _ADDRESS.size:
        *_, epoch_s, ip = _ADDRESS.unpack(data)
        return ExternalAddress(epoch_s, str(ipaddress.IPv4Address(ip)))
    if opcode in (1, 2) and len(data) == _MAPPED.size:
        *_, epoch_s, port, external_port, lifetime_s = _MAPPED.unpack(data)
        if not port or (lifetime_s and not external_port):
            raise RemoteProtocolError("this answer of NAT-PMP maps port 0")
        return Mapped("udp" if opcode == 1 else "tcp", epoch_s, port, external_port, lifetime_s)
    raise RemoteProtocolError("this is no answer of NAT-PMP")
