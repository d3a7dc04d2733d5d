"""Whether a peer that owes us a word is gone or only slow: for how long nothing came from it while we listened.

Rules. Any bytes on its connection show that its process lives, whatever the word waits behind; a frozen one sends none. Only
time in which we looked counts: what lies between two looks counts as `look_s` however long it took, since where it took longer
our own process was held up, and what came in meanwhile had not been read. Over: silent for the timeout, or alive for STUCK
times as long without the word, which then never comes. Time and what was heard are passed in. Not here: what follows.
"""

from __future__ import annotations

from typing import Final

LOOK_S: Final = 0.5  # between two looks; an end is noticed that much later at most
LOOKS: Final = 12  # at least so many in a timeout
STUCK: Final = 5.0  # timeouts; of a mesh on two busy cores each process waits for its turn for seconds
_ROUNDING_S: Final = 1e-6


class Silence:
    """One wait for a word of a peer. ``silent_s``, ``waited_s``: for how long nothing came, and the word did not."""

    __slots__ = ("_heard_s", "_timeout_s", "look_s", "silent_s", "waited_s")

    def __init__(self, timeout_s: float, now: float, look_s: float = LOOK_S) -> None:
        """``timeout_s``: of silence, above 0. ``now``: of the same clock as what is heard. ``look_s``: between looks, at most."""
        self._timeout_s = timeout_s - _ROUNDING_S
        self._heard_s = now
        self.look_s = min(look_s, timeout_s / LOOKS)
        self.silent_s = self.waited_s = 0.0

    def on_look(self, heard_s: float | None) -> None:
        """The word has not come yet; due `look_s` after the look before. ``heard_s``: when bytes came last; None: unknown."""
        self.waited_s += self.look_s
        if heard_s is not None and heard_s > self._heard_s:
            self._heard_s, self.silent_s = heard_s, 0.0
        else:
            self.silent_s += self.look_s

    @property
    def is_over(self) -> bool:
        """Whether to wait no longer."""
        return self.silent_s >= self._timeout_s or self.waited_s >= STUCK * self._timeout_s
