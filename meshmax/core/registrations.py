"""What a rendezvous node remembers: who registered under which namespace, until when, and who goes when there is no room.

Rules. A registration lasts for its TTL; registering again renews it, and the record with the highest sequence wins.
Answers come in pages, oldest change first; a cookie asks for what changed after the answer that gave it, and a renewal
without new addresses is no change. A cookie is good for its namespace and this table only, which a keyed hash in it proves.
Everything is bounded: in all, a namespace, a peer. When there is no room, a crowd makes some: of those who came from one
subnet (``group``), or under one namespace, the largest crowd loses its newest member to a newcomer from a smaller one; a
newcomer from the largest is refused itself. So a flood of identities from one subnet, or under one namespace, pushes out
nobody but itself. More than half full, nobody is granted more than the shortest TTL. Nobody is told what namespaces there
are. Not here: proving who asks (services.rendezvous_server).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Final, TypeVar

import msgspec
from blake3 import blake3

from meshmax.base.ids import PeerId
from meshmax.wire import rendezvous
from meshmax.wire.rendezvous import Discover, DiscoverResponse, Register, RegisterResponse

MAX_REGISTRATIONS: Final = 16_384  # in all; at 2 KiB of record each 32 MiB at worst
MAX_PER_NAMESPACE: Final = 4096  # the largest mesh that one rendezvous node serves whole
MAX_PER_PEER: Final = 16  # namespaces of one peer, which needs one
FULL_EXPIRE_S: Final = 1.0  # the same while there is no room: each takes some milliseconds
EXPIRE_S: Final = 30.0  # between looks for what has expired; an answer never tells it anyway

_SERIAL_BYTES, _PROOF_BYTES = 8, 8

K = TypeVar("K")


class Registration(msgspec.Struct):
    """One peer under one namespace. ``serial`` numbers changes, ``group`` is the subnet that it came from; monotonic seconds."""

    namespace: str
    peer_id: PeerId
    group: str
    record: bytes
    sequence: int
    addresses: tuple[str, ...]
    expires_at: float
    serial: int = 0


class Registrations:
    """The table. ``secret``: 32 random bytes that prove our cookies."""

    __slots__ = (
        "_expired_at",
        "_groups",
        "_limit",
        "_pairs",
        "_peers",
        "_secret",
        "_serial",
        "_space_limit",
        "_spaces",
        "_total",
    )

    def __init__(self, secret: bytes, limit: int = MAX_REGISTRATIONS, space_limit: int = MAX_PER_NAMESPACE) -> None:
        self._secret, self._limit, self._space_limit = secret, limit, space_limit
        self._spaces: dict[str, dict[PeerId, Registration]] = {}  # each in the order of its serials
        self._groups: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._peers: Counter[PeerId] = Counter()
        self._serial = self._total = 0
        self._expired_at = -math.inf

    def __len__(self) -> int:
        return self._total

    # --- requests ----------------------------------------------------------------------------------------------------

    def register(
        self,
        request: Register,
        peer_id: PeerId,
        sequence: int,
        addresses: tuple[str, ...],
        group: str,
        now: float,
    ) -> RegisterResponse:
        """Take the registration of ``peer_id``, whose record was verified and says ``sequence`` and ``addresses``."""
        if refusal := self._malformed(request):
            return refusal
        asked_s = rendezvous.DEFAULT_TTL_S if request.ttl_s is None else request.ttl_s
        ttl_s = asked_s if 2 * self._total < self._limit else rendezvous.MIN_TTL_S
        new = Registration(request.namespace, peer_id, group, request.record, sequence, addresses, now + ttl_s)
        old = self._spaces.get(request.namespace, {}).get(peer_id)
        if old and old.expires_at > now and old.sequence > sequence:
            return _refused(rendezvous.E_INVALID_SIGNED_PEER_RECORD, "a newer record of this peer is held")
        if old:
            new.serial = old.serial if old.addresses == addresses else 0
            self._replace(old, new)
        elif self._peers[peer_id] >= MAX_PER_PEER:
            return _refused(rendezvous.E_UNAVAILABLE, f"a peer may be in {MAX_PER_PEER} namespaces")
        elif not self._make_room(new, now):
            return _refused(rendezvous.E_UNAVAILABLE, "no room for more peers of this network or namespace")
        else:
            self._add(new)
        return RegisterResponse(rendezvous.OK, "", ttl_s)

    def unregister(self, namespace: str, peer_id: PeerId) -> None:
        """``peer_id`` leaves ``namespace``; nothing happens where it is not in it."""
        if found := self._spaces.get(namespace, {}).get(peer_id):
            self._drop(found)

    def discover(self, request: Discover, now: float) -> DiscoverResponse:
        """The next page of who is in the namespace; always with a cookie where the request was good."""
        if not _is_namespace(request.namespace):
            return DiscoverResponse(status=rendezvous.E_INVALID_NAMESPACE, text="name one, of at most 255 bytes")
        after = self._read_cookie(request.namespace, request.cookie)
        if after is None:
            return DiscoverResponse(status=rendezvous.E_INVALID_COOKIE, text="not a cookie of this node and namespace")
        limit = min(request.limit or rendezvous.MAX_PAGE, rendezvous.MAX_PAGE)
        page: list[Register] = []
        room = rendezvous.MAX_PAGE_BYTES
        for found in self._after(request.namespace, after):
            if found.expires_at <= now:
                continue
            if len(page) >= limit or len(found.record) > room:
                break
            page.append(Register(found.namespace, found.record, max(1, int(found.expires_at - now))))
            room -= len(found.record)
            after = found.serial
        return DiscoverResponse(tuple(page), self._cookie(request.namespace, after))

    def expire(self, now: float) -> None:
        """Forget what has expired; call it each EXPIRE_S."""
        self._expired_at = now
        for found in [r for space in self._spaces.values() for r in space.values() if r.expires_at <= now]:
            self._drop(found)

    def namespaces(self) -> int:
        """How many namespaces have a registration."""
        return len(self._spaces)

    # --- inside ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _malformed(request: Register) -> RegisterResponse | None:
        if not _is_namespace(request.namespace):
            return _refused(rendezvous.E_INVALID_NAMESPACE, "a namespace has 1 to 255 bytes")
        shortest, longest = rendezvous.MIN_TTL_S, rendezvous.MAX_TTL_S
        if request.ttl_s is not None and not shortest <= request.ttl_s <= longest:
            return _refused(rendezvous.E_INVALID_TTL, f"a TTL has {shortest} to {longest} seconds")
        return None

    def _make_room(self, new: Registration, now: float) -> bool:
        """Whether there is room for ``new``, after the largest crowd gave way where that is fair."""
        full = self._total >= self._limit or len(self._spaces.get(new.namespace, {})) >= self._space_limit
        if full and now >= self._expired_at + FULL_EXPIRE_S:
            self.expire(now)
        space = self._spaces.get(new.namespace, {})
        if len(space) >= self._space_limit:
            crowd = max(self._pairs[new.namespace, r.group] for r in space.values())
            if self._pairs[new.namespace, new.group] + 1 >= crowd:
                return False
            self._drop(_newest(r for r in space.values() if self._pairs[new.namespace, r.group] == crowd))
        elif self._total >= self._limit:
            group, from_there = self._groups.most_common(1)[0]
            largest = max(self._spaces.values(), key=len)
            own = max(self._groups[new.group], len(space)) + 1
            if own >= max(from_there, len(largest)):
                return False
            self._drop(_newest(largest.values() if len(largest) > from_there else self._of_group(group)))
        return True

    def _of_group(self, group: str) -> Iterator[Registration]:
        return (r for space in self._spaces.values() for r in space.values() if r.group == group)

    def _replace(self, old: Registration, new: Registration) -> None:
        if new.serial:  # told already, so it keeps its place among the changes
            self._count(old, -1)
            self._spaces[new.namespace][new.peer_id] = new
            self._count(new, 1)
        else:
            self._drop(old)
            self._add(new)

    def _add(self, new: Registration) -> None:
        self._serial += 1
        new.serial = self._serial
        self._spaces.setdefault(new.namespace, {})[new.peer_id] = new
        self._count(new, 1)

    def _drop(self, gone: Registration) -> None:
        space = self._spaces[gone.namespace]
        del space[gone.peer_id]
        if not space:
            del self._spaces[gone.namespace]
        self._count(gone, -1)

    def _count(self, registration: Registration, by: int) -> None:
        self._total += by
        _add_to(self._groups, registration.group, by)
        _add_to(self._pairs, (registration.namespace, registration.group), by)
        _add_to(self._peers, registration.peer_id, by)

    # --- cookies -----------------------------------------------------------------------------------------------------

    def _after(self, namespace: str, serial: int) -> list[Registration]:
        """What changed after ``serial``, in the order of the changes."""
        space = self._spaces.get(namespace, {})
        found = list(takewhile(lambda registration: registration.serial > serial, reversed(space.values())))
        found.reverse()
        return found

    def _cookie(self, namespace: str, serial: int) -> bytes:
        number = serial.to_bytes(_SERIAL_BYTES, "big")
        return number + self._proof(namespace, number)

    def _read_cookie(self, namespace: str, cookie: bytes) -> int | None:
        """The serial in ``cookie``, 0 where there is none, None where it is forged, of another namespace or another time."""
        if not cookie:
            return 0
        number = cookie[:_SERIAL_BYTES]
        if len(cookie) != _SERIAL_BYTES + _PROOF_BYTES or cookie[_SERIAL_BYTES:] != self._proof(namespace, number):
            return None
        return int.from_bytes(number, "big")

    def _proof(self, namespace: str, number: bytes) -> bytes:
        return blake3(number + namespace.encode(), key=self._secret).digest(length=_PROOF_BYTES)


def _is_namespace(namespace: str) -> bool:
    return 0 < len(namespace.encode()) <= rendezvous.MAX_NAMESPACE_BYTES


def _refused(status: int, text: str) -> RegisterResponse:
    return RegisterResponse(status, text)


def _newest(registrations: Iterable[Registration]) -> Registration:
    return max(registrations, key=lambda registration: registration.serial)


def _add_to(counter: Counter[K], key: K, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]  # strangers choose the keys, so those that are used up must not stay
