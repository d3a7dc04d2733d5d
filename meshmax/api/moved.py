"""The marker of an answer that went on at another peer: ``"meshmax": {"peer": ID, "continued": true}``.

It stands in the next line of the stream and in the last one, and in the one object of an answer that is not streamed.
``"exact": false`` is added where what follows may differ from what the first peer would have said: in the next line of
that move alone, in the last line of any. Who began stands in the header X-Meshmax-Peer.
"""

from __future__ import annotations

from typing import Any

from meshmax.base.inference import Moved


class Marker:
    """What to add to the lines of one answer."""

    __slots__ = ("_exact", "_last", "_next")

    def __init__(self) -> None:
        self._next: Moved | None = None
        self._last: Moved | None = None
        self._exact = True

    def on_moved(self, event: Moved) -> None:
        """Another peer goes on from here."""
        exact = event.exact and (self._next is None or self._next.exact)
        self._next = self._last = Moved(event.peer_id, exact)
        self._exact = self._exact and exact

    def mark_next(self, line: dict[str, Any]) -> None:
        """Mark a line that more will follow, if it is the next after a move."""
        if self._next is not None:
            line["meshmax"] = _words(self._next)
            self._next = None

    def mark_last(self, line: dict[str, Any]) -> None:
        """Mark the last line, or the one object, if the answer moved at all."""
        if self._last is not None:
            line["meshmax"] = _words(Moved(self._last.peer_id, self._exact))


def _words(moved: Moved) -> dict[str, Any]:
    words: dict[str, Any] = {"peer": moved.peer_id, "continued": True}
    return words if moved.exact else {**words, "exact": False}
