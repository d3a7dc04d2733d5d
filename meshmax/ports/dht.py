"""The DHT as services use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord


class Dht(Protocol):
    """Sets of signed provider records under keys. What it returns was verified; what it stores is bounded."""

    @property
    def contacts(self) -> int:
        """Nodes in our table; 0: nothing can be found or announced."""
        ...

    @property
    def problem(self) -> str:
        """Why it does not work at the moment, a sentence for people; '' when all is well."""
        ...

    async def join(self, addresses: Sequence[tuple[str, int]]) -> int:
        """Ask these UDP addresses for nodes near us; how many answered. Call again whenever there are none or new ones."""
        ...

    async def find(self, key: bytes, enough: int = MAX_PROVIDERS) -> tuple[ProviderRecord, ...]:
        """Live records of distinct providers, at most MAX_PROVIDERS, newest first; () where none was found.

        With fewer than MAX_PROVIDERS it ends as soon as ``enough`` are known: ask for few where that will do, but for more than
        one, since who answers first may name peers that do not exist. Ours is among them if we announced it.
        """
        ...

    async def announce(self, record: Signed) -> int:
        """Give a signed ProviderRecord to the nodes nearest its key; how many took it. Raises ManifestInvalid.

        The record is ours or was handed to us; a newer one of the same provider replaces it, and an older one is refused.
        It is not renewed here: announce one with a higher sequence before it expires.
        """
        ...

    def moved(self, key: bytes) -> int:
        """How many nodes came to our knowledge since we last announced ``key`` that should hold it and do not. Cheap.

        0 for a key that was never announced here. The nodes that hold records hand them on by themselves when nearer ones
        join; this tells the announcer when that cannot be enough: when it was alone, or cut off, or knew few nodes.
        """
        ...
