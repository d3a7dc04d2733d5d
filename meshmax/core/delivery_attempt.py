"""One request at one peer, as core.delivery keeps it: what came when, and until when it may be silent.

Not here: what follows from that (core.delivery), how deadlines are learnt (core.pace).
"""

from __future__ import annotations

import math
from typing import Final

from meshmax.base.errors import Draining, EngineError, FirstTokenTimeout, MeshmaxError, PeerGone
from meshmax.base.inference import Finish
from meshmax.base.route import Attempt, AttemptKind
from meshmax.core.continuation import Joint
from meshmax.core.delivery_words import Choice
from meshmax.core.missing_vectors import VectorJoint
from meshmax.core.pace import CALM_AFTER_S, KEEP_ALIVE_S, MAX_PATIENCE, frame_silence_s

FIRST_EVENT_DEADLINE_S: Final = 600.0  # keep-alives and no event: as long as the longest load and a full queue may take
HANG_S: Final = 120.0  # keep-alives and no token, in the middle of an answer: no engine stops for that long
FROZEN_S: Final = 1.5 * KEEP_ALIVE_S  # without a frame: the peer, not its engine
TICK_S: Final = 1e-3  # what is due within that is due: sums of times are not exact


class PeerAttempt:
    """One request at one peer."""

    __slots__ = (
        "choice",
        "ended_s",
        "error",
        "exact",
        "first_s",
        "heard_s",
        "held",
        "joint",
        "kind",
        "late_at",
        "lateness",
        "load_s",
        "look_at",
        "mode",
        "number",
        "patience",
        "sending",
        "sent_s",
        "spoke_s",
        "suspected",
        "tokens",
        "told_s",
    )

    def __init__(self, number: int, choice: Choice, kind: AttemptKind, now: float) -> None:
        self.number, self.choice, self.kind = number, choice, kind
        self.joint: Joint | VectorJoint | None = None
        self.mode = ""
        self.exact = True
        self.sent_s = self.heard_s = self.told_s = now  # told: something else than that it is still at it
        self.spoke_s: float | None = None  # its last word, or when it could speak on
        self.late_at = now + max(choice.late_s, TICK_S)
        self.look_at = math.inf
        self.lateness = 0
        self.patience = 1.0
        self.held = self.sending = self.suspected = False
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self.error: MeshmaxError | None = None
        self.tokens = 0
        self.load_s = 0.0

    def quiet_at(self, factor: float) -> float:
        """When it is suspected if it says nothing until then. ``factor``: our patience with everybody."""
        if self.held or self.suspected:
            return math.inf
        due, choice = math.inf, self.choice
        patience = min(self.patience * factor, MAX_PATIENCE)
        if not (choice.ours or self.sending):
            silence_s = max(frame_silence_s(self.heard_s - self.told_s), choice.frames.deadline_s())
            due = self.heard_s + silence_s * patience + 2 * choice.rtt_s
        if self.spoke_s is not None:
            due = min(due, self.spoke_s + choice.gaps.deadline_s() * patience)
        return due

    def on_frame(self, now: float) -> None:
        """The peer said something."""
        if not self.sending and self.heard_s - self.told_s < CALM_AFTER_S - KEEP_ALIVE_S:
            self.choice.frames.add(now - self.heard_s, now)
        self.heard_s = now

    def on_finish(self, finish: Finish) -> None:
        """Its own words for the end. What it says of a load counts for no more than we waited for its first word."""
        self.load_s = min(finish.load_s, (self.sent_s if self.first_s is None else self.first_s) - self.sent_s)

    def is_frozen(self, now: float) -> bool:
        """Whether not even KeepAlives come, where some were due."""
        return not self.choice.ours and now - self.heard_s >= FROZEN_S

    def gone_at(self) -> float:
        """When it is given up if it says nothing until then."""
        if self.held:
            return math.inf
        return self.sent_s + FIRST_EVENT_DEADLINE_S if self.spoke_s is None else self.spoke_s + HANG_S

    def due_at(self, factor: float) -> float:
        """When it is to be looked at if it says nothing until then."""
        late_at = self.late_at if self.spoke_s is None else math.inf
        return min(self.quiet_at(factor), self.gone_at(), late_at, self.look_at)

    def told(self, began_s: float, leads: bool) -> Attempt:
        """For a Route. ``began_s``: when the request came; ``leads``: it is the last that spoke to the client."""
        error, ended_s = self.error, self.ended_s
        slower = ended_s is not None and error is None and not leads
        return Attempt(
            peer_id=self.choice.peer,
            error=error.code if error else "cancelled" if slower else "",
            first_token_s=None if self.first_s is None else self.first_s - self.sent_s,
            kind=self.kind,
            at_s=self.sent_s - began_s,
            ended_s=None if ended_s is None else ended_s - self.sent_s,
            tokens=self.tokens,
            message=error.message if error else "",
            stopping=isinstance(error, Draining) and error.stopping,
            load_s=self.load_s,
        )

    def no_word(self) -> MeshmaxError:
        """What it is given up for at `gone_at`."""
        if self.spoke_s is None:
            return FirstTokenTimeout(f"the answer did not begin within {FIRST_EVENT_DEADLINE_S:g} s")
        return EngineError(f"the engine said nothing for {HANG_S:g} s in the middle of its answer")

    def silence(self, now: float) -> MeshmaxError:
        """What it is given up for when another one went on in its place."""
        if self.is_frozen(now):
            return PeerGone(f"the peer was silent for {now - self.heard_s:.1f} s")
        return EngineError(f"the engine said nothing for {now - (self.spoke_s or self.sent_s):.1f} s")
