"""Messages of ``/meshmax/look-back/1.0.0``: do you see me, where do I come from, what time is it, can you reach my ports?

A peer says Look; the other answers Seen or a Failure, and the stream ends. A port is tried only at the address that the
asker's own connection comes from, which the asker does not choose. A probe is one datagram of PROBE_BYTES: PROBE_FIRST_BYTE (RFC
7983 leaves it free), then the asker's nonce, so that only the asked peer can have sent it. Decided here: bounds. Not here: who
is answered how often (core.look_back).
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from meshmax.base.doctor import PortKind, TriedOutcome
from meshmax.base.reachability import NatBehaviour
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec

MAX_PORTS: Final = 3  # one of each kind
MAX_RUNGS: Final = 8
MAX_RUNG_ADDRESSES: Final = 4  # told of one rung
MAX_ADDRESS: Final = 400  # characters of a multiaddr
LOWEST_PORT: Final = 1024  # ports below belong to the system's services: nobody needs us to knock there
NONCE_BYTES: Final = 16
PROBE_FIRST_BYTE: Final = 0xDB
PROBE_BYTES: Final = 1 + NONCE_BYTES
_MAX_ASK_BYTES: Final = 1 * KIB
_MAX_BODY_BYTES: Final = 20 * KIB  # eight rungs of four addresses of 400 characters are 13 KB

_Text = Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]
_Name = Annotated[str, msgspec.Meta(max_length=64)]


class PortAsk(msgspec.Struct, frozen=True, array_like=True):
    """Try this port of mine: a TCP connection, or for "udp" one probe."""

    kind: PortKind
    port: Annotated[int, msgspec.Meta(ge=LOWEST_PORT, le=65535)]


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Asker: look back at me. ``nonce`` stands in the probe."""

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    ports: Annotated[tuple[PortAsk, ...], msgspec.Meta(max_length=MAX_PORTS)] = ()


class RungSeen(msgspec.Struct, frozen=True, array_like=True):
    """A rung of the asked peer named the asker ``ago_s`` seconds ago at these addresses; None: it never did."""

    rung: _Name
    ago_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None
    addresses: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=MAX_RUNG_ADDRESSES)] = ()


class PortTried(msgspec.Struct, frozen=True, array_like=True):
    """What came of it."""

    kind: PortKind
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    outcome: TriedOutcome


class Seen(msgspec.Struct, frozen=True, tag="seen"):
    """The asked peer: every rung that I climb; where you come from; my Unix time in seconds when I got the question.

    ``nat``: what my NAT does, None of a peer that does not tell.
    """

    rungs: Annotated[tuple[RungSeen, ...], msgspec.Meta(max_length=MAX_RUNGS)]
    address: _Text
    unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    ports: Annotated[tuple[PortTried, ...], msgspec.Meta(max_length=MAX_PORTS)] = ()
    nat: NatBehaviour | None = None


FromAsker: TypeAlias = Look
FromAsked: TypeAlias = Seen | Failure

FROM_ASKER: Final[Codec[FromAsker]] = Codec(FromAsker, _MAX_ASK_BYTES)
FROM_ASKED: Final[Codec[FromAsked]] = Codec(FromAsked, _MAX_BODY_BYTES)


def probe_of(nonce: bytes) -> bytes:
    """The datagram that carries ``nonce``."""
    return bytes([PROBE_FIRST_BYTE]) + nonce


def try_nonce(datagram: bytes) -> bytes | None:
    """The nonce of a probe; None for what is none."""
    return datagram[1:] if len(datagram) == PROBE_BYTES and datagram[0] == PROBE_FIRST_BYTE else None
