"""Decides what a peer that is taken out of service does with its answers. Sans-IO.

Rules. A node runs until it is drained by command or by its own ending. From then on no ask is taken, and those that have
not begun (waiting for a slot or a load) are sent away at once: another peer begins them sooner than we. Answers that have
begun go on until the deadline, which then ends them with Draining, so that whoever passes them on to a client carries on
elsewhere. When none is left the node is drained. A second command changes the deadline alone, the last word counts;
undraining takes asks again, at any time, and brings nothing back that was ended. Nothing is kept: a node that starts, runs.
What is refused or ended tells which of the two it was, for people alone: whoever asks goes to another peer in either case.
Time is seconds of any monotonic clock. Not here: ending an answer (services.drain), telling the mesh (node.draining).
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from meshmax.base.drain import DrainState, DrainView
from meshmax.base.errors import Draining

DRAINED: Final = "this peer was drained before its answer was whole"
STOPPED: Final = "this peer was stopped before its answer was whole"
STOPPING: Final = "The peer takes no new work: it is being stopped."


class End(msgspec.Struct, frozen=True):
    """End this answer with Draining; `on_end` follows when it has gone."""

    answer: int


class Told(msgspec.Struct, frozen=True):
    """The state is another one: tell those who wait, and the mesh."""

    state: DrainState


Action = End | Told
_Phase = Literal["waiting", "begun", "ending"]


class DrainCore:
    """The decisions of one node. Every event returns what is to be done now; call `tick` at `deadline`."""

    __slots__ = ("_answers", "_count", "_ended", "_ends_at", "_state", "_stopping")

    def __init__(self) -> None:
        self._state: DrainState = "running"
        self._answers: dict[int, _Phase] = {}  # by number
        self._count = self._ended = 0
        self._stopping = False
        self._ends_at = math.inf

    def on_ask(self) -> int:
        """An ask came; the number of its answer. Raises Draining."""
        if self._state != "running":
            raise Draining(STOPPING if self._stopping else None, stopping=self._stopping)
        self._count += 1
        self._answers[self._count] = "waiting"
        return self._count

    def on_begun(self, answer: int) -> None:
        """The answer has begun: it is worth waiting for."""
        if self._answers.get(answer) == "waiting":
            self._answers[answer] = "begun"

    def on_end(self, answer: int) -> list[Action]:
        """The answer has ended, however. Idempotent."""
        self._answers.pop(answer, None)
        return self._settle()

    def on_drain(self, deadline_s: float, now: float, *, stopping: bool = False) -> list[Action]:
        """Take no ask any more; what runs may go on for ``deadline_s``. ``stopping``: the node ends."""
        actions: list[Action] = []
        self._stopping = self._stopping or stopping
        if self._state == "running":
            self._state, self._ended = "draining", 0
            actions = [Told("draining"), *self._end_those("waiting")]
        self._ends_at = now + deadline_s if self._state == "draining" else math.inf
        return [*actions, *self.tick(now)]

    def on_undrain(self) -> list[Action]:
        """Take asks again."""
        if self._state == "running":
            return []
        self._state, self._ends_at = "running", math.inf
        return [Told("running")]

    def ended(self) -> Draining:
        """The error of an answer that `End` ended."""
        return Draining(STOPPED if self._stopping else DRAINED, stopping=self._stopping)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        if self._state != "draining" or now < self._ends_at:
            return self._settle()
        self._ends_at = math.inf
        ends = self._end_those("begun")
        self._ended += len(ends)
        return [*ends, *self._settle()]

    def deadline(self) -> float:
        """When `tick` is due; inf if nothing ends by itself."""
        return self._ends_at

    def snapshot(self, now: float) -> DrainView:
        """How we stand."""
        left_s = None
        if self._state == "draining":
            left_s = 0.0 if self._ends_at == math.inf else max(0.0, self._ends_at - now)
        return DrainView(self._state, len(self._answers), left_s, self._ended)

    @property
    def state(self) -> DrainState:
        """Whether asks are taken (running), answers still run (draining), or none does (drained)."""
        return self._state

    def _end_those(self, phase: _Phase) -> list[Action]:
        ends: list[Action] = []
        for answer, its in self._answers.items():
            if its == phase:
                self._answers[answer] = "ending"
                ends.append(End(answer))
        return ends

    def _settle(self) -> list[Action]:
        if self._state != "draining" or self._answers:
            return []
        self._state, self._ends_at = "drained", math.inf
        return [Told("drained")]
