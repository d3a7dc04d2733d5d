"""Which models are asked for, here and by neighbours, and which of them this peer should load before anybody asks. Sans-IO.

Demand. Each peer counts the prompts that come in by its own API, so that none counts twice, and fades them (FADE_S); it tells
neighbours its MAX_DEMANDS highest rates. A request that wants the model gone afterwards (keep_alive 0) is none.

Preloading. A model is short where there is steady demand for it, by us and all neighbours, and either nobody has it loaded or
all who have it loaded answer as many as they can and more wait. It must be so for HOLD_S. Of the peers that have it on disk, have
free memory and let nobody wait themselves, those with a GPU come first, then the order of a hash of model and peer: all see
the same order, and the n-th waits n times as long as a load takes, so that one of them loads it, and where that one does not,
the next. As soon as there is one copy more the time begins anew, so that copies come one at a time. A peer that has
preloaded a model does not do so again for PAUSE_S. Demand is hearsay: nobody goes for what is preloaded, it goes first when room
is needed, and it goes when its keep-alive is over, so that who tells lies wastes free memory and no more.
Not here: loading (services.preload, services.residency).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import MAX_DEMANDS, NO_ENGINE, Demand, ModelPresence, PeerStatus, PeerView
from meshmax.core.memory import Reading, room_of

FADE_S: Final = 300.0  # in which a prompt counts for a third of what it did: as long as a model is usually kept
STEADY_PER_MIN: Final = 1.0  # what is asked for less often is not missed
MAX_TOLD_PER_MIN: Final = 600.0  # of one neighbour: no peer's own users ask more, and a liar must not outshout all
MAX_COUNTED: Final = 256  # models; the one asked for least is forgotten first
HOLD_S: Final = 5.0  # two heartbeats: a queue that is gone by then needs no second copy
STEP_S: Final = 10.0  # beside the time of a load, until the next in the order takes it up
LOAD_BYTES_PER_S: Final = 200e6  # a guess where no load was measured: a slow disk
ROUGH_NEED: Final = 1.2  # of a model's size, of a peer of which we know no more
PAUSE_S: Final = 600.0  # twice the usual keep-alive
PAUSE_AFTER_REFUSAL_S: Final = 60.0


class DemandTable:
    """How often models are asked for by way of this node."""

    def __init__(self) -> None:
        self._counts: OrderedDict[Sha256, tuple[float, float]] = OrderedDict()  # faded count, as of when

    def on_request(self, digest: Sha256, now: float) -> None:
        """A prompt for it has come in."""
        self._counts[digest] = self._count(digest, now) + 1.0, now
        if len(self._counts) > MAX_COUNTED:
            del self._counts[min(self._counts, key=lambda each: self._count(each, now))]

    def per_min(self, digest: Sha256, now: float) -> float:
        """Prompts a minute of late."""
        return self._count(digest, now) * 60.0 / FADE_S

    def told(self, now: float) -> tuple[Demand, ...]:
        """The highest ones, for neighbours, highest first."""
        rates = ((round(self.per_min(digest, now), 1), digest) for digest in self._counts)
        highest = sorted(((rate, digest) for rate, digest in rates if rate > 0), reverse=True)[:MAX_DEMANDS]
        return tuple(Demand(digest, rate) for rate, digest in highest)

    def _count(self, digest: Sha256, now: float) -> float:
        count, then = self._counts.get(digest, (0.0, now))
        return count * math.exp((then - now) / FADE_S)


class _Shortage(msgspec.Struct):
    since: float
    copies: int


class Preloading:
    """What one node preloads. Owned by one task; ``now`` is of one monotonic clock, in seconds."""

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._short: dict[Sha256, _Shortage] = {}
        self._not_before: dict[Sha256, float] = {}

    def choose(self, views: Sequence[PeerView], own: Iterable[Demand], now: float) -> ModelPresence | None:
        """The model to load now, None if none. ``views``: ourselves too; ``own``: what is asked for by way of this node."""
        here = [view for view in views if view.state in ("self", "online") and view.status is not None]
        me = next((view.status for view in here if view.peer_id == self._own), None)
        wanted = _total(own, (view.status for view in here if view.status and view.peer_id != self._own))
        self._not_before = {digest: at for digest, at in self._not_before.items() if at > now}
        mine = {} if me is None else {m.digest: m for m in me.models if m.state == "disk" and m.is_copy}
        short: dict[Sha256, _Shortage] = {}
        due: list[tuple[float, ModelPresence]] = []
        for digest, per_min in wanted.items():
            copies = _copies(here, digest) if per_min >= STEADY_PER_MIN and digest in mine else ()
            if digest not in mine or per_min < STEADY_PER_MIN or not all(map(_is_full, copies)):
                continue
            known = self._short.get(digest)
            since = known.since if known and known.copies >= len(copies) else now
            short[digest] = _Shortage(since, len(copies))
            if digest not in self._not_before and self._is_our_turn(here, mine[digest], now - since):
                due.append((per_min, mine[digest]))
        self._short = short
        return max(due, key=lambda each: (each[0], each[1].digest))[1] if due else None

    def on_tried(self, digest: Sha256, loaded: bool, now: float) -> None:
        """It was loaded, or could not be."""
        self._not_before[digest] = now + (PAUSE_S if loaded else PAUSE_AFTER_REFUSAL_S)

    def _is_our_turn(self, here: Sequence[PeerView], model: ModelPresence, short_s: float) -> bool:
        order = candidates(here, model.digest)
        if self._own not in order:
            return False
        load_s = model.load_s or model.size / LOAD_BYTES_PER_S
        return short_s >= HOLD_S + order.index(self._own) * (STEP_S + 2 * load_s)


def candidates(here: Iterable[PeerView], digest: Sha256) -> list[PeerId]:
    """Who could load the model now, in the order in which they do so."""
    able: list[tuple[bool, bytes, PeerId]] = []
    for view in here:
        status = view.status
        if status is None or status.draining or status.engine == NO_ENGINE or status.load.queued:
            continue
        model = next((m for m in status.models if m.digest == digest and m.state == "disk" and m.is_copy), None)
        if model is not None and _has_room(status, model):
            rank = hashlib.blake2b(f"{digest} {view.peer_id}".encode(), digest_size=8).digest()
            able.append((not status.gpus, rank, view.peer_id))
    return [peer for _, _, peer in sorted(able)]


def _total(own: Iterable[Demand], statuses: Iterable[PeerStatus]) -> dict[Sha256, float]:
    total = {demand.digest: demand.per_min for demand in own}
    for status in statuses:
        for demand in status.demand:
            total[demand.digest] = total.get(demand.digest, 0.0) + min(demand.per_min, MAX_TOLD_PER_MIN)
    return total


def _copies(here: Iterable[PeerView], digest: Sha256) -> list[PeerStatus]:
    """Who has it loaded and takes prompts."""
    return [
        view.status
        for view in here
        if view.status
        and not view.status.draining
        and any(model.digest == digest and model.state == "loaded" for model in view.status.models)
    ]


def _is_full(status: PeerStatus) -> bool:
    return status.load.queued > 0 and status.load.running >= status.load.capacity


def _has_room(status: PeerStatus, model: ModelPresence) -> bool:
    """By what the peer says of itself: it alone knows better."""
    room = room_of(Reading(status.memory_bytes, status.memory_total_bytes, status.gpus), None, ())
    return room.budget_bytes is None or model.size * ROUGH_NEED <= room.budget_bytes
