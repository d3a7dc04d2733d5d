"""Requests that wait since nobody can be asked, and what wakes them: whatever changes who may be asked.

Rules. A request is woken when the peers that have its model stand otherwise than before: one came or went, may be asked, may be
asked at another time. What changes nothing of that wakes nobody. Nothing is looked at where nobody waits. A call costs a look at
the peers for each model that is waited for, and no request's work is done in it. Not here: what a woken request does
(core.delivery), times that come by themselves (its own clock).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, Priority

Stand = Callable[[Ask], Hashable]
"""How all peers with a model stand for a request, so that it is another value when anything of that changed."""


class Sleeper(Protocol):
    """A request that waits."""

    def wake(self) -> None:
        """Look again soon; cheap, runs nothing."""
        ...


class _Line:
    def __init__(self, ask: Ask, stand: Hashable) -> None:
        self.ask, self.stand = ask, stand
        self.sleepers: set[Sleeper] = set()


class Waiting:
    """The requests of one node that wait; bounded by the requests under way."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._lines: dict[tuple[Sha256, Priority], _Line] = {}

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(line.sleepers) for line in self._lines.values())

    def add(self, ask: Ask, sleeper: Sleeper) -> None:
        """``sleeper`` waits for who may answer ``ask``, from now on."""
        line = self._lines.get(_key(ask))
        if line is None:
            line = self._lines[_key(ask)] = _Line(ask, self._stand(ask))
        line.sleepers.add(sleeper)

    def discard(self, ask: Ask, sleeper: Sleeper) -> None:
        """``sleeper`` waits no more."""
        if line := self._lines.get(_key(ask)):
            line.sleepers.discard(sleeper)
            if not line.sleepers:
                del self._lines[_key(ask)]

    def on_news(self) -> None:
        """Something may have changed: wake those whom it concerns."""
        for line in self._lines.values():
            stand = self._stand(line.ask)
            if stand != line.stand:
                line.stand = stand
                for sleeper in line.sleepers:
                    sleeper.wake()


def _key(ask: Ask) -> tuple[Sha256, Priority]:
    return ask.digest, ask.priority
