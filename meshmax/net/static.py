"""A rung of discovery without a network: addresses that a person gave (``--join``). Says them again now and then.

Repeating costs nothing and brings a peer back that was away for longer than the table of peers remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Literal

import trio

from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.base.ids import PeerId
from meshmax.net.addresses import parse_endpoint
from meshmax.ports import Sighting

REPEAT_S: Final = 60.0


def parse_join(text: str) -> tuple[PeerId, str]:
    """(PeerId, multiaddr) of a ``--join`` address. Raises ConfigError that says where to find a right one."""
    peer_id = None
    with suppress(InvalidRequest):
        peer_id = parse_endpoint(text).peer_id
    if peer_id is None:
        raise ConfigError(
            f"'{text[:120]}' is not a peer's address: copy one from `meshmax status` over there, "
            "like /ip4/192.168.1.5/tcp/11435/p2p/12D3KooW..."
        )
    return peer_id, text


class Static:
    """Satisfies ports.Discovery for a list of addresses, each checked when this is made."""

    name = "static"

    def __init__(self, addresses: Sequence[str], source: Literal["static", "cached"] = "static") -> None:
        self._peers: dict[PeerId, list[str]] = {}
        self._source = source
        self._again = trio.Event()
        for text in addresses:
            peer_id, address = parse_join(text)
            self._peers.setdefault(peer_id, []).append(address)

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """Name every peer again each REPEAT_S; ends at once where there is none."""
        while self._peers:
            again = self._again  # from before the naming, which may take a while
            for peer_id, addresses in self._peers.items():
                await found.send(Sighting(peer_id, tuple(addresses), self._source))
            with trio.move_on_after(REPEAT_S):
                await again.wait()

    def look_again(self) -> None:
        """See ports.LooksAgain."""
        self._again.set()
        self._again = trio.Event()
