"""When each model was last used here, with few writes.

A use is a prompt that was answered from the model here, or a piece of it that was sent to a peer. That a model was added or
pulled is told by its manifest's time stamp, which counts as a use, too. Times are Unix seconds. Uses within RESOLUTION_S
of the last one change nothing, so that a busy model costs no writes. Not here: files (store.uses_file).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshmax.base.ids import Sha256

RESOLUTION_S: Final = 60.0  # finer differences decide nothing about what is swept
MAX_USES: Final = 4096  # models; the one used longest ago is forgotten first


class Uses:
    """Digest of a model -> when it was last used."""

    __slots__ = ("_times_s", "changed")

    def __init__(self, times_s: Mapping[Sha256, float] | None = None) -> None:
        self._times_s = dict(sorted((times_s or {}).items(), key=lambda item: item[1]))
        self.changed = False  # since it was last kept

    def note(self, digest: Sha256, now_s: float) -> None:
        """It is being used."""
        before_s = self._times_s.get(digest)
        if before_s is not None and 0 <= now_s - before_s < RESOLUTION_S:
            return
        self._times_s.pop(digest, None)
        while len(self._times_s) >= MAX_USES:
            del self._times_s[next(iter(self._times_s))]
        self._times_s[digest] = now_s
        self.changed = True

    def last_s(self, digest: Sha256, since_s: float, now_s: float) -> float:
        """When it was last used; ``since_s``: when it came here. Times in the future, of a clock that was wrong, count only
        where there is no other."""
        used_s = self._times_s.get(digest, since_s)
        return max((time_s for time_s in (used_s, since_s) if time_s <= now_s), default=max(used_s, since_s))

    def items(self) -> dict[Sha256, float]:
        """All of it, for keeping."""
        return dict(self._times_s)
