"""Whether a peer may be asked: a circuit breaker per peer, and per peer and model. Sans-IO.

A circuit is *closed* until failures open it: one of the connection, of the protocol or of a load at once, since the next ask
would meet it too; what an engine does in the middle of an answer only after ENGINE_FAILURES within WINDOW_S, a whole answer
making one of them good. *Open*, the peer is not asked, for a time that doubles with each further failure, with jitter. After
that it is *half-open*: exactly one ask goes there as a probe; its first event closes the circuit, its failure opens it for
longer, and a probe that is given up before it told anything leaves it as it was. That a peer takes an ask closes the circuit of
the whole peer; one that is still at it after PROBE_S closes the model's, too: a long load is no failure. Until an answer came
whole, one failure of any kind opens it again, for longer. Failures of asks that were under way when the circuit opened do not
count again: fifty streams that break together are one failure. A peer that has come back (a new connection, a restart) is
half-open at once; RETURNS times in WINDOW_S at most, or until an answer came whole, since that it is back is only its own word.

Busy is no failure: the peer answered. It is left alone for as long as it asked, at most MAX_BUSY_S and with jitter, so that
those who were turned away together do not come back together, or until its status tells that it was full and is not any more;
then it is asked like any other. Batch requests that are turned away keep no interactive one from it.
(M. Nygard, "Release It!", "Circuit Breaker".)
Not here: which peer is asked (core.routing), who asks (services.router).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import Priority
from meshmax.core.backoff import Random, backoff_s

FIRST_BACKOFF_S: Final = 0.5  # one lost stream is often a hiccup: soon again, since somebody may wait for it
MAX_BACKOFF_S: Final = 60.0  # a peer that was repaired is tried within a minute
OWN_BACKOFF_S: Final = 4.0  # the most for our own engine: who repairs it sits here, and nobody is asked over a network
ENGINE_FAILURES: Final = 3  # one crash may be the prompt's fault, three are the engine's
ON_TRIAL_S: Final = 120.0  # after it closed without a whole answer (clients leave, too): forgiven then
WINDOW_S: Final = 60.0  # an engine that fails less often than that is better than none
RETURNS: Final = 3  # in WINDOW_S that end a time out: who comes back more often does not last, or only says so
PROBE_S: Final = 30.0  # a probe that is still at it after so long loads or waits: it has not failed
MAX_BUSY_S: Final = 60.0  # a peer that asks for more is asked again all the same, it may have been restarted
BUSY_SPREAD: Final = 0.25  # of that time, on top of it
MAX_CIRCUITS: Final = 4096  # of about 400 bytes; only those that are not closed and quiet are kept
MAX_REASON: Final = 200  # characters of what the last failure said

# Codes of errors (base.errors) that are counted, and of those that say "not now". All others open at once.
COUNTED: Final = frozenset({"engine", "engine_crashed", "first_token_timeout"})
NOT_NOW: Final = frozenset({"busy", "draining", "quota_exceeded"})

BreakerState = Literal["closed", "half-open", "open"]
_RANK: Final[dict[BreakerState, int]] = {"closed": 0, "half-open": 1, "open": 2}


class Standing(msgspec.Struct, frozen=True):
    """How a peer stands for a model: closed, ask; half-open, one ask may go as a probe; open, do not ask until ``until_s``.

    ``code`` is of the error that was the reason (one of NOT_NOW: it is busy, ``failures`` is 0 then), ``failures`` how often
    in a row the circuit opened. ``probing``: open only because a probe is under way. ``reason``: what the last failure said.
    """

    state: BreakerState = "closed"
    until_s: float = 0.0
    code: str = ""
    failures: int = 0
    probing: bool = False
    reason: str = ""


CLOSED: Final = Standing()


class _NoJitter:
    def random(self) -> float:
        return 1.0


NO_JITTER: Final = _NoJitter()  # for tests, and where one node alone asks


class _Circuit:
    __slots__ = (
        "busy",
        "busy_code",
        "code",
        "counted",
        "is_open",
        "opened_s",
        "probe_s",
        "reason",
        "returns",
        "trips",
        "until_s",
        "was_full",
    )

    def __init__(self) -> None:
        self.counted: list[float] = []  # when failures came that did not open it yet; at most ENGINE_FAILURES
        self.returns: list[float] = []  # when the peer came back while it was open; at most RETURNS
        self.is_open = False  # or half-open
        self.trips = 0  # openings since the last whole answer
        self.opened_s = self.until_s = -math.inf  # when it opened last, and until when it is not half-open
        self.code = self.reason = ""
        self.probe_s: float | None = None  # when the probe was sent that is under way
        self.busy: dict[Priority, float] = {}  # until when each kind of request is turned away
        self.busy_code = ""
        self.was_full = False  # its status told so, since it said that it is busy

    def standing(self, now: float, priority: Priority) -> Standing:
        if self.probe_s is not None and now >= self.probe_s + PROBE_S:
            self.close()
        if self.is_open and now < self.until_s:
            return Standing("open", self.until_s, self.code, self.trips, reason=self.reason)
        if (busy_s := self.busy.get(priority, -math.inf)) > now:
            return Standing("open", busy_s, self.busy_code)
        if not self.is_open:
            return CLOSED
        if self.probe_s is not None:
            return Standing("open", self.probe_s + PROBE_S, self.code, self.trips, True, self.reason)
        return Standing("half-open", self.until_s, self.code, self.trips, reason=self.reason)

    def open(self, code: str, reason: str, now: float, until_s: float) -> None:
        self.is_open = True
        self.opened_s, self.until_s = now, until_s
        self.code, self.reason, self.probe_s, self.counted = code, reason[:MAX_REASON], None, []

    def close(self) -> None:
        self.is_open, self.probe_s = False, None

    def on_returned(self, now: float) -> None:
        self.returns = [at for at in self.returns if now - at < WINDOW_S]
        if len(self.returns) < RETURNS:
            self.returns.append(now)
            self.opened_s, self.until_s = now, min(self.until_s, now)  # what was sent before says nothing

    def is_quiet(self, now: float) -> bool:
        return not self.trips and not self.counted and all(until <= now for until in self.busy.values())


class Breakers:
    """The circuits of one node. Owned by one task; every ``now`` is of one monotonic clock, in seconds."""

    __slots__ = ("_circuits", "_random")

    def __init__(self, random: Random = NO_JITTER) -> None:
        self._random = random
        self._circuits: OrderedDict[tuple[PeerId, Sha256 | None], _Circuit] = OrderedDict()

    def __len__(self) -> int:
        """How many circuits are not closed and quiet."""
        return len(self._circuits)

    def standing(self, peer: PeerId, digest: Sha256, now: float, priority: Priority = "interactive") -> Standing:
        """How ``peer`` stands for this model now: the worse of the peer's circuit and the model's on it."""
        found = [circuit.standing(now, priority) for circuit in self._of(peer, digest)]
        return max(found, key=lambda standing: (_RANK[standing.state], standing.until_s), default=CLOSED)

    def on_failure(
        self,
        peer: PeerId,
        digest: Sha256 | None,
        code: str,
        now: float,
        at_least_s: float = 0.0,
        priority: Priority = "interactive",
        *,
        most_s: float = MAX_BACKOFF_S,
        sent_s: float = math.inf,
        reason: str = "",
    ) -> None:
        """The peer failed: with this model, or (``digest`` None) altogether. Kept out for ``at_least_s``, at most ``most_s``.

        A code of NOT_NOW is no failure: see `on_busy`. ``priority``: of the ask, which was sent at ``sent_s``. ``reason``: what
        was said, for people.
        """
        if code in NOT_NOW:
            self.on_busy(peer, digest, at_least_s, now, priority, code)
            return
        circuit = self._circuit(peer, digest)
        if sent_s < circuit.opened_s or (circuit.is_open and now < circuit.until_s):
            return  # it was sent before the circuit opened
        if not circuit.is_open and now - circuit.until_s > ON_TRIAL_S:
            circuit.trips = 0
        if not circuit.trips and code in COUNTED:
            circuit.counted = [at for at in circuit.counted if now - at < WINDOW_S] + [now]
            if len(circuit.counted) < ENGINE_FAILURES:
                return
        circuit.trips += 1
        pause_s = backoff_s(circuit.trips, FIRST_BACKOFF_S, most_s, self._random)
        circuit.open(code, reason, now, now + min(max(pause_s, at_least_s), MAX_BACKOFF_S))

    def on_busy(
        self,
        peer: PeerId,
        digest: Sha256 | None,
        retry_after_s: float,
        now: float,
        priority: Priority = "interactive",
        code: str = "busy",
    ) -> None:
        """The peer takes nothing of ``priority`` now; where that is interactive, nothing of batch either."""
        if digest is not None and (whole := self._circuits.get((peer, None))):
            whole.close()  # it answered, so it can be reached
            whole.trips = 0
            self._drop_quiet(peer, None, now)
        circuit = self._circuit(peer, digest)
        circuit.busy_code, circuit.was_full = code, False
        spread = 1.0 + BUSY_SPREAD * (1.0 - self._random.random())
        until_s = now + min(max(retry_after_s, 0.0), MAX_BUSY_S) * spread
        for kind in ("interactive", "batch") if priority == "interactive" else ("batch",):
            circuit.busy[kind] = until_s
        self._drop_quiet(peer, digest, now)

    def on_load(self, peer: PeerId, digest: Sha256, has_room: bool, now: float) -> None:
        """A status of a peer that is busy tells whether slots are free: where it told before that none was, it is asked again."""
        for model in (digest, None):
            circuit = self._circuits.get((peer, model))
            if circuit is None or not circuit.busy or circuit.busy_code != "busy":
                continue
            if has_room and circuit.was_full:
                circuit.busy.clear()
                self._drop_quiet(peer, model, now)
            elif not has_room:
                circuit.was_full = True

    def on_returned(self, peer: PeerId, now: float, *, restarted: bool = False) -> None:
        """The peer is connected again after it was not: one ask may find out at once. ``restarted``: nobody waits there."""
        for key in [key for key in self._circuits if key[0] == peer]:
            circuit = self._circuits[key]
            if circuit.is_open:
                circuit.on_returned(now)
            if restarted:
                circuit.busy.clear()
                self._drop_quiet(*key, now)

    def on_reached(self, peer: PeerId) -> None:
        """The peer took an ask: whatever its engine does, it can be reached."""
        if circuit := self._circuits.get((peer, None)):
            circuit.close()

    def on_success(self, peer: PeerId, digest: Sha256) -> None:
        """The peer speaks, its answer begins: its circuits close. What it asked for as busy still holds."""
        for circuit in self._of(peer, digest):
            circuit.close()

    def on_answered(self, peer: PeerId, digest: Sha256, now: float) -> None:
        """An answer came whole: what opened the circuits is over, and one failure that was counted is made good."""
        for model in (digest, None):
            if circuit := self._circuits.get((peer, model)):
                circuit.close()
                circuit.trips, circuit.counted, circuit.returns = 0, circuit.counted[1:], []
                self._drop_quiet(peer, model, now)

    def on_probe_sent(self, peer: PeerId, digest: Sha256, now: float) -> bool:
        """An ask goes to ``peer``; call it for each. True: it is the probe of a half-open circuit, no other may go."""
        half_open = [c for c in self._of(peer, digest) if c.is_open and now >= c.until_s and c.probe_s is None]
        for circuit in half_open:
            circuit.probe_s = now
        return bool(half_open)

    def on_probe_ended(self, peer: PeerId, digest: Sha256, sent_s: float) -> None:
        """The probe sent then has ended; if it told nothing (the client left, another peer was faster), another may go."""
        for circuit in self._of(peer, digest):
            if circuit.probe_s == sent_s:
                circuit.probe_s = None

    def _of(self, peer: PeerId, digest: Sha256) -> list[_Circuit]:
        found = (self._circuits.get((peer, digest)), self._circuits.get((peer, None)))
        return [circuit for circuit in found if circuit]

    def _circuit(self, peer: PeerId, digest: Sha256 | None) -> _Circuit:
        circuit = self._circuits.setdefault((peer, digest), _Circuit())
        self._circuits.move_to_end((peer, digest))
        if len(self._circuits) > MAX_CIRCUITS:
            self._circuits.popitem(last=False)
        return circuit

    def _drop_quiet(self, peer: PeerId, digest: Sha256 | None, now: float) -> None:
        if self._circuits[peer, digest].is_quiet(now):
            del self._circuits[peer, digest]
