"""Sets of provider records under keys: what a node keeps for others, and what it gives up when it is full.

Rules. A record is verified before it is kept (wire.provider_records). Of one provider and key the highest sequence is kept;
the same again changes nothing, an older one is refused. A withdrawal leaves a mark until what it withdrew could not be
replayed any more. Bounds: providers a key, keys a provider, records in all. Whoever comes when a bound is reached
must take the place of somebody who has more than he: the source (subnet) with the most records there loses one of its newest,
that whose key is furthest from this node, and where no source has clearly more than the newcomer's, the newcomer is refused. So
a flood of identities displaces itself, and what many bring stays. Time is Unix seconds, passed in. Not here: signatures, who may
store (net.dht_protocol), files (store.dht_file).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeVar

import msgspec

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord
from meshmax.wire.dht import Verify, node_id_of_peer, target_of, verify_ed25519
from meshmax.wire.provider_records import MAX_TTL_S, decode_record, encode_record, is_withdrawal, verify_record

MAX_RECORDS: Final = 16_384  # in all; 1.2 KB each with their objects make 20 MB
MAX_KEYS_PER_PROVIDER: Final = 2048  # a model's digest and its name for each of 1,024 models
MAX_VICTIMS: Final = (
    64  # of the largest source, the newest, of which one is chosen: to look at thousands takes milliseconds
)
MAX_DUMPED_BYTES: Final = MAX_RECORDS * 800  # of the persisted form


T = TypeVar("T")


class _Kept(msgspec.Struct, frozen=True):
    record: ProviderRecord
    encoded: bytes
    source: str
    order: bytes  # the provider's node id, by which pages are cut
    until_s: float  # forgotten then: its expiry, or the latest one of what a withdrawal withdrew

    @property
    def is_mark(self) -> bool:
        return is_withdrawal(self.record)


class _Dumped(msgspec.Struct, frozen=True, array_like=True):
    encoded: bytes
    source: str


class ProviderRecords:
    """What one node keeps. ``node_id``: ours, 20 bytes, from which distances count."""

    __slots__ = ("_by_provider", "_by_source", "_count", "_keys", "_long_id", "_max_records", "_verify")

    def __init__(self, node_id: bytes, verify: Verify = verify_ed25519, max_records: int = MAX_RECORDS) -> None:
        self._long_id = int.from_bytes(node_id, "big")
        self._verify, self._max_records = verify, max_records
        self._keys: dict[bytes, dict[PeerId, _Kept]] = {}
        self._by_provider: Counter[PeerId] = Counter()
        self._by_source: dict[str, dict[tuple[bytes, PeerId], None]] = {}  # what came from there, oldest first
        self._count = 0

    def __len__(self) -> int:
        """Records kept, marks of withdrawals included."""
        return self._count

    def put(self, encoded: bytes, source: str, now_s: float) -> bool:
        """Keep an encoded record that came from ``source``; False if there is no room or a newer one. Raises ManifestInvalid."""
        known = self._known(encoded, now_s)
        if known:
            return True
        record, _ = decode_record(encoded, now_s, self._verify)
        before = self._keys.get(record.key, {}).get(record.peer_id)
        if before is not None:
            if before.record.sequence >= record.sequence:
                return False
            self._drop(before)
        elif not self._make_room(record, source):
            return False
        until_s = record.issued_at_s + MAX_TTL_S if is_withdrawal(record) else record.expires_at_s
        kept = _Kept(record, encoded, source, node_id_of_peer(record.peer_id), until_s)
        self._keys.setdefault(record.key, {})[record.peer_id] = kept
        self._by_provider[record.peer_id] += 1
        self._by_source.setdefault(source, {})[record.key, record.peer_id] = None
        self._count += 1
        return True

    def put_signed(self, signed: Signed, source: str, now_s: float) -> ProviderRecord:
        """Keep one of our own. Raises ManifestInvalid, also for one that is older than what is kept."""
        record = verify_record(signed, now_s, self._verify)
        if not self.put(encode_record(signed), source, now_s):
            before = self._keys.get(record.key, {}).get(record.peer_id)
            if before is not None:
                raise ManifestInvalid("a newer record of this provider is announced already")
        return record

    def page(self, key: bytes, after: bytes, now_s: float, limit: int) -> list[tuple[bytes, bytes]]:
        """(order, encoded) of up to ``limit`` live records whose order is greater than ``after``, ascending."""
        kept = self._keys.get(key)
        if not kept:
            return []
        live = sorted((k.order, k.encoded) for k in kept.values() if k.order > after and _lives(k, now_s))
        return live[:limit]

    def records(self, key: bytes, now_s: float) -> list[ProviderRecord]:
        """The live ones of a key."""
        return [kept.record for kept in self._keys.get(key, {}).values() if _lives(kept, now_s)]

    def sweep(self, now_s: float) -> int:
        """Forget what has expired; how many."""
        gone = [k for kept in self._keys.values() for k in kept.values() if k.until_s <= now_s]
        for kept in gone:
            self._drop(kept)
        return len(gone)

    def keys(self) -> tuple[bytes, ...]:
        """Keys of which anything is kept."""
        return tuple(self._keys)

    def encoded_of(self, key: bytes) -> list[bytes]:
        """All that is kept of a key, withdrawals too, to hand on."""
        return [kept.encoded for kept in self._keys.get(key, {}).values()]

    def dump(self) -> bytes:
        """All of it, for a file; `load` takes it back."""
        return msgspec.msgpack.encode([_Dumped(k.encoded, k.source) for k in self._all()])

    def load(self, data: bytes, now_s: float) -> int:
        """Take back what `dump` gave and is still valid; how many. What is damaged or forged is left out."""
        if len(data) > MAX_DUMPED_BYTES:
            return 0
        try:
            dumped = msgspec.msgpack.decode(data, type=list[_Dumped])
        except (msgspec.DecodeError, ValueError, RecursionError):
            return 0
        return sum(self._try_put(entry, now_s) for entry in dumped[: self._max_records])

    def _try_put(self, entry: _Dumped, now_s: float) -> bool:
        try:
            return self.put(entry.encoded, entry.source[:64], now_s)
        except ManifestInvalid:
            return False

    def _known(self, encoded: bytes, now_s: float) -> bool:
        # The very bytes that we keep need no second look: announcers renew to many nodes, which hand on to each other.
        return any(kept.encoded == encoded and _lives(kept, now_s) for kept in self._suspects(encoded))

    def _suspects(self, encoded: bytes) -> Iterable[_Kept]:
        # The payload begins with the array's head and the key's (0x85, 0x58 0x20), then the key.
        return self._keys.get(encoded[99:131], {}).values()

    def _make_room(self, record: ProviderRecord, source: str) -> bool:
        """Room for a newcomer by every bound, someone else's record dropped where need be and fair."""
        if self._by_provider[record.peer_id] >= MAX_KEYS_PER_PROVIDER:
            return False
        of_key = self._keys.get(record.key, {})
        if len(of_key) >= MAX_PROVIDERS:
            held = Counter(kept.source for kept in of_key.values())
            largest = _crowding(held, source)
            return self._replace([kept for kept in of_key.values() if kept.source == largest])
        if self._count >= self._max_records:
            largest = _crowding({name: len(kept) for name, kept in self._by_source.items()}, source)
            newest = islice(reversed(self._by_source[largest] if largest is not None else {}), MAX_VICTIMS)
            return self._replace([self._keys[key][peer_id] for key, peer_id in newest])
        return True

    def _replace(self, among: Sequence[_Kept]) -> bool:
        """Drop the one whose key is furthest from us; whether there was one."""
        if among:
            self._drop(max(among, key=lambda kept: self._distance(kept.record.key)))
        return bool(among)

    def _distance(self, key: bytes) -> int:
        return int.from_bytes(target_of(key), "big") ^ self._long_id

    def _all(self) -> Iterator[_Kept]:
        return (kept for of_key in self._keys.values() for kept in of_key.values())

    def _drop(self, kept: _Kept) -> None:
        of_key = self._keys[kept.record.key]
        del of_key[kept.record.peer_id]
        if not of_key:
            del self._keys[kept.record.key]
        self._count -= 1
        _less(self._by_provider, kept.record.peer_id)
        of_source = self._by_source[kept.source]
        del of_source[kept.record.key, kept.record.peer_id]
        if not of_source:
            del self._by_source[kept.source]


def _crowding(held: Mapping[str, int], source: str) -> str | None:
    """Whoever has most, if that is clearly more than ``source`` has."""
    largest = max(held, key=held.__getitem__)
    return largest if held[largest] > held.get(source, 0) + 1 else None


def _less(counter: Counter[T], name: T) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _lives(kept: _Kept, now_s: float) -> bool:
    return not kept.is_mark and kept.record.expires_at_s > now_s
