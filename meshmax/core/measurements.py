"""What we measured of peers ourselves: round trips, speeds per model and device, and how long each model's answers usually
are, whoever gives them. Feeds core.routing.

Rules: figures are means over time (core.ewma), kept per (peer, model, device), since a model that moved to another device
runs at another speed, and are of the peer without others beside us. How the time until the first
token divides into waiting for a slot and reading the prompt is the peer's word; their sum is ours, so a lie in one is paid
in the other. Failures are told to the circuit breakers (core.breaker), which are kept here. Each table is
bounded; what was not used for longest goes first. Time is passed in. Not here: what the figures mean for a choice
(core.routing), who takes the measurements (services.router).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Device, Load
from meshmax.core.backoff import Random
from meshmax.core.breaker import NO_JITTER, Breakers
from meshmax.core.ewma import Ewma

MAX_SPEEDS: Final = 4096  # (peer, model, device) entries of about 1 KiB: 256 peers with 16 models in use each
MAX_PEERS: Final = 1024  # four times the peers a node knows at once by default
MIN_PREFILL_TOKENS: Final = 64  # shorter prompts measure the fixed cost of an answer, not the prefill rate
MIN_DECODE_TOKENS: Final = 8  # fewer are dominated by how they were batched on the way
MIN_LEFT_S: Final = (
    5.0  # of an answer that was left; so few tokens in so long are not a matter of how they were batched
)
MIN_LOAD_S: Final = 0.05  # a shorter "load" is the bookkeeping of a model that was in memory already
MAX_ANSWER_TOKENS: Final = 4096  # of an answer that counts for how long answers are; one that never ends is no measure
MAX_MODELS: Final = 1024  # models whose answers' length is remembered
MAX_TURN_S: Final = 3600.0  # of a slot until it is free; longer is as bad
TURN_KEPT_S: Final = 900.0  # who else asks a peer for what is another thing after that
SHARE: Final[dict[Device, float]] = {
    "gpu": 0.1,
    "cpu": 0.5,
}  # how much each answer beside ours slows it: GPUs batch well
BOUND_BY_MEMORY_PER_S: Final = 250.0  # tokens; who is faster has a small model, bound by other things than memory
MAX_RATE_PER_S: Final = 1e6  # tokens; no device decodes faster, so a larger figure was not measured well

V = TypeVar("V")


class Pace(msgspec.Struct, frozen=True):
    """What a device did with whatever models it ran for us, in bytes of weights a second: tokens of an answer and of a prompt a
    second, times the size of the model, and the size over the seconds of a load. What it would do with another model follows from
    that one's size. What was not measured of it is the mean of its kind of device, None where there is none."""

    decode: float | None = None
    prefill: float | None = None
    load: float | None = None


NO_PACE: Final = Pace()


class Figures(msgspec.Struct, frozen=True):
    """Means measured by us of one model on one peer; None where never. ``first_token_s``: of short prompts, less the
    round trip and of waiting. ``turn_s``: seconds in which one slot becomes free, whoever has it. ``age_s``: seconds since
    the last answer, infinite before the first. ``pace``: of the device, with any model; none where both rates of this one
    were measured."""

    first_token_s: float | None = None
    prefill_per_s: float | None = None
    decode_per_s: float | None = None
    load_s: float | None = None
    age_s: float = math.inf
    turn_s: float | None = None
    pace: Pace = NO_PACE


NOTHING: Final = Figures()


class _Speed:
    __slots__ = ("decode", "first_token", "load", "read_s", "read_tokens")

    def __init__(self) -> None:
        self.first_token, self.decode, self.load = Ewma(), Ewma(), Ewma()
        self.read_tokens, self.read_s = Ewma(), Ewma()  # their ratio: long prompts say more of the rate than short ones

    def on_read(self, tokens: int, took_s: float, now: float) -> None:
        """``tokens`` of a prompt were read in ``took_s``."""
        if tokens < MIN_PREFILL_TOKENS:
            self.first_token.add(took_s, now)
        else:
            fixed_s = min(self.first_token.value or 0.0, 0.75 * took_s)
            self.read_tokens.add(tokens, now)
            self.read_s.add(max(took_s - fixed_s, tokens / MAX_RATE_PER_S), now)

    def prefill_per_s(self) -> float | None:
        """Tokens a second."""
        return self.read_tokens.value / self.read_s.value if self.read_tokens.value and self.read_s.value else None


class _Paces:
    """Of one device, or of all of a kind."""

    __slots__ = ("_decode", "_load", "_prefill", "pace")

    def __init__(self) -> None:
        self._decode, self._prefill, self._load = Ewma(), Ewma(), Ewma()
        self.pace = NO_PACE

    def add(self, seen: Pace, kind: Pace, now: float) -> None:
        """``seen`` was measured; ``kind`` stands in for what never was."""
        means = []
        for mean, new, usual in (
            (self._decode, seen.decode, kind.decode),
            (self._prefill, seen.prefill, kind.prefill),
            (self._load, seen.load, kind.load),
        ):
            if new is not None:
                mean.add(new, now)
            means.append(usual if mean.value is None else mean.value)
        self.pace = Pace(*means)


class Measurements:
    """The bounded table of what we measured. Owned by one task; every ``now`` is of one monotonic clock, in seconds."""

    __slots__ = ("_answers", "_kinds", "_paces", "_rtts", "_speeds", "_turns", "breakers")

    def __init__(self, random: Random = NO_JITTER) -> None:
        """``random``: jitter of the breakers' backoff."""
        self.breakers = Breakers(random)
        self._speeds: OrderedDict[tuple[PeerId, Sha256, Device], _Speed] = OrderedDict()
        self._paces: OrderedDict[tuple[PeerId, Device], _Paces] = OrderedDict()
        self._kinds: dict[Device, _Paces] = {}
        self._answers: OrderedDict[Sha256, Ewma] = OrderedDict()
        self._rtts: OrderedDict[PeerId, Ewma] = OrderedDict()
        self._turns: OrderedDict[PeerId, Ewma] = OrderedDict()

    def on_rtt(self, peer: PeerId, rtt_s: float, now: float) -> None:
        """A round trip to ``peer`` took ``rtt_s``."""
        _touch(self._rtts, peer, Ewma, MAX_PEERS).add(rtt_s, now)

    def on_first_token(
        self,
        peer: PeerId,
        digest: Sha256,
        device: Device,
        *,
        waited_s: float,
        prompt_tokens: int,
        now: float,
        prompt_s: float = 0.0,
        size: int = 0,
    ) -> None:
        """The first event came ``waited_s`` after sending, of which reading the prompt took ``prompt_s`` by the peer's word.
        ``size``: of the model in bytes, 0 where it is not known.

        Without that word (0) all of it counts as reading: then the model must have been loaded, and nobody ahead of us.
        """
        without_rtt_s = max(waited_s - (self.rtt_s(peer) or 0.0), 1e-4)
        read_s = min(prompt_s, without_rtt_s) if prompt_s > 0 else without_rtt_s
        speed = self._speed(peer, digest, device)
        speed.on_read(prompt_tokens, read_s, now)
        if prompt_tokens >= MIN_PREFILL_TOKENS and (per_s := speed.prefill_per_s()):
            self._on_pace(peer, device, Pace(prefill=per_s * size), now)

    def on_wait(self, peer: PeerId, waited_s: float, load: Load, now: float) -> None:
        """We waited so long for a slot at ``peer``, which had ``load`` when we asked. Nothing is learnt where one was free."""
        capacity = max(load.capacity, 1)
        places = load.running + load.queued - capacity + 1
        if places > 0:
            turn_s = min(max(waited_s, 0.0) * capacity / places, MAX_TURN_S)
            _touch(self._turns, peer, Ewma, MAX_PEERS).add(turn_s, now)

    def on_finish(
        self,
        peer: PeerId,
        digest: Sha256,
        device: Device,
        *,
        tokens: int,
        span_s: float,
        load_s: float,
        now: float,
        beside: int = 0,
        size: int = 0,
    ) -> None:
        """The answer is whole: ``tokens`` came in the ``span_s`` after the first event. ``load_s``: how long the peer loaded
        the model first. ``beside``: how many other answers it gave meanwhile, as far as we know. ``size``: of the
        model, as for `on_first_token`.
        """
        self.breakers.on_answered(peer, digest, now)
        speed = self._speed(peer, digest, device)
        if tokens >= MIN_DECODE_TOKENS:
            alone = tokens / max(span_s, 1e-6) * (1 + SHARE[device] * max(beside, 0))
            speed.decode.add(min(alone, MAX_RATE_PER_S), now)
            if alone < BOUND_BY_MEMORY_PER_S:
                self._on_pace(peer, device, Pace(decode=alone * size), now)
        if load_s >= MIN_LOAD_S:
            speed.load.add(load_s, now)
            self._on_pace(peer, device, Pace(load=size / load_s), now)

    def on_no_word(
        self, peer: PeerId, digest: Sha256, device: Device, waited_s: float, load: Load, now: float, *, loaded: bool
    ) -> None:
        """The ask was given up after ``waited_s`` without a word. ``load``, ``loaded``: as the peer told when it was sent.

        Without these figures a peer that never answers would seem as good as on the first day. What it was waiting for is
        not known, so it is put to what it had to be: a load, its queue, or the fixed cost of an answer.
        """
        if not loaded:
            self._speed(peer, digest, device).load.add(waited_s, now)
        elif load.running + load.queued >= load.capacity:
            self.on_wait(peer, waited_s, load, now)
        else:
            self._speed(peer, digest, device).first_token.add(waited_s, now)

    def on_left(
        self, peer: PeerId, digest: Sha256, device: Device, tokens: int, span_s: float, now: float, beside: int = 0
    ) -> None:
        """The client left in the middle of an answer, of which ``tokens`` had come in the ``span_s`` after the first event.

        It leaves those that are slow, which would never be known to be if whole answers alone counted.
        """
        if tokens >= MIN_DECODE_TOKENS or (tokens and span_s >= MIN_LEFT_S):
            alone = tokens / max(span_s, 1e-6) * (1 + SHARE[device] * max(beside, 0))
            self._speed(peer, digest, device).decode.add(min(alone, MAX_RATE_PER_S), now)

    def on_answer(self, digest: Sha256, tokens: int, now: float) -> None:
        """An answer of the model came to its own end after ``tokens``."""
        _touch(self._answers, digest, Ewma, MAX_MODELS).add(min(tokens, MAX_ANSWER_TOKENS), now)

    def answer_tokens(self, digest: Sha256) -> float | None:
        """How long the model's answers are on average; None if none was seen."""
        mean = self._answers.get(digest)
        return mean.value if mean else None

    def rtt_s(self, peer: PeerId) -> float | None:
        """The mean round trip, None if never measured."""
        mean = self._rtts.get(peer)
        return mean.value if mean else None

    def figures(self, peer: PeerId, digest: Sha256, device: Device, now: float) -> Figures:
        """What we measured of this model on this peer and device."""
        speed = self._speeds.get((peer, digest, device))
        turn = self._turns.get(peer)
        turn_s = turn.value if turn and now - turn.at_s < TURN_KEPT_S else None
        if speed is None:
            pace = self._pace(peer, device)
            return NOTHING if turn_s is None and pace is NO_PACE else Figures(turn_s=turn_s, pace=pace)
        at_s = max(speed.first_token.at_s, speed.read_s.at_s, speed.decode.at_s, speed.load.at_s)
        return Figures(
            speed.first_token.value,
            speed.prefill_per_s(),
            speed.decode.value,
            speed.load.value,
            max(0.0, now - at_s),
            turn_s,
            NO_PACE if speed.decode.value and speed.read_s.value else self._pace(peer, device),
        )

    def _pace(self, peer: PeerId, device: Device) -> Pace:
        paces = self._paces.get((peer, device)) or self._kinds.get(device)
        return paces.pace if paces else NO_PACE

    def _on_pace(self, peer: PeerId, device: Device, seen: Pace, now: float) -> None:
        if seen.decode or seen.prefill or seen.load:
            kind = self._kinds.setdefault(device, _Paces())
            kind.add(seen, NO_PACE, now)
            _touch(self._paces, (peer, device), _Paces, MAX_PEERS).add(seen, kind.pace, now)

    def _speed(self, peer: PeerId, digest: Sha256, device: Device) -> _Speed:
        return _touch(self._speeds, (peer, digest, device), _Speed, MAX_SPEEDS)


K = TypeVar("K")


def _touch(table: OrderedDict[K, V], key: K, make: Callable[[], V], limit: int) -> V:
    """The entry of ``key`` (a new one if there is none), now the most recently used of at most ``limit``."""
    entry = table.get(key)
    if entry is None:
        entry = table[key] = make()
    table.move_to_end(key)
    if len(table) > limit:
        table.popitem(last=False)
    return entry
