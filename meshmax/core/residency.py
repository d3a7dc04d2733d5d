"""Decides which models are in memory and who may use them now: slots, keep-alive, eviction. Sans-IO.

Rules. An ask names a model; it starts when the model is loaded, has a free slot, and it is next (core.fair_queue, which
also bounds how many wait). A load is asked for once, however many wait for it. A model that nobody uses goes when its
keep-alive (that of the latest ask that named one; negative is for ever) is over. At most ``max_loaded`` models are in memory,
and no more than there is room for (core.memory): for one more, the idle ones used longest ago go until it fits; if that is
not enough, the one used longest ago takes no new ask while somebody waits for room (they wait for its next turn), so nobody
waits for ever; what runs is never unloaded. Models are loaded in the order in which somebody began to wait for them. Where a
load took more than was thought, or other programs take memory, idle ones go until the rest fits. What was preloaded takes free
room only, and goes first as long as nobody used it. Models in the memory of others' engines take none of ours. A crash ends a
model's asks that run; those that wait load it anew.

Contexts (core.context). A model is loaded with the largest context that somebody waits for. One that is loaded with less than a
later ask wants takes no new ask, and is loaded anew when what runs has ended; like one that gives way it lets models that others
wait for go first. What was loaded serves at least those that it has slots for before that, in their order, so numbers that
creep up keep nobody waiting for ever. Where a load fails, those that are content with less have one more.

Time is seconds of any monotonic clock. Not here: who is next (core.fair_queue), processes, events, who sees the errors
(services.residency), how much a model takes (core.memory).
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final

import msgspec

from meshmax.base.errors import EngineUnavailable
from meshmax.base.ids import Sha256
from meshmax.base.inference import Priority
from meshmax.core.context import ANY, Wish
from meshmax.core.fair_queue import Ask, FairQueue, Requester
from meshmax.core.memory import Need, Room

MAX_LOADED: Final = 8  # models in memory at once: each is a process, and they share the processors
MAX_PEER_KEEP_ALIVE_S: Final = 3600.0  # that a peer may ask for: who else needs the memory can wait for the end of that
SMALLER: Final = "a smaller num_ctx needs less memory; when there is more, `meshmax stop` the model and ask again"
MAX_NEEDS: Final = 1024  # models of which is remembered what they take; as many as a peer lists


class Load(msgspec.Struct, frozen=True):
    """Load the model with so many tokens of context (0: the usual), then say `on_loaded` or `on_load_failed`."""

    digest: Sha256
    context_tokens: int = 0


class Unload(msgspec.Struct, frozen=True):
    """Unload the model (or give its loading up), then say `on_unloaded`."""

    digest: Sha256


class Start(msgspec.Struct, frozen=True):
    """The ask may use its model now; say `on_end` when it has done so."""

    ask: int


class Fail(msgspec.Struct, frozen=True):
    """The ask's model could not be loaded; the ask is over."""

    ask: int


Action = Load | Unload | Start | Fail


class Phase(enum.Enum):
    """Where a model stands. What is absent is not in memory."""

    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


class _Resident(msgspec.Struct):
    digest: Sha256
    phase: Phase
    used_at: float
    keep_alive_s: float
    need: Need = Need()
    preloaded_by: int | None = None  # the ask that loaded it ahead of any that needs it; None: it was used
    parallel: int = 1
    doomed: bool = False  # goes when its running asks have ended, and starts no other
    gives_way: bool = False  # the same, as long as somebody waits for room
    outgrown: bool = False  # the same, because somebody waits who wants a larger context
    context_tokens: int = 0
    foreign: bool = False  # in the memory of an engine that brings it along, so nothing of ours gives way to it
    running: dict[int, Ask] = {}

    @property
    def is_usable(self) -> bool:
        return self.phase is Phase.LOADED and not self.leaves and not self.outgrown

    @property
    def stays(self) -> bool:
        return self.phase is not Phase.UNLOADING and not self.leaves and not self.outgrown

    @property
    def leaves(self) -> bool:
        """Whether it does not come back by itself."""
        return self.doomed or self.gives_way

    @property
    def goes_last(self) -> tuple[bool, bool, float]:
        """The order in which models make room."""
        return bool(self.running), self.preloaded_by is None, self.used_at

    @property
    def free_slots(self) -> int:
        return self.parallel - sum(ask.slots for ask in self.running.values())

    def has_place_for(self, ask: Ask) -> bool:
        """Whether it could start now, where nobody waits before it."""
        large = self.foreign or ask.best.tokens <= self.context_tokens
        return large and self.is_usable and self.free_slots >= ask.slots

    @property
    def expires_at(self) -> float:
        return self.used_at + self.keep_alive_s if self.keep_alive_s >= 0 else math.inf


class ResidentView(msgspec.Struct, frozen=True):
    """A loaded model: when it goes if nobody uses it (inf: never), and its asks.

    ``usable``: it takes new asks; ``free``: slots; ``ahead``: how many one who comes now has before it at most.
    """

    digest: Sha256
    expires_at: float
    running: int
    queued: int
    usable: bool = True
    free: int = 0
    ahead: int = 0


class ResidencyCore:
    """The decisions of one node. Every event returns what is to be done now; call `tick` at `deadline`."""

    def __init__(
        self,
        queue: FairQueue,
        max_loaded: int = MAX_LOADED,
        foreign: Callable[[Sha256], bool] = lambda digest: False,
    ) -> None:
        """``foreign``: whether an engine that brings its models along runs this one, in memory that is not ours to fill."""
        self._foreign = foreign
        self._room = Room()
        self._needs: OrderedDict[Sha256, Need] = OrderedDict()  # of models by their next load
        self._queue = queue
        self._max_loaded = max_loaded
        self._residents: dict[Sha256, _Resident] = {}
        # Contexts with which a load has failed, of models that are in memory, or waited for, with less.
        self._ceilings: dict[Sha256, int] = {}
        self._regrowing: dict[Sha256, _Resident] = {}  # as they were, of models that are to be loaded anew with more
        self._bereft: set[int] = set()  # asks that ran on a model which crashed and has left, and have not ended yet

    def on_ask(
        self,
        ask: int,
        digest: Sha256,
        keep_alive_s: float,
        now: float,
        *,
        takes_slot: bool = True,
        requester: Requester = None,
        priority: Priority = "interactive",
        wish: Wish = ANY,
    ) -> list[Action]:
        """A request came; ``ask`` is its number, never used before. Without a slot it waits for the load only.

        Raises Busy; EngineUnavailable: the model, which is not in memory with as large a context, can never be.
        """
        asked = Ask(ask, digest, keep_alive_s, requester, priority, int(takes_slot), best=wish.best, least=wish.least)
        resident = self._residents.get(digest)
        if not self._foreign(digest) and (resident is None or asked.best.tokens > resident.context_tokens):
            self._refuse_hopeless(asked)
        if resident is None or not resident.has_place_for(asked) or self._queue.waiting(digest):
            self._queue.join(asked, now)
            return self._advance(now)
        self._queue.join(asked, now, at_once=True)
        return self._start_on(resident, now)  # it takes nothing that another one waits for

    def _refuse_hopeless(self, asked: Ask) -> None:
        """Of one that wants a larger context than there is: what failed a moment ago, or can never fit, is not tried."""
        ceiling = self._ceilings.get(asked.digest, math.inf)
        if asked.best.tokens >= ceiling:
            if asked.least.tokens >= ceiling:
                raise EngineUnavailable(f"the model could not be loaded with a context of {ceiling} tokens: {SMALLER}")
            asked.best = asked.least
        need = asked.best.need if asked.best.tokens else self._needs.get(asked.digest, Need())
        if why := self._room.too_small_for(need):
            raise EngineUnavailable(why)

    def on_end(self, ask: int, now: float) -> list[Action]:
        """A request has ended, or whoever asked went away while it waited. Idempotent."""
        self._queue.leave(ask, now)
        self._bereft.discard(ask)
        for resident in self._residents.values():
            if resident.running.pop(ask, None):
                resident.used_at = now
        return self._advance(now)

    def on_need(self, digest: Sha256, need: Need) -> None:
        """What the model will take when it is loaded with the usual context; say so before it is preloaded."""
        self._needs[digest] = need
        self._needs.move_to_end(digest)
        if len(self._needs) > MAX_NEEDS:
            self._needs.popitem(last=False)

    def on_room(self, room: Room, now: float) -> list[Action]:
        """How much memory there is for models from now on."""
        self._room = room
        return self._advance(now)

    def has_room(self, digest: Sha256) -> bool:
        """Whether the model, which is not in memory, could be loaded now with nothing going for it, or waiting for room."""
        if digest in self._residents or self._foreign(digest) or self._missing():
            return False
        if self._room.budget_bytes is None:
            return len(self._ours()) < self._max_loaded
        return (
            self._fits(self._need(digest), self._ours()) and self.taken + self._need(digest) <= self._room.budget_bytes
        )

    def on_preload(
        self, ask: int, digest: Sha256, keep_alive_s: float, now: float, wish: Wish = ANY
    ) -> list[Action] | None:
        """Load the model before anybody asks: None if there is no room for it now, else as `on_ask` without a slot."""
        if not self.has_room(digest):
            return None
        actions = self.on_ask(ask, digest, keep_alive_s, now, takes_slot=False, wish=wish)
        self._residents[digest].preloaded_by = ask
        return actions

    def on_loaded(
        self, digest: Sha256, parallel: int, now: float, need: Need | None = None, context_tokens: int = 0
    ) -> list[Action]:
        """The model is in memory and answers ``parallel`` asks at once. Too late if it was given up meanwhile.

        ``need``: what it really takes, if that is known; ``context_tokens``: what it has, if that is more than was wanted. An
        engine that gives less is not asked again.
        """
        resident = self._residents[digest]
        resident.context_tokens = max(resident.context_tokens, context_tokens)
        resident.need = need or resident.need
        if resident.phase is Phase.LOADING:
            resident.phase, resident.parallel, resident.used_at = Phase.LOADED, parallel, now
            self._queue.on_loaded(digest, parallel)
        return self._advance(now)

    def on_load_failed(self, digest: Sha256, now: float) -> list[Action]:
        """The model could not be loaded: those who wait for it hear so, but for those that are content with less."""
        resident = self._residents.pop(digest, None)
        tokens = resident.context_tokens if resident and self._ceilings.pop(digest, None) is None else 0
        failed = self._queue.drop(digest, tokens)
        if self._queue.waiting(digest):
            self._ceilings[digest] = tokens
        return [*map(Fail, failed), *self._advance(now)]

    def on_crashed(self, digest: Sha256, now: float) -> list[Action]:
        """The model's process has ended by itself. Its running asks see that themselves and end."""
        actions: list[Action] = []
        resident = self._residents.get(digest)
        if resident and resident.phase is Phase.LOADED:
            resident.phase = Phase.UNLOADING
            actions = [Unload(digest)]
        return [*actions, *self._advance(now)]

    def on_unload(self, digest: Sha256, now: float) -> list[Action]:
        """Somebody wants the model out of memory: at once if idle or loading, else when its running asks have ended."""
        actions: list[Action] = []
        resident = self._residents.get(digest)
        if resident and resident.phase is Phase.LOADING:
            resident.phase = Phase.UNLOADING
            actions = [Unload(digest)]
        elif resident:
            resident.doomed = True
        return [*actions, *self._advance(now)]

    def on_unloaded(self, digest: Sha256, now: float) -> list[Action]:
        """The model has left memory."""
        self._ceilings.pop(digest, None)
        if resident := self._residents.pop(digest, None):
            self._bereft |= resident.running.keys()
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        return self._advance(now)

    def deadline(self) -> float:
        """When `tick` is due; inf if nothing expires."""
        idle = (r.expires_at for r in self._residents.values() if r.phase is Phase.LOADED and not r.running)
        return min(idle, default=math.inf)

    def snapshot(self) -> tuple[ResidentView, ...]:
        """The loaded models, longest remaining first."""
        views = [
            ResidentView(
                r.digest,
                r.expires_at,
                len(r.running),
                self._queue.waiting(r.digest),
                r.is_usable,
                max(r.free_slots, 0),
                self._queue.ahead(r.digest),
            )
            for r in self._residents.values()
            if r.phase is Phase.LOADED
        ]
        return tuple(sorted(views, key=lambda view: -view.expires_at))

    def keep_alive_s(self, digest: Sha256, usual_s: float, asked_s: float | None = None, *, ours: bool = True) -> float:
        """For how long the model stays after an ask that names ``asked_s``. None: what was asked for it while it is in
        memory, else ``usual_s``. An ask of a peer's (not ``ours``) has it stay longer, within bounds, and never less long.
        """
        resident = self._staying(digest)
        kept_s = resident.keep_alive_s if resident else usual_s
        if asked_s is None or not (ours or kept_s >= 0):
            return kept_s
        if ours:
            return asked_s
        return max(kept_s, MAX_PEER_KEEP_ALIVE_S if asked_s < 0 else min(asked_s, MAX_PEER_KEEP_ALIVE_S))

    def context_tokens(self, digest: Sha256) -> int | None:
        """With how large a context the model is in memory; None if it is not, or has been told to leave."""
        resident = self._staying(digest)
        return resident.context_tokens if resident else None

    def room_for(self, digest: Sha256) -> int | None:
        """Bytes that the model may have if models that nobody uses give way to it; None: no bound."""
        if self._room.budget_bytes is None:
            return None
        others = (r for r in self._ours() if r.digest != digest and (r.running or r.phase is Phase.LOADING))
        return max(self._room.budget_bytes - sum(r.need.total for r in others), 0)

    def _staying(self, digest: Sha256) -> _Resident | None:
        """The model where it is in memory to stay, or leaves it to come back with a larger context."""
        resident = self._residents.get(digest)
        if resident and not resident.leaves and (resident.outgrown or resident.phase is not Phase.UNLOADING):
            return resident
        return self._regrowing.get(digest) if resident is None else None

    @property
    def taken(self) -> int:
        """Bytes of memory that our models take, on their way in and out too."""
        return sum(resident.need.total for resident in self._ours())

    def needs(self) -> tuple[Need, ...]:
        """What each of them takes."""
        return tuple(resident.need for resident in self._ours())

    @property
    def settled(self) -> bool:
        """Whether none of them is on its way in or out: only then what the machine uses tells what others leave."""
        return all(resident.phase is Phase.LOADED for resident in self._ours())

    @property
    def running(self) -> int:
        """Asks that use a model now."""
        return len(self._bereft) + sum(len(resident.running) for resident in self._residents.values())

    @property
    def queued(self) -> int:
        """Asks that wait."""
        return len(self._queue)

    def _advance(self, now: float) -> list[Action]:
        self._forgive()
        started = self._start(now)
        self._outgrow()
        return [*started, *self._expire(now), *self._shrink(), *self._load(now), *self._evict()]

    def _forgive(self) -> None:
        """Whoever wanted a larger context, or room, has gone: what there is is large enough again, and stays."""
        giving = [resident for resident in self._residents.values() if resident.gives_way]
        if giving and not self._missing():
            for resident in giving:
                resident.gives_way = resident.phase is not Phase.LOADED
        for resident in self._residents.values():
            if resident.outgrown and resident.phase is Phase.LOADED:
                resident.outgrown = self._wanted_tokens(resident.digest) > resident.context_tokens
        if self._regrowing:
            self._regrowing = {d: r for d, r in self._regrowing.items() if self._queue.waiting(d)}
        if self._ceilings:
            self._ceilings = {d: c for d, c in self._ceilings.items() if d in self._residents or self._queue.waiting(d)}

    def _outgrow(self) -> None:
        for resident in self._residents.values():
            if resident.is_usable and not resident.foreign:
                resident.outgrown = self._wanted_tokens(resident.digest) > resident.context_tokens
                if resident.outgrown:
                    self._queue.yield_turn(resident.digest)

    def _wanted_tokens(self, digest: Sha256) -> int:
        return self._queue.largest(digest).tokens

    def _start(self, now: float) -> list[Action]:
        return [start for resident in self._residents.values() for start in self._start_on(resident, now)]

    def _start_on(self, resident: _Resident, now: float) -> list[Action]:
        started: list[Action] = []
        most = math.inf if resident.foreign else resident.context_tokens
        while resident.is_usable and (ask := self._queue.start_next(resident.digest, resident.free_slots, now, most)):
            resident.running[ask.id] = ask
            resident.used_at, resident.keep_alive_s = now, ask.keep_alive_s
            if ask.id != resident.preloaded_by:
                resident.preloaded_by = None
            started.append(Start(ask.id))
        return started

    def _expire(self, now: float) -> list[Action]:
        return [
            self._unload(resident)
            for resident in self._residents.values()
            if resident.phase is Phase.LOADED
            and not resident.running
            and (resident.leaves or resident.outgrown or resident.expires_at <= now)
        ]

    def _load(self, now: float) -> list[Action]:
        loads: list[Action] = []
        blocked = False  # what comes later takes no room from one that waits for it
        for digest, keep_alive_s in self._queue.wanted():
            if digest in self._residents:
                continue
            foreign = self._foreign(digest)
            if not foreign:
                blocked = blocked or not self._fits(self._need(digest), self._ours())
                if blocked:
                    continue
            need = Need() if foreign else self._next_need(digest)
            tokens = self._wanted_tokens(digest)
            self._residents[digest] = _Resident(
                digest, Phase.LOADING, now, keep_alive_s, need, foreign=foreign, context_tokens=tokens
            )
            self._regrowing.pop(digest, None)
            loads.append(Load(digest, tokens))
        return loads

    def _evict(self) -> list[Action]:
        actions: list[Action] = []
        kept = [resident for resident in self._ours() if resident.stays]
        going = sorted((r for r in kept if r.phase is Phase.LOADED), key=lambda r: r.goes_last)
        for digest in self._missing():
            while going and not self._fits(self._need(digest), kept):
                resident = going.pop(0)
                kept.remove(resident)
                resident.gives_way = True
                self._queue.yield_turn(resident.digest)
                if not resident.running:
                    actions.append(self._unload(resident))
            kept.append(_Resident(digest, Phase.LOADING, 0.0, 0.0, self._next_need(digest)))
        return actions

    def _shrink(self) -> list[Action]:
        """Idle ones go while there is more in memory than there is room for; one alone may stay."""
        kept = [resident for resident in self._ours() if resident.stays]
        idle = sorted((r for r in kept if r.phase is Phase.LOADED and not r.running), key=lambda r: r.goes_last)
        actions: list[Action] = []
        budget = self._room.budget_bytes
        while budget is not None and idle and len(kept) > 1 and sum(r.need.total for r in kept) > budget:
            kept.remove(idle[0])
            actions.append(self._unload(idle.pop(0)))
        return actions

    def _ours(self) -> list[_Resident]:
        return [resident for resident in self._residents.values() if not resident.foreign]

    def _missing(self) -> list[Sha256]:
        """What somebody waits for and has no room, longest first."""
        return [digest for digest, _ in self._queue.wanted() if digest not in self._residents]

    def _next_need(self, digest: Sha256) -> Need:
        """What the model will take by its next load."""
        largest = self._queue.largest(digest)
        return largest.need if largest.tokens else self._needs.get(digest, Need())

    def _need(self, digest: Sha256) -> int:
        return self._next_need(digest).total

    def _fits(self, need_bytes: int, others: Collection[_Resident]) -> bool:
        taken = sum(resident.need.total for resident in others)
        return len(others) < self._max_loaded and self._room.takes(need_bytes, taken, alone=not others)

    def _unload(self, resident: _Resident) -> Action:
        resident.phase = Phase.UNLOADING
        if resident.outgrown and not resident.leaves:
            self._regrowing[resident.digest] = resident
        return Unload(resident.digest)
