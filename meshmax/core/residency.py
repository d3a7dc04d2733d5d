"""Decides which models are in memory and who may use them now: queue, slots, keep-alive, eviction. Sans-IO.

Rules. An ask names a model; it starts when the model is loaded and has a free slot, first come first served per model. A
load is asked for once, however many wait for it. At most ``max_queue`` asks wait; one more is Busy. A model that nobody
uses goes when its keep-alive (that of its latest ask; negative is for ever) is over. At most ``max_loaded`` models are in
memory: for one more, the idle one used longest ago goes; if none is idle, the one used longest ago takes no new ask
(they wait for its next turn), so nobody waits for ever. A crash ends a model's asks that run; those that wait load it anew.
Time is seconds of any monotonic clock. Not here: processes, events, who sees the errors (services.residency).
"""

from __future__ import annotations

import enum
import math
from typing import Final

import msgspec

from meshmax.base.errors import Busy
from meshmax.base.ids import Sha256
from meshmax.base.inference import Finish
from meshmax.base.status import Speed

MAX_LOADED: Final = 3  # models in memory at once, as Ollama's default for one device
RATE_WEIGHT: Final = 0.3  # of the newest measurement in an EWMA: a few answers make the figure, one outlier does not
MIN_RATE_TOKENS: Final = 8  # fewer tokens measure overhead, not rate
QUEUE_FULL: Final = "server busy, please try again.  maximum pending requests exceeded"  # Ollama's words, two blanks


class Load(msgspec.Struct, frozen=True):
    """Load the model, then say `on_loaded` or `on_load_failed`."""

    digest: Sha256


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


class _Ask(msgspec.Struct):
    id: int
    digest: Sha256
    keep_alive_s: float
    slots: int


class _Resident(msgspec.Struct):
    digest: Sha256
    phase: Phase
    used_at: float
    keep_alive_s: float
    parallel: int = 1
    doomed: bool = False  # goes when its running asks have ended, and starts no other
    running: dict[int, _Ask] = {}

    @property
    def free_slots(self) -> int:
        return self.parallel - sum(ask.slots for ask in self.running.values())

    @property
    def expires_at(self) -> float:
        return self.used_at + self.keep_alive_s if self.keep_alive_s >= 0 else math.inf


class ResidentView(msgspec.Struct, frozen=True):
    """A loaded model: when it goes if nobody uses it (inf: never), and its asks."""

    digest: Sha256
    expires_at: float
    running: int
    queued: int


class ResidencyCore:
    """The decisions of one node. Every event returns what is to be done now; call `tick` at `deadline`."""

    def __init__(self, max_queue: int, max_loaded: int = MAX_LOADED) -> None:
        self._max_queue = max_queue
        self._max_loaded = max_loaded
        self._waiting: dict[int, _Ask] = {}
        self._residents: dict[Sha256, _Resident] = {}
        self._bereft: set[int] = set()  # asks that ran on a model which crashed and has left, and have not ended yet

    def on_ask(
        self, ask: int, digest: Sha256, keep_alive_s: float, now: float, *, takes_slot: bool = True
    ) -> list[Action]:
        """A request came; ``ask`` is its number, never used before. Raises Busy. Without a slot it waits for the load only."""
        if len(self._waiting) >= self._max_queue:
            raise Busy(QUEUE_FULL)
        self._waiting[ask] = _Ask(ask, digest, keep_alive_s, int(takes_slot))
        return self._advance(now)

    def on_end(self, ask: int, now: float) -> list[Action]:
        """A request has ended, or whoever asked went away while it waited. Idempotent."""
        self._waiting.pop(ask, None)
        self._bereft.discard(ask)
        for resident in self._residents.values():
            if resident.running.pop(ask, None):
                resident.used_at = now
        return self._advance(now)

    def on_loaded(self, digest: Sha256, parallel: int, now: float) -> list[Action]:
        """The model is in memory and answers ``parallel`` asks at once. Too late if it was given up meanwhile."""
        resident = self._residents[digest]
        if resident.phase is Phase.LOADING:
            resident.phase, resident.parallel, resident.used_at = Phase.LOADED, parallel, now
        return self._advance(now)

    def on_load_failed(self, digest: Sha256, now: float) -> list[Action]:
        """The model could not be loaded: those who wait for it hear so."""
        self._residents.pop(digest, None)
        failed = [ask.id for ask in self._waiting.values() if ask.digest == digest]
        for ask in failed:
            del self._waiting[ask]
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
            ResidentView(r.digest, r.expires_at, len(r.running), self._queued(r.digest))
            for r in self._residents.values()
            if r.phase is Phase.LOADED
        ]
        return tuple(sorted(views, key=lambda view: -view.expires_at))

    @property
    def running(self) -> int:
        """Asks that use a model now."""
        return len(self._bereft) + sum(len(resident.running) for resident in self._residents.values())

    @property
    def queued(self) -> int:
        """Asks that wait."""
        return len(self._waiting)

    def _queued(self, digest: Sha256) -> int:
        return sum(ask.digest == digest for ask in self._waiting.values())

    def _advance(self, now: float) -> list[Action]:
        return [*self._start(now), *self._expire(now), *self._load(now), *self._evict()]

    def _start(self, now: float) -> list[Action]:
        started: list[Action] = []
        for ask in tuple(self._waiting.values()):
            resident = self._residents.get(ask.digest)
            usable = resident is not None and resident.phase is Phase.LOADED and not resident.doomed
            if resident is not None and usable and resident.free_slots >= ask.slots:
                del self._waiting[ask.id]
                resident.running[ask.id] = ask
                resident.used_at, resident.keep_alive_s = now, ask.keep_alive_s
                started.append(Start(ask.id))
        return started

    def _expire(self, now: float) -> list[Action]:
        return [
            self._unload(resident)
            for resident in self._residents.values()
            if resident.phase is Phase.LOADED
            and not resident.running
            and (resident.doomed or resident.expires_at <= now)
        ]

    def _load(self, now: float) -> list[Action]:
        loads: list[Action] = []
        for ask in self._waiting.values():
            if ask.digest not in self._residents and len(self._residents) < self._max_loaded:
                self._residents[ask.digest] = _Resident(ask.digest, Phase.LOADING, now, ask.keep_alive_s)
                loads.append(Load(ask.digest))
        return loads

    def _evict(self) -> list[Action]:
        missing = {ask.digest for ask in self._waiting.values()} - self._residents.keys()
        leaving = sum(r.phase is Phase.UNLOADING or r.doomed for r in self._residents.values())
        staying = sorted(
            (r for r in self._residents.values() if r.phase is Phase.LOADED and not r.doomed),
            key=lambda r: (bool(r.running), r.used_at),
        )
        actions: list[Action] = []
        for resident in staying[: max(0, len(missing) - leaving)]:
            resident.doomed = True
            if not resident.running:
                actions.append(self._unload(resident))
        return actions

    def _unload(self, resident: _Resident) -> Action:
        resident.phase = Phase.UNLOADING
        return Unload(resident.digest)


def speed_after_load(speed: Speed, took_s: float) -> Speed:
    """The EWMA with one more load."""
    return msgspec.structs.replace(speed, load_s=_ewma(speed.load_s, took_s))


def speed_after_answer(speed: Speed, finish: Finish) -> Speed:
    """The EWMA with one more answer; parts of it that are too short to measure do not count."""
    prefill, decode = speed.prefill_per_s, speed.decode_per_s
    read = finish.prompt_tokens - finish.cached_tokens
    if read >= MIN_RATE_TOKENS and finish.prompt_s > 0:
        prefill = _ewma(prefill, read / finish.prompt_s)
    if finish.output_tokens >= MIN_RATE_TOKENS and finish.output_s > 0:
        decode = _ewma(decode, finish.output_tokens / finish.output_s)
    return msgspec.structs.replace(speed, prefill_per_s=prefill, decode_per_s=decode)


def _ewma(old: float, new: float) -> float:
    return new if old == 0 else old + RATE_WEIGHT * (new - old)
