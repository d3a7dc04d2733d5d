"""The DHT's storage: the kademlia package's interface over sets of provider records.

The package knows one value a key and lets whoever comes replace it. Here a "value" that is set is one signed record, which
joins the set of its key if core.provider_records lets it; what is got is the whole set. Bounds and fairness are the core's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kademlia.storage import IStorage

from meshmax.core.provider_records import ProviderRecords


class RecordStorage(IStorage):  # type: ignore[misc]
    """kademlia's storage over ``records``; ``unix_now`` gives Unix seconds."""

    def __init__(self, records: ProviderRecords, unix_now: Callable[[], float]) -> None:
        self.records, self._unix_now = records, unix_now

    def store(self, encoded: bytes, source: str) -> bool:
        """Keep an encoded record that came from ``source``. Raises ManifestInvalid."""
        return self.records.put(encoded, source, self._unix_now())

    def page(self, key: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """See ProviderRecords.page."""
        return self.records.page(key, after, self._unix_now(), limit)

    def sweep(self) -> None:
        """Forget what has expired."""
        self.records.sweep(self._unix_now())

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """See IStorage."""
        self.store(value, "")

    def __getitem__(self, key: bytes) -> list[bytes]:
        """See IStorage: every live record of ``key``, encoded. Raises KeyError where there is none."""
        found = [encoded for _, encoded in self.page(key, b"", len(self.records))]
        if not found:
            raise KeyError(key)
        return found

    def get(self, key: bytes, default: Any = None) -> Any:
        """See IStorage."""
        try:
            return self[key]
        except KeyError:
            return default

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[bytes, bytes]]:
        """See IStorage: nothing. Who holds a record does not renew it, its provider does."""
        return iter(())

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """See IStorage: (key, encoded record) of all that is kept."""
        return ((key, encoded) for key in self.records.keys() for encoded in self.records.encoded_of(key))  # noqa: SIM118
