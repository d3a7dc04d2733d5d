"""The DHT as services use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from meshmax.base.model import Signed
from meshmax.base.providers import ProviderRecord


class Dht(Protocol):
    """Sets of signed provider records under keys. What it returns was verified; what it stores is bounded."""

    @property
    def contacts(self) -> int:
        """Nodes in our table; 0: nothing can be found or announced."""
        ...

    async def join(self, addresses: Sequence[tuple[str, int]]) -> int:
        """Ask these UDP addresses for nodes near us; how many answered. Call again whenever there are none or new ones."""
        ...

    async def find(self, key: bytes) -> tuple[ProviderRecord, ...]:
        """Live records of distinct providers, at most MAX_PROVIDERS, newest first; () where none was found."""
        ...

    async def announce(self, record: Signed) -> int:
        """Give a signed ProviderRecord to the nodes nearest its key; how many took it. Raises ManifestInvalid."""
        ...
