"""A look-up in the DHT: whom to ask next for the nodes nearest a target, and when that is enough.

Rules, after Kademlia and S/Kademlia (Baumgart and Mies, 2007):
- It goes along several paths. Whom an answer names belongs to the paths of whoever named him; a node is asked once, by the path
  that comes to it first. A liar can fill his own path with inventions and leads no other astray.
- A path asks its nearest first and has done enough when the ``width`` nearest of its list have answered. Who failed is not
  counted, who is slow is not waited for.
- Of one subnet only MAX_PER_SUBNET are counted among the nearest, the nearest first.
- Where the nearest are much denser than the network is at large, somebody has made up identities for this target. The list is
  then widened in that measure, so that the honest nodes among them are asked, too.
- Whose inventions (contacts that nobody else named) fail again and again is not listened to any longer.
- Questions in all, questions a path and contacts remembered are bounded, whatever is answered.
Not here: datagrams, time (the driver says who answered, is slow, or failed), records.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from meshmax.core.subnets import subnet_of
from meshmax.wire.dht import Contact

WIDTH: Final = 20  # nodes that hold a key, and are asked for it: Kademlia's k
MAX_WIDTH: Final = (
    80  # when identities were made up near it: with one honest in ten none is among 80 once in 4,600 times
)
PATHS: Final = 4
PATH_IN_FLIGHT: Final = 1  # questions of a path at a time, while it comes nearer
LATE_IN_FLIGHT: Final = 6  # when it does no more, and only has to ask the rest
MAX_ASKED: Final = 240  # questions of one look-up
MAX_KNOWN: Final = 2000  # contacts that one look-up remembers
MAX_PER_SUBNET: Final = 2
DENSE: Final = 3.0  # so many times denser than the network is no accident (20 nearest vary by a quarter)
MAX_ADDRESSES: Final = 8  # of one node: others may have named it at places where it is not
MAX_INVENTIONS: Final = 4  # contacts that only one node named and that failed, before it is not listened to

_State = Literal["new", "asked", "slow", "answered", "failed"]


class _Entry:
    """A contact that the look-up knows of. ``hop``: questions on the way to it, itself included."""

    __slots__ = ("contact", "distance", "hop", "sources", "state", "subnet")

    def __init__(self, contact: Contact, distance: int, hop: int) -> None:
        self.contact, self.distance, self.hop = contact, distance, hop
        self.state: _State = "new"
        self.sources: set[Contact] = set()
        self.subnet = subnet_of(contact.ip)

    def __lt__(self, other: _Entry) -> bool:
        return self.distance < other.distance


class _Path:
    __slots__ = ("asked", "entries", "in_flight", "known", "stalled")

    def __init__(self, entries: Iterable[_Entry] = ()) -> None:
        self.entries = sorted(entries)  # nearest first
        self.known: set[Contact] = set()
        self.asked = self.in_flight = 0
        self.stalled = False  # the last answer brought nothing nearer

    def counted(self, width: int) -> list[_Entry]:
        """The nearest that may count; who is slow gives way to the next."""
        found: list[_Entry] = []
        subnets: Counter[str] = Counter()
        for entry in self.entries:
            if entry.state in ("failed", "slow"):
                continue
            if entry.subnet is not None:
                subnets[entry.subnet] += 1
                if subnets[entry.subnet] > MAX_PER_SUBNET:
                    continue
            found.append(entry)
            if len(found) == width:
                break
        return found


class Lookup:
    """One look-up. ``seeds``: nodes that we know, nearest first. ``network_size``: an estimate of all nodes, 0 for unknown."""

    def __init__(
        self,
        target: bytes,
        seeds: Sequence[tuple[Contact, bytes]],
        own_id: bytes,
        network_size: float = 0.0,
        *,
        width: int = WIDTH,
        max_width: int = MAX_WIDTH,
        paths: int = PATHS,
    ) -> None:
        self._target, self._own_id = int.from_bytes(target, "big"), own_id
        self._network_size, self._width, self._max_width = network_size, width, max_width
        self._entries: dict[Contact, _Entry] = {}
        self._addresses: Counter[bytes] = Counter()
        self._paths = [_Path() for _ in range(max(1, min(paths, len(seeds))))]
        self._asking: dict[Contact, _Path] = {}
        self._inventions: Counter[Contact] = Counter()
        self.asked = self._widened = 0
        for index, (contact, node_id) in enumerate(seeds):
            self._learn(contact, node_id, self._paths[index % len(self._paths)], 1, None)

    def ask(self) -> list[Contact]:
        """Whom to ask now; say of each `answered` or `failed`, and `slow` before that where it takes long."""
        chosen: list[Contact] = []
        for path in self._paths:
            width = self._wanted(path)
            allowed = LATE_IN_FLIGHT if path.stalled else PATH_IN_FLIGHT
            for entry in path.counted(width):
                if path.in_flight >= allowed or path.asked >= 2 * width or self.asked >= MAX_ASKED:
                    break
                if entry.state == "new" and not self._is_invented(entry):
                    entry.state = "asked"
                    path.asked += 1
                    path.in_flight += 1
                    self.asked += 1
                    self._asking[entry.contact] = path
                    chosen.append(entry.contact)
        return chosen

    @property
    def done(self) -> bool:
        """Nobody is left to ask or to wait for. Ask `ask` first."""
        return not self._asking

    def answered(self, who: Contact, contacts: Iterable[tuple[Contact, bytes]]) -> int:
        """``who`` answered and named these; its hop (1: we knew it ourselves)."""
        entry = self._entries[who]
        path = self._settle(entry) or self._path_of(entry)
        entry.state = "answered"
        before = path.entries[0].distance
        for contact, node_id in contacts:
            self._learn(contact, node_id, path, entry.hop + 1, who)
        path.stalled = path.entries[0].distance >= before
        return entry.hop

    def failed(self, who: Contact) -> None:
        """``who`` did not answer, or not as it should."""
        entry = self._entries[who]
        self._settle(entry)
        entry.state = "failed"
        if len(entry.sources) == 1:
            self._inventions[next(iter(entry.sources))] += 1

    def slow(self, who: Contact) -> None:
        """``who`` takes long: go on without it; it may still answer."""
        entry = self._entries[who]
        if entry.state == "asked":
            self._settle(entry)
            entry.state = "slow"

    def nearest(self, count: int | None = None) -> list[Contact]:
        """The nearest that answered, nearest first; as many as the look-up is wide."""
        union = _Path(self._having_answered())
        return [entry.contact for entry in union.counted(count or self.width)]

    @property
    def width(self) -> int:
        """How many nodes should hold what lies at the target, as far as is known by now."""
        return max(self._wanted(path) for path in self._paths)

    @property
    def skip(self) -> int:
        """How many of its nearest the node asked just now should leave out.

        If all named their nearest, which are the same, a widened look-up would never hear of those behind them.
        """
        if (pages := self.width // self._width) > 1:
            return self.asked % pages * self._width
        return self._width if self.asked > self._width // 2 and self.asked % 4 == 0 else 0

    @property
    def size_estimate(self) -> float:
        """Nodes in the network, judged by how near the nearest that answered are; 0 where too few answered to say."""
        nearest = sorted(entry.distance for entry in self._having_answered())[:WIDTH]
        if len(nearest) < WIDTH:
            return 0.0
        return len(nearest) * float(1 << 160) / (nearest[-1] + 1)

    def _having_answered(self) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.state == "answered"]

    def _wanted(self, path: _Path) -> int:
        """The width for what a path has found: more where too many answered too near to be an accident."""
        if not self._network_size:
            return self._width
        near = [entry for entry in path.counted(self._width) if entry.state == "answered"]
        if len(near) == self._width:
            expected = self._width / self._network_size * float(1 << 160)
            density = expected / (near[-1].distance + 1)
            if density >= DENSE:  # what one path has met counts for all
                self._widened = max(self._widened, min(self._max_width, int(self._width * density)))
        return max(self._width, self._widened)

    def _learn(self, contact: Contact, node_id: bytes, path: _Path, hop: int, source: Contact | None) -> None:
        if node_id == self._own_id:
            return
        entry = self._entries.get(contact)
        if entry is None:
            if len(self._entries) >= MAX_KNOWN or self._addresses[node_id] >= MAX_ADDRESSES:
                return
            distance = int.from_bytes(node_id, "big") ^ self._target
            entry = self._entries[contact] = _Entry(contact, distance, hop)
            self._addresses[node_id] += 1
        if source is not None and len(entry.sources) < 2:
            entry.sources.add(source)
        if contact not in path.known:
            path.known.add(contact)
            insort(path.entries, entry)

    def _is_invented(self, entry: _Entry) -> bool:
        return len(entry.sources) == 1 and self._inventions[next(iter(entry.sources))] >= MAX_INVENTIONS

    def _settle(self, entry: _Entry) -> _Path | None:
        path = self._asking.pop(entry.contact, None)
        if path is not None:
            path.in_flight -= 1
        return path

    def _path_of(self, entry: _Entry) -> _Path:
        return next((path for path in self._paths if entry.contact in path.known), self._paths[0])
