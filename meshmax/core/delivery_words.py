"""The words between core.delivery and whoever acts for it: whom it may ask, and what it wants done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.base.inference import InferRequest, RoutedEvent
from meshmax.base.route import AttemptKind
from meshmax.core.pace import Gaps


class Choice(msgspec.Struct, frozen=True):
    """A peer that may be asked, from ``from_s`` on (it is busy until then). ``first_s``: when its first event is expected;
    ``late_s``: after how long it is late. ``resting``: after a failure, or full; asked where nobody else is left, never beside
    one that is only late.

    ``gaps``: between its words so far, ``frames``: between its frames, both shared by all its answers. ``deterministic``: its
    engine says the same to the same.
    """

    peer: PeerId
    gaps: Gaps
    frames: Gaps
    first_s: float = 0.0
    late_s: float = 1.0
    rtt_s: float = 0.0
    ours: bool = False
    from_s: float = 0.0
    resting: bool = False
    deterministic: bool = False


class Chooser(Protocol):
    """Puts peers in order, as of now."""

    def choices(self) -> Sequence[Choice]:
        """Who may be asked, best first; those that rest after a failure last."""
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
