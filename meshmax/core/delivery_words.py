"""The words between core.delivery and whoever acts for it: whom it may ask, and what it wants done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.base.inference import InferRequest, RoutedEvent
from meshmax.base.route import AttemptKind
from meshmax.core.pace import Gaps

Rest = Literal["", "broken", "probed", "busy", "full", "gone"]
"""Why a peer is not asked now: it failed lately; so it did, and one request is finding out whether it works again; it said that
it is busy; its status says that its queue is full; it was lost seconds ago, and may be back."""


class Choice(msgspec.Struct, frozen=True):
    """A peer that may be asked, from ``from_s`` on. ``first_s``: when its first event is expected; ``late_s``: after how long
    it is late.

    ``rests``: why it is not asked before ``from_s``. One that is full is asked when its status says so, and ``from_s`` is a
    guess, one that is gone when it is back; our own queue is asked all the same where nobody else is left, which costs nothing.
    ``name``, ``code``, ``reason``: for the words of a refusal, where it rests. ``gaps``: between its words so far, ``frames``:
    between its frames, both shared by all its answers. ``deterministic``: its engine says the same to the same.
    """

    peer: PeerId
    gaps: Gaps
    frames: Gaps
    first_s: float = 0.0
    late_s: float = 1.0
    rtt_s: float = 0.0
    ours: bool = False
    from_s: float = 0.0
    rests: Rest = ""
    deterministic: bool = False
    name: str = ""
    code: str = ""
    reason: str = ""


class Chooser(Protocol):
    """Puts peers in order, as of now."""

    def choices(self) -> Sequence[Choice]:
        """Who may be asked, best first; those that rest last, the first to be asked again first."""
        ...

    def may_hedge(self, lateness: int) -> bool:
        """Whether one more request may be sent twice; if so it counts as sent. ``lateness``: see core.hedging.Budget."""
        ...


class Start(msgspec.Struct, frozen=True):
    """Ask ``choice.peer`` for ``request``, under the number ``attempt``."""

    attempt: int
    choice: Choice
    kind: AttemptKind
    request: InferRequest


class Cancel(msgspec.Struct, frozen=True):
    """Give the attempt up and stop its work. ``why`` is an error where the peer is to blame, None where another was faster."""

    attempt: int
    why: MeshmaxError | None = None


class Suspect(msgspec.Struct, frozen=True):
    """The attempt's peer has said nothing for longer than it should. ``frozen``: not even that it is still at it."""

    attempt: int
    frozen: bool


class Give(msgspec.Struct, frozen=True):
    """The client gets these."""

    events: Sequence[RoutedEvent]


class Done(msgspec.Struct, frozen=True):
    """The answer is whole: its Finish was given."""


class Fail(msgspec.Struct, frozen=True):
    """Nobody can make it good."""

    error: MeshmaxError


Action = Start | Cancel | Suspect | Give | Done | Fail
