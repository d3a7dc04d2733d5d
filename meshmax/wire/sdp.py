"""SDP of one data channel (RFC 8866, 8839, 8841): ICE credentials, candidates, the fingerprint of the DTLS certificate.

Written is what browsers and aiortc understand too. Read is only what a data channel needs: any other attribute is passed over,
a second of those that count, or one out of bounds, is an error. Not here: which candidates are believed (core.candidates).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, Literal, TypeAlias

import msgspec

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.units import KIB

MAX_SDP: Final = 8 * KIB  # characters; with ten candidates it has about 1,200
MAX_CANDIDATES: Final = 16  # more of one machine are not worth a check each
SCTP_PORT: Final = 5000  # as everybody; it means nothing inside DTLS
MAX_PRIORITY: Final = 2**31 - 1  # RFC 8445, 5.1.2

Setup: TypeAlias = Literal["actpass", "active", "passive"]  # RFC 8842: "actpass" offers, "active" is the DTLS client
Kind: TypeAlias = Literal["host", "srflx", "relay"]

_UFRAG: Final = re.compile(r"[A-Za-z0-9+/]{4,256}")
_PASSWORD: Final = re.compile(r"[A-Za-z0-9+/]{22,256}")
_FINGERPRINT: Final = re.compile(r"sha-256 ((?:[0-9A-Fa-f]{2}:){31}[0-9A-Fa-f]{2})")
_SETUP: Final = re.compile(r"actpass|active|passive")
_CANDIDATE: Final = re.compile(
    r"([A-Za-z0-9+/]{1,64}) 1 (?:udp|UDP) ([0-9]{1,10}) ([0-9A-Fa-f:.]{2,45}) ([0-9]{1,5}) typ (host|srflx|relay)(?: .*)?"
)


class IceCandidate(msgspec.Struct, frozen=True):
    """A candidate of UDP, component 1; ``foundation`` and ``priority`` as in RFC 8445, 5.1.1 and 5.1.2."""

    kind: Kind
    ip: str
    port: int
    priority: int
    foundation: str


class Description(msgspec.Struct, frozen=True):
    """What one end says. ``fingerprint``: SHA-256 of its certificate, as 32 hexadecimal pairs with colons."""

    ufrag: str
    password: str
    fingerprint: str
    setup: Setup
    candidates: tuple[IceCandidate, ...] = ()

    def __repr__(self) -> str:
        return f"Description({self.setup}, {len(self.candidates)} candidates)"  # never the password


def encode(description: Description, session: int) -> str:
    """The SDP. ``session``: a number of this session, below 2**62 (RFC 8866, 5.2)."""
    lines = [
        "v=0",
        f"o=- {session} 1 IN IP4 0.0.0.0",
        "s=-",
        "t=0 0",
        "a=group:BUNDLE 0",
        "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
        "c=IN IP4 0.0.0.0",
        "a=mid:0",
        f"a=sctp-port:{SCTP_PORT}",
        f"a=max-message-size:{64 * KIB}",
        f"a=ice-ufrag:{description.ufrag}",
        f"a=ice-pwd:{description.password}",
        f"a=fingerprint:sha-256 {description.fingerprint}",
        f"a=setup:{description.setup}",
    ]
    for one in description.candidates[:MAX_CANDIDATES]:
        hidden = "::" if ":" in one.ip else "0.0.0.0"  # noqa: S104 - no address (RFC 8839, 5.1)
        related = "" if one.kind == "host" else f" raddr {hidden} rport 9"
        lines.append(f"a=candidate:{one.foundation} 1 udp {one.priority} {one.ip} {one.port} typ {one.kind}{related}")
    lines.append("a=end-of-candidates")
    return "".join(f"{line}\r\n" for line in lines)


def decode(text: str) -> Description:
    """Raises RemoteProtocolError. Candidates of other kinds than UDP at an IP address are passed over."""
    if len(text) > MAX_SDP or not text.isascii():
        raise RemoteProtocolError("the peer sent an SDP out of bounds")
    lines = text.replace("\r\n", "\n").split("\n")
    candidates = [one for line in lines if line.startswith("a=candidate:") for one in _candidate(line[12:])]
    if len(candidates) > MAX_CANDIDATES:
        raise RemoteProtocolError(f"the peer sent an SDP with more than {MAX_CANDIDATES} candidates")
    return Description(
        _one(lines, "a=ice-ufrag:", _UFRAG)[0],
        _one(lines, "a=ice-pwd:", _PASSWORD)[0],
        _one(lines, "a=fingerprint:", _FINGERPRINT)[1].upper(),
        msgspec.convert(_one(lines, "a=setup:", _SETUP)[0], Setup),
        tuple(candidates),
    )


def _one(lines: list[str], prefix: str, pattern: re.Pattern[str]) -> re.Match[str]:
    """The value of the attribute that must be there once."""
    values = [line[len(prefix) :] for line in lines if line.startswith(prefix)]
    matches = [match for value in values if (match := pattern.fullmatch(value))]
    if len(matches) != 1 or (len(values) != 1 and prefix != "a=fingerprint:"):
        raise RemoteProtocolError(f"the peer's SDP must have one valid line {prefix}")
    return matches[0]


def _candidate(value: str) -> list[IceCandidate]:
    match = _CANDIDATE.fullmatch(value)
    if match is None or not 0 < int(match[4]) < 65536 or not 0 < int(match[2]) <= MAX_PRIORITY:
        return []
    try:
        ip = str(ipaddress.ip_address(match[3]))
    except ValueError:
        return []
    return [IceCandidate(msgspec.convert(match[5], Kind), ip, int(match[4]), int(match[2]), match[1])]
