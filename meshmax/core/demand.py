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
from collections.abc import Collection, Iterable, Sequence
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


class Told(msgspec.Struct, frozen=True):
    """What a peer says of itself and of its copy of one model."""

    peer_id: PeerId
    status: PeerStatus
    model: ModelPresence


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
        here = [(v, v.status) for v in views if v.status is not None and v.state in ("self", "online")]
        wanted = _total(own, (status for view, status in here if view.peer_id != self._own))
        steady = {digest for digest, per_min in wanted.items() if per_min >= STEADY_PER_MIN}
        self._not_before = {digest: at for digest, at in self._not_before.items() if at > now}
        short: dict[Sha256, _Shortage] = {}
        due: list[tuple[float, ModelPresence]] = []
        for digest, held in _mine_and_others(here, self._own, steady).items():
            loaded = [told for told in held if told.model.state == "loaded" and not told.status.draining]
            if not all(_is_full(told.status) for told in loaded):
                continue
            known = self._short.get(digest)
            since = known.since if known and known.copies >= len(loaded) else now
            short[digest] = _Shortage(since, len(loaded))
            if digest not in self._not_before and (mine := self._in_turn(held, now - since)):
                due.append((wanted[digest], mine))
        self._short = short
        return max(due, key=lambda each: (each[0], each[1].digest))[1] if due else None

    def on_tried(self, digest: Sha256, loaded: bool, now: float) -> None:
        """It was loaded, or could not be."""
        self._not_before[digest] = now + (PAUSE_S if loaded else PAUSE_AFTER_REFUSAL_S)

    def _in_turn(self, held: Sequence[Told], short_s: float) -> ModelPresence | None:
        order = candidates(held)
        place = next((place for place, told in enumerate(order) if told.peer_id == self._own), None)
        if place is None:
            return None
        model = order[place].model
        load_s = model.load_s or model.size / LOAD_BYTES_PER_S
        return model if short_s >= HOLD_S + place * (STEP_S + 2 * load_s) else None


def candidates(held: Iterable[Told]) -> list[Told]:
    """Who of those that have one model could load it now, in the order in which they do so."""
    able: list[tuple[bool, bytes, Told]] = []
    for told in held:
        status, model = told.status, told.model
        if model.state != "disk" or not model.is_copy or not _has_room(status, model):
            continue
        if not (status.draining or status.engine == NO_ENGINE or status.load.queued):
            rank = hashlib.blake2b(f"{model.digest} {told.peer_id}".encode(), digest_size=8).digest()
            able.append((not status.gpus, rank, told))
    return [told for _, _, told in sorted(able, key=lambda each: each[:2])]


def _mine_and_others(
    here: Iterable[tuple[PeerView, PeerStatus]], own: PeerId, digests: Collection[Sha256]
) -> dict[Sha256, list[Told]]:
    """Of those ``digests`` that we have on disk: what every peer says of its copy."""
    held: dict[Sha256, list[Told]] = {}
    if not digests:
        return held
    ours: set[Sha256] = set()
    for view, status in here:
        for model in status.models:
            if model.digest in digests:
                held.setdefault(model.digest, []).append(Told(view.peer_id, status, model))
                if view.peer_id == own and model.state == "disk" and model.is_copy:
                    ours.add(model.digest)
    return {digest: told for digest, told in held.items() if digest in ours}


def _total(own: Iterable[Demand], statuses: Iterable[PeerStatus]) -> dict[Sha256, float]:
    total = {demand.digest: demand.per_min for demand in own}
    for status in statuses:
        for demand in status.demand:
            total[demand.digest] = total.get(demand.digest, 0.0) + min(demand.per_min, MAX_TOLD_PER_MIN)
    return total


def _is_full(status: PeerStatus) -> bool:
    return status.load.queued > 0 and status.load.running >= status.load.capacity


def _has_room(status: PeerStatus, model: ModelPresence) -> bool:
    """By what the peer says of itself: it alone knows better."""
    room = room_of(Reading(status.memory_bytes, status.memory_total_bytes, status.gpus), None, ())
    return room.budget_bytes is None or model.size * ROUGH_NEED <= room.budget_bytes
