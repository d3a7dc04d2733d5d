"""Getting through NAT: candidates (RFC 8445), what an attempt is for, the methods that make a path.

Not here: messages (wire.signal), decisions (core.signalling, core.dial_plan, core.candidates).
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

import msgspec

from meshmax.base.errors import ConfigError
from meshmax.base.ids import PeerId
from meshmax.base.status import Path

CandidateKind = Literal["host", "srflx", "relay"]
Transport = Literal["tcp", "udp"]
Method = Literal["direct", "punch-tcp", "punch-udp", "relay", "turn"]
Purpose = Literal["control", "lane"]

PUNCH_TCP_S: Final = 2.0  # for one simultaneous open; where it works it takes one round trip
PUNCH_UDP_S: Final = 5.0  # for ICE, gathering included; an attempt that fails does not end by itself
DEFAULT_TURN_PORT: Final = 3478  # RFC 8656, 4
_TURN_URL: Final = re.compile(r"turn:([A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?(?:\?transport=(?:tcp|udp))?")
MAX_IP: Final = 45  # characters; an IPv6 address in full, an IPv4 one inside (RFC 4291, 2.2)


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A transport address at which a peer may be met: its own ("host"), as an observer sees it ("srflx"), a TURN server's."""

    kind: CandidateKind
    transport: Transport
    ip: Annotated[str, msgspec.Meta(max_length=MAX_IP)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class TurnServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A TURN server (RFC 8656). ``url``: turn:HOST:PORT?transport=tcp or udp."""

    url: str
    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"TurnServer({self.url!r})"  # never the password


def parse_turn_url(url: str) -> tuple[str, int]:
    """The host and port of a TURN server. Raises ConfigError that says what is accepted."""
    match = _TURN_URL.fullmatch(url)
    if match is None or not 0 < int(match[2] or DEFAULT_TURN_PORT) < 65536:
        shown = url.rpartition("@")[2][:100]  # what is before it may be a password
        raise ConfigError(f"'{shown}' is no TURN server: write turn:HOST:PORT?transport=tcp (or udp)")
    return match[1], int(match[2] or DEFAULT_TURN_PORT)


class PathRecord(msgspec.Struct, frozen=True):
    """How a peer was reached last from one network. ``network``: a fingerprint (core.path_memory); ``at_s``: Unix time.

    ``address``: the multiaddr at which it was dialled directly, '' if it never was from there.
    """

    peer_id: PeerId
    network: str
    path: Path
    address: str
    at_s: float


class PathStory(msgspec.Struct, frozen=True):
    """How the path to a connected peer came about. ``via``: one line for people.

    ``connect_ms``: from the beginning of the dial until the peer could be used; ``direct_ms``: until a path without a relay.
    None where the peer came to us, or there is none.
    """

    via: str
    connect_ms: float | None = None
    direct_ms: float | None = None
