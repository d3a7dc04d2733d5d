"""libp2p's mDNS records: what we announce, and what we believe of what others announce. No I/O.

The libp2p mDNS specification: service ``_p2p._udp.local``; each peer a random name of 32 to 63 letters and digits; its TXT
record holds ``dnsaddr=<multiaddr ending in /p2p/PEER>`` once per address (RFC 6763 strings of at most 255 bytes). Whatever
is received is checked and bounded here: other strings are ignored, as are addresses that are not TCP or not of a peer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.net.addresses import parse_endpoint

SERVICE: Final = "_p2p._udp.local."
PEER_NAME_LENGTH: Final = 40  # characters; the specification says 32 to 63
MAX_TXT_BYTES: Final = 8192  # of one TXT record that is looked at; 16 addresses need 2 KiB
MAX_TXT_PEERS: Final = 4  # PeerIds in one record that are looked at; the specification means one
_KEY: Final = b"dnsaddr="


def encode_txt(addresses: Iterable[str]) -> bytes:
    """The TXT record's data for ``addresses`` (multiaddrs with /p2p), at most MAX_ADDRESSES; those too long are left out."""
    strings = [_KEY + address.encode("ascii", "ignore") for address in addresses]
    chosen = [string for string in strings if len(string) <= 255][:MAX_ADDRESSES]
    return b"".join(bytes([len(string)]) + string for string in chosen)


def decode_txt(data: bytes) -> dict[PeerId, tuple[str, ...]]:
    """The peers that a TXT record names, each with at most MAX_ADDRESSES multiaddrs. Never raises: bad parts are ignored."""
    found: dict[PeerId, list[str]] = {}
    for string in _strings(data[:MAX_TXT_BYTES]):
        if not string.startswith(_KEY):
            continue
        try:
            address = string[len(_KEY) :].decode("ascii")
            peer_id = parse_endpoint(address).peer_id
        except (UnicodeDecodeError, InvalidRequest):
            continue
        if peer_id is None or (peer_id not in found and len(found) >= MAX_TXT_PEERS):
            continue
        addresses = found.setdefault(peer_id, [])
        if address not in addresses and len(addresses) < MAX_ADDRESSES:
            addresses.append(address)
    return {peer_id: tuple(addresses) for peer_id, addresses in found.items()}


def _strings(data: bytes) -> Iterable[bytes]:
    at = 0
    while at < len(data):
        length = data[at]
        yield data[at + 1 : at + 1 + length]
        at += 1 + length
