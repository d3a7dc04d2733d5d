"""Which of our addresses others are told, where only so many can be: each kind has its share, the best of each come first.

Rules. At most MAX_ADDRESSES, without repetitions. A receiver that keeps few keeps the first ones: so those of our interfaces,
those seen from outside and those over relays take turns in the front. Loopback ones, of use on this machine only, come last.
Not here: what the addresses are (net.swarm, core.reachability, services.relay_client).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES

FRONT_OWN: Final = 4  # of our interfaces, before the others have their turn: two networks, IPv4 and IPv6
FRONT_OTHERS: Final = 2  # of each other kind
_LOOPBACK: Final = ("/ip4/127.", "/ip6/::1/")


def told_addresses(own: Sequence[str], outside: Sequence[str] = (), relayed: Sequence[str] = ()) -> tuple[str, ...]:
    """``own``: of interfaces, ``outside``: public and mapped ones, ``relayed``: circuit addresses. All with /p2p."""
    far = [text for text in own if not text.startswith(_LOOPBACK)]
    front = (*far[:FRONT_OWN], *outside[:FRONT_OTHERS], *relayed[:FRONT_OTHERS])
    return tuple(dict.fromkeys((*front, *far, *outside, *relayed, *own)))[:MAX_ADDRESSES]


def without_peer(addresses: Sequence[str], peer_id: PeerId) -> tuple[str, ...]:
    """``addresses`` of the peer without its /p2p, where they stand beside its PeerId and room is short."""
    return tuple(text.removesuffix(f"/p2p/{peer_id}") for text in addresses)


def with_peer(addresses: Sequence[str], peer_id: PeerId) -> tuple[str, ...]:
    """The other way round, so that one address is not taken for two; what names another peer stays as it is."""
    suffix = f"/p2p/{peer_id}"
    return tuple(text if "/p2p/" in text.rpartition("/p2p-circuit")[2] else text + suffix for text in addresses)
