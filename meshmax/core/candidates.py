"""Which candidates of a peer we send packets to.

A peer's word is no proof of where it is: candidates that point at others would have us knock at strangers' doors. So a public
address counts only if a node that we know has vouched for it, or if the peer is connected with us from there; a private one
only where both of us seem to be in that private network: we share our external address or, where nobody outside has seen ours,
it is in a subnet of ours. Never
loopback, link-local, multicast, reserved or unspecified addresses, nor our own; ports from 1024 up, and 80 and 443. The same
for the candidates in an SDP (RFC 8866, RFC 8839), of which nothing else that names an address is left. Not here: who vouches
(wire.voucher), sending.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.traversal import MAX_IP, Candidate

MAX_TARGETS: Final = 16  # of one attempt and method; each gets some ten packets
LOWEST_PORT: Final = 1024
LOW_PORTS: Final = (80, 443)  # where networks let nothing else out
MAX_SDP_LINES: Final = 80  # a data channel's has 18 and one for each candidate
MAX_SDP_LINE: Final = 512  # characters; the longest known, a SHA-512 fingerprint, has 213

_IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Net: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _nets(*texts: str) -> tuple[_Net, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# RFC 1918, RFC 6598 (carriers), RFC 4193
_PRIVATE: Final = _nets("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
# Nobody's address, or one that means another: this network, loopback, link-local, protocol assignments, relay anycast,
# multicast, reserved and broadcast; of IPv6: unspecified, loopback, mapped and compatible IPv4, NAT64, Teredo, 6to4.
_NEVER: Final = _nets(
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2002::/16", "fe80::/10",
    "fec0::/10", "ff00::/8",
)  # fmt: skip

_CANDIDATE: Final = re.compile(
    r"a=candidate:([A-Za-z0-9+/]{1,64}) 1 (udp|UDP) ([0-9]{1,10}) ([0-9A-Fa-f:.]{2,45}) ([0-9]{1,5})"
    r" typ (host|srflx|prflx|relay)(?: [\x21-\x7e]+){0,12}"
)
_SECTION: Final = re.compile(r"m=application [0-9]{1,5} UDP/DTLS/SCTP webrtc-datachannel")
_FINGERPRINT: Final = re.compile(r"a=fingerprint:sha-256 (?:[0-9A-Fa-f]{2}:){31}[0-9A-Fa-f]{2}")
_OTHER_FINGERPRINT: Final = re.compile(r"a=fingerprint:sha-(?:384|512) [0-9A-Fa-f:]{95,191}")
_NEEDED: Final = (  # each exactly once
    re.compile(r"a=ice-ufrag:[A-Za-z0-9+/]{4,256}"),
    re.compile(r"a=ice-pwd:[A-Za-z0-9+/]{22,256}"),
    re.compile(r"a=setup:(?:actpass|active|passive)"),
    re.compile(r"a=mid:[A-Za-z0-9]{1,16}"),
    re.compile(r"a=sctp-port:[0-9]{1,5}"),
)
_HARMLESS: Final = (
    re.compile(r"v=0"),
    re.compile(r"o=- [0-9]{1,20} [0-9]{1,20} IN IP[46] [0-9A-Fa-f:.]{2,45}"),
    re.compile(r"s=-"),
    re.compile(r"t=0 0"),
    re.compile(r"a=group:BUNDLE [A-Za-z0-9]{1,16}"),
    re.compile(r"a=msid-semantic: ?WMS \*?"),
    re.compile(r"a=max-message-size:[0-9]{1,10}"),
    re.compile(r"a=end-of-candidates"),
    re.compile(r"a=ice-options:[A-Za-z0-9 ,-]{1,64}"),
    re.compile(r"a=sendrecv"),
)
_CONNECTION: Final = re.compile(r"c=IN IP[46] [0-9A-Fa-f:.]{2,45}")


def is_private(ip: str) -> bool:
    """Whether ``ip`` is an address of a private or a carrier's network. False for what is no address."""
    address = try_ip(ip)
    return address is not None and any(address in net for net in _PRIVATE if net.version == address.version)


def try_ip(text: str) -> _IP | None:
    """The address that ``text`` is; None for anything else, names and zones included."""
    try:
        return ipaddress.ip_address(text) if len(text) <= MAX_IP and "%" not in text else None
    except ValueError:
        return None


class Screen(msgspec.Struct, frozen=True):
    """What we know when a peer's candidates come; addresses in canonical text, as ``ipaddress`` writes it.

    ``vouched``: has a node that we know vouched for the peer at this IP? ``connected``: IPs from which the peer is connected
    with us. ``subnets``: of our interfaces, as CIDR. ``own``: our interfaces' IPs. ``external``: how observers see us.
    ``relays``: IPs of TURN servers that we use ourselves, at which relayed candidates may be.
    """

    vouched: Callable[[str], bool]
    connected: frozenset[str] = frozenset()
    subnets: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()
    external: frozenset[str] = frozenset()
    relays: frozenset[str] = frozenset()

    def allows(self, candidate: Candidate) -> bool:
        """See the module."""
        address = try_ip(candidate.ip)
        if address is None or str(address) in self.own or not _port_allowed(candidate.port):
            return False
        if any(address in net for net in _NEVER if net.version == address.version):
            return False
        if candidate.kind == "relay":
            return str(address) in self.relays
        if any(address in net for net in _PRIVATE if net.version == address.version):
            return self._shares(address)
        return self._proved(str(address)) and not self._is_edge(address)

    def targets(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Those of TCP that are allowed, each address once, at most MAX_TARGETS."""
        allowed: dict[tuple[str, int], Candidate] = {}
        for candidate in candidates:
            if candidate.transport == "tcp" and self.allows(candidate):
                ip = str(ipaddress.ip_address(candidate.ip))
                allowed.setdefault((ip, candidate.port), Candidate(candidate.kind, "tcp", ip, candidate.port))
        return tuple(allowed.values())[:MAX_TARGETS]

    def sdp(self, text: str) -> str:
        """``text`` with the allowed candidates only. Raises RemoteProtocolError if it is not one data channel's SDP."""
        return _screen_sdp(text, self)

    def _proved(self, ip: str) -> bool:
        return ip in self.connected or self.vouched(ip)

    def _shares(self, address: _IP) -> bool:
        if str(address) in self.connected:
            return True
        if self.external and not any(self._proved(ip) for ip in self.external):
            return False  # it is elsewhere: in many networks somebody has this same private address
        for text in self.subnets:
            net = ipaddress.ip_network(text, strict=False)
            if net.version == address.version and address in net:
                return not _is_edge_of(address, net)
        return bool(self.external)  # behind one address is one private network, or a carrier's

    def _is_edge(self, address: _IP) -> bool:
        nets = (ipaddress.ip_network(text, strict=False) for text in self.subnets)
        return any(_is_edge_of(address, net) for net in nets if net.version == address.version)


def _is_edge_of(address: _IP, net: _Net) -> bool:
    """Whether it is the broadcast address or the network's own; a net of two or one address (RFC 3021) has none."""
    if net.num_addresses <= 2 or net.version == 6:
        return False
    return address in (net.network_address, net.broadcast_address)


def _port_allowed(port: int) -> bool:
    return LOWEST_PORT <= port <= 65535 or port in LOW_PORTS


def _screen_sdp(text: str, screen: Screen) -> str:
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not text.isascii() or len(lines) > MAX_SDP_LINES or any(len(line) > MAX_SDP_LINE for line in lines):
        raise RemoteProtocolError("the peer sent an SDP out of bounds")
    kept: list[str] = []
    candidates = 0
    for line in lines:
        if line.startswith("a=candidate:"):
            parsed = _try_candidate(line)
            if parsed and candidates < MAX_TARGETS and screen.allows(parsed[0]):
                candidates += 1
                kept.append(parsed[1])
        else:
            kept.append(_screen_line(line))
    _check_whole(kept)
    return "\r\n".join(kept) + "\r\n"


def _try_candidate(line: str) -> tuple[Candidate, str] | None:
    """The candidate and its line without extensions; None where it is another kind (TCP, a name), which just is not used."""
    match = _CANDIDATE.fullmatch(line)
    address = try_ip(match[4]) if match else None
    if match is None or address is None or not 1 <= int(match[5]) <= 65535 or int(match[3]) >= 1 << 32:
        return None
    kind: str = "srflx" if match[6] == "prflx" else match[6]
    candidate = msgspec.convert((kind, "udp", str(address), int(match[5])), Candidate)
    return candidate, f"a=candidate:{match[1]} 1 udp {int(match[3])} {address} {candidate.port} typ {kind}"


def _screen_line(line: str) -> str:
    if _SECTION.fullmatch(line):
        return "m=application 9 UDP/DTLS/SCTP webrtc-datachannel"  # 9 and 0.0.0.0: as where nothing is known (RFC 8840, 4.1.1)
    if _CONNECTION.fullmatch(line):
        return "c=IN IP4 0.0.0.0"
    known = (_FINGERPRINT, _OTHER_FINGERPRINT, *_NEEDED, *_HARMLESS)
    if not any(pattern.fullmatch(line) for pattern in known):
        raise RemoteProtocolError(f"the peer sent an SDP with a line that no data channel needs: {line[:60]!r}")
    return line


def _check_whole(lines: Sequence[str]) -> None:
    once = (_SECTION, _FINGERPRINT, *_NEEDED)
    if any(sum(pattern.fullmatch(line) is not None for line in lines) != 1 for pattern in once):
        raise RemoteProtocolError("the peer sent an SDP that is not one data channel's, with one SHA-256 fingerprint")
