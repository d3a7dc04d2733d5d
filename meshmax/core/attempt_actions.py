"""What an attempt (core.attempt) has done for it, in the order in which it says so. Not here: when."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from meshmax.base.model import Signed
from meshmax.base.status import Path
from meshmax.base.traversal import Candidate
from meshmax.wire.signal import Message

Method = Literal["punch-tcp", "punch-udp"]
Side = Literal["in", "out"]
Outcome = Literal["made", "failed", "glare", "restart", "withdrawn"]
Tried: TypeAlias = tuple[str, str, str]  # as in base.errors.ConnectError: address (here: method), stage, cause


class Means(msgspec.Struct, frozen=True):
    """What this side can do at all. ``no_udp``: why not UDP. ``turn``: UDP by TURN servers.

    ``vouchers``: what observers say of our addresses, for the other to believe our candidates.
    """

    tcp: bool
    udp: bool
    turn: bool = False
    no_udp: str = "UDP is not there"
    vouchers: tuple[Signed, ...] = ()


class Prepare(msgspec.Struct, frozen=True):
    """Open a port for TCP (then `on_tcp_ready`), or a channel for UDP, whose offer the lead makes (then `on_udp_ready`)."""

    attempt: bytes
    tcp: bool
    udp: bool


class Send(msgspec.Struct, frozen=True):
    """Send it on the attempt's stream."""

    attempt: bytes
    message: Message


class StartTcp(msgspec.Struct, frozen=True):
    """Run the port at ``at_s`` (monotonic) against ``targets``; with none it only accepts."""

    attempt: bytes
    targets: tuple[Candidate, ...]
    at_s: float


class StartUdp(msgspec.Struct, frozen=True):
    """Give the channel the other's SDP, already screened: the lead's accepts it, the other's answers it (`on_udp_ready`)."""

    attempt: bytes
    sdp: str


class Stop(msgspec.Struct, frozen=True):
    """A method is over: stop what still runs of it."""

    attempt: bytes
    method: Method


class Adopt(msgspec.Struct, frozen=True):
    """Adopt the found stream ``number``."""

    attempt: bytes
    number: int
    side: Side


class Drop(msgspec.Struct, frozen=True):
    """Close the found stream ``number``, whatever is done with it."""

    attempt: bytes
    number: int


class End(msgspec.Struct, frozen=True):
    """The attempt is over: close everything of it but the stream ``number``, if any, once what is to be sent is sent."""

    attempt: bytes
    outcome: Outcome
    path: Path | None = None
    number: int | None = None
    tried: tuple[Tried, ...] = ()
    retry_after_s: float = 0.0


Action: TypeAlias = Prepare | Send | StartTcp | StartUdp | Stop | Adopt | Drop | End
