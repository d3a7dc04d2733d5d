"""How the path to a peer came about, in one line for people, and how long it took.

Rules. Times count from the beginning of our dial; where the peer came to us, from its coming. At most MAX_WORDS paths are told,
the first and the last ones: a peer between two networks changes often. Not here: which path is used (net.swarm).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.status import Path
from meshmax.base.traversal import PathStory

MAX_WORDS: Final = 3

_WORDS: Final[dict[Path, str]] = {
    "self": "this node",
    "direct": "direct",
    "mapped": "through a port that its router maps",
    "punched-tcp": "TCP simultaneous open",
    "punched-udp": "UDP through both NATs",
}


class Story:
    """One connected peer's. ``began``: of our dial, monotonic seconds; None: it came to us."""

    __slots__ = ("_came", "_connect_s", "_direct_s", "_since", "_words")

    def __init__(self, path: Path, relay: str, began: float | None, now: float) -> None:
        """``relay``: what people call the relay, where the path leads over one."""
        self._came, self._since = began is None, now if began is None else began
        self._connect_s = None if began is None else now - began
        self._direct_s: float | None = None
        self._words: list[str] = []
        self.on_path(path, relay, now)

    def on_path(self, path: Path, relay: str, now: float) -> None:
        """The best path is another now."""
        after_s = now - self._since
        if path != "relay" and self._direct_s is None and not self._came:
            self._direct_s = after_s
        word = f"relay {relay}" if path == "relay" else _WORDS[path]
        at_once = self._came and not self._words
        self._words.append(f"it came to us: {word}" if at_once else f"{word} after {_seconds(after_s)}")
        if len(self._words) > MAX_WORDS:
            del self._words[1]

    @property
    def told(self) -> PathStory:
        """As of now."""
        return PathStory(", then ".join(self._words), _ms(self._connect_s), _ms(self._direct_s))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000.0, 1)
