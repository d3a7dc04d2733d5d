"""Who is worth being a neighbour: pure choices among peers of the table.

A mesh of up to NEIGHBOURS + 1 peers is connected each with each. In a larger one a peer dials while it has fewer than
NEIGHBOURS connections, whoever opened them, and takes those that others open, up to MAX_NEIGHBOURS. What it keeps:
- the useful, at most USEFUL: used within USED_S (streams beside the heartbeat), or with whole models that no other neighbour
  has, or with a GPU; in that order;
- some at random, AT_RANDOM: those with the smallest lot, drawn once for each. They keep the mesh in one piece, which nearest
  alone do not: two rooms would part;
- the nearest by round trip for the rest.
Now and then (`candidate`) one more is dialled on trial, a useful one if one is known; once there are TRIALS too many, one that
is none of the kept is let go (`surplus`), but never one that we did not choose, that is in use or that is new. Beyond
MAX_NEIGHBOURS the least worth goes, whoever chose it. Not here: when to dial (core.peers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from meshmax.base.ids import PeerId, Sha256
from meshmax.core.backoff import Random
from meshmax.core.peer_entry import PeerEntry

NEIGHBOURS: Final = (
    32  # connections, about 1 MiB and 1 % of a core each; a household has fewer, and 32 join 10,000 in 3 hops
)
MAX_NEIGHBOURS: Final = 96  # with those that others opened: three times the usual, for who is popular
USEFUL: Final = 12
AT_RANDOM: Final = 8
TRIALS: Final = 8  # connections beyond NEIGHBOURS before one is let go: no peer comes and goes by turns
USED_S: Final = 3600.0
SETTLED_S: Final = 60.0  # a connection younger than that has not shown what it is worth
MAX_RARE: Final = 8  # rare models that count: nobody buys a place with a thousand names


def kept(connected: Sequence[PeerEntry], now: float) -> set[PeerId]:
    """The NEIGHBOURS most worth keeping, or all if they are fewer."""
    if len(connected) <= NEIGHBOURS:
        return {entry.peer_id for entry in connected}
    common = _holders(connected)
    worth = {entry.peer_id: _use(entry, common, 1, now) for entry in connected}
    useful = sorted((e for e in connected if any(worth[e.peer_id])), key=lambda e: worth[e.peer_id], reverse=True)
    chosen = {entry.peer_id for entry in useful[:USEFUL]}
    lots = sorted((entry for entry in connected if entry.peer_id not in chosen), key=lambda entry: entry.lot)
    chosen |= {entry.peer_id for entry in lots[:AT_RANDOM]}
    near = sorted(lots[AT_RANDOM:], key=_distance)
    return chosen | {entry.peer_id for entry in near[: NEIGHBOURS - len(chosen)]}


def surplus(connected: Sequence[PeerEntry], most: int, now: float) -> list[PeerId]:
    """Whom to let go: all beyond ``most``, or one that others are better than; the least worth first."""
    over = len(connected) - min(most, MAX_NEIGHBOURS)
    if over <= 0 and len(connected) <= NEIGHBOURS + TRIALS:
        return []
    best = kept(connected, now)
    idle = [entry for entry in connected if entry.peer_id not in best and not _used(entry, now)]
    if over <= 0:
        idle = [entry for entry in idle if entry.chosen and not entry.asked and now - entry.connected_at >= SETTLED_S]
    idle.sort(key=_distance, reverse=True)
    if len(idle) < over:  # even so: a bound is a bound
        rest = {entry.peer_id for entry in idle}
        idle += sorted((e for e in connected if e.peer_id not in rest), key=_distance, reverse=True)
    return [entry.peer_id for entry in idle[: max(over, 1)]]


def candidate(
    known: Iterable[PeerEntry], connected: Sequence[PeerEntry], now: float, random: Random
) -> PeerEntry | None:
    """Whom to try, though there are enough neighbours: the most useful of those that wait, else anyone."""
    free = [e for e in known if e.addresses and not (e.connected or e.dialing or e.leaving or e.refusal or e.failures)]
    if not free:
        return None
    common = _holders(connected)
    best = max(free, key=lambda entry: _use(entry, common, 0, now))
    return best if any(_use(best, common, 0, now)) else free[int(random.random() * len(free))]


def _use(entry: PeerEntry, common: Counter[Sha256], own: int, now: float) -> tuple[bool, int, bool]:
    """Used lately; models that nobody else among the neighbours has; a GPU. ``own``: whether it is counted in ``common``."""
    if entry.status is None:
        return _used(entry, now), 0, False
    rare = sum(model.is_copy and common[model.digest] <= own for model in entry.status.models)
    return _used(entry, now), min(rare, MAX_RARE), bool(entry.status.gpus)


def _used(entry: PeerEntry, now: float) -> bool:
    return entry.used_at is not None and now - entry.used_at <= USED_S


def _holders(connected: Iterable[PeerEntry]) -> Counter[Sha256]:
    models = (model for entry in connected if entry.status for model in entry.status.models)
    return Counter(model.digest for model in models if model.is_copy)


def _distance(entry: PeerEntry) -> tuple[bool, float, float]:
    return (entry.rtt_s is None, entry.rtt_s or 0.0, entry.lot)
