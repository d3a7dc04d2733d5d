"""A DHT in memory for tests of services: every node sees every record at once; satisfies ports.Dht.

`MemoryDhtSite` is the network: nodes that have joined it by an address of another share one set of records, by the same core as
the real DHT's nodes. Faults: `cut` takes a node off the network and back. Not here: datagrams, look-ups (memory_datagrams
and net.dht run in memory as well).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from meshmax.base.errors import ManifestInvalid
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord
from meshmax.core.provider_records import ProviderRecords
from meshmax.ports import Signer
from meshmax.wire.provider_records import encode_record, is_withdrawal, verify_record


class MemoryDhtSite:
    """The network of MemoryDhts. ``unix_now``: Unix seconds; ``latency_s``: what a look-up takes."""

    def __init__(self, unix_now: Callable[[], float], latency_s: float = 0.1) -> None:
        self.unix_now, self.latency_s = unix_now, latency_s
        self.nodes: dict[tuple[str, int], MemoryDht] = {}
        self.records = ProviderRecords(bytes(20))

    @asynccontextmanager
    async def open(self, signer: Signer) -> AsyncIterator[MemoryDht]:
        """A node; it knows nobody until it joins."""
        address = (f"11.0.{len(self.nodes)}.1", 11435)
        dht = self.nodes[address] = MemoryDht(self, signer, address)
        try:
            yield dht
        finally:
            dht.reachable = False


class MemoryDht:
    """See the module. Made by `MemoryDhtSite.open`."""

    def __init__(self, site: MemoryDhtSite, signer: Signer, address: tuple[str, int]) -> None:
        self._site, self.peer_id, self.address = site, signer.peer_id, address
        self.reachable, self._joined = True, False
        self._known_at: dict[bytes, int] = {}
        self._own: dict[bytes, ProviderRecord] = {}

    @property
    def contacts(self) -> int:
        """See ports.Dht."""
        return len(self._others()) if self.reachable and self._joined else 0

    @property
    def problem(self) -> str:
        """See ports.Dht."""
        return "" if self.contacts else "no node of the DHT answers"

    def cut(self, apart: bool = True) -> None:
        """Take this node off the network, or put it back."""
        self.reachable = not apart

    async def join(self, addresses: Sequence[tuple[str, int]]) -> int:
        """See ports.Dht."""
        await trio.sleep(self._site.latency_s)
        there = [node for node in map(self._site.nodes.get, addresses) if node and node.reachable and node is not self]
        if there and self.reachable:
            self._joined = True
            for node in there:
                node._joined = True
            return len(there)
        return 0

    async def find(self, key: bytes, enough: int = MAX_PROVIDERS) -> tuple[ProviderRecord, ...]:
        """See ports.Dht."""
        await trio.sleep(self._site.latency_s)
        now_s = self._site.unix_now()
        records = self._site.records.records(key, now_s) if self.contacts else []
        found = {record.peer_id: record for record in records}
        own = self._own.get(key)
        if own is not None and not is_withdrawal(own) and own.expires_at_s > now_s:
            found[own.peer_id] = own
        live = sorted(found.values(), key=lambda record: (record.issued_at_s, record.peer_id), reverse=True)
        return tuple(live[:MAX_PROVIDERS])

    async def announce(self, record: Signed) -> int:
        """See ports.Dht."""
        word = verify_record(record, self._site.unix_now())
        before = self._own.get(word.key)
        if before is not None and before.peer_id == word.peer_id and before.sequence > word.sequence:
            raise ManifestInvalid("a newer record of this provider is announced already")
        self._own[word.key] = word
        self._known_at[word.key] = self.contacts
        await trio.sleep(self._site.latency_s)
        taken = self.contacts and self._site.records.put(encode_record(record), self.address[0], self._site.unix_now())
        return self.contacts if taken else 0

    def moved(self, key: bytes) -> int:
        """See ports.Dht."""
        return max(0, self.contacts - self._known_at[key]) if key in self._known_at else 0

    def _others(self) -> list[MemoryDht]:
        return [node for node in self._site.nodes.values() if node is not self and node.reachable and node._joined]
