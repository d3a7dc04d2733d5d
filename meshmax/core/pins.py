"""Pins: names whose model is kept, and which go on meaning that very model.

Rules: a pin ties a name to a digest. While it stands, no sweep takes the model (under whatever name it is here), nothing
lets the name mean another model, and nobody deletes the name; unpinning comes first. A model that is not here can be
pinned, too: its name then means this digest alone. Not here: files (store.pins_file), sweeping (core.sweep).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshmax.base.errors import InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.names import ModelName

MAX_PINS: Final = 4096  # names; a person pins dozens


class Pins:
    """What is pinned: a name's key -> digest."""

    __slots__ = ("_digests", "_kept")

    def __init__(self, digests: Mapping[str, Sha256] | None = None) -> None:
        self._digests = dict(digests or {})
        self._kept = frozenset(self._digests.values())  # looked up for every model of every list

    def pin(self, name: ModelName, digest: Sha256) -> None:
        """Tie ``name`` to ``digest``; again is no error. Raises InvalidRequest (another digest is pinned, too many)."""
        self.require_free(name, digest)
        if name.key not in self._digests and len(self._digests) >= MAX_PINS:
            raise InvalidRequest(f"{MAX_PINS} names are pinned already: unpin one first")
        self._digests[name.key] = digest
        self._kept = frozenset(self._digests.values())

    def unpin(self, name: ModelName) -> bool:
        """Let go of ``name``; whether it was pinned."""
        was_pinned = self._digests.pop(name.key, None) is not None
        self._kept = frozenset(self._digests.values())
        return was_pinned

    def of(self, key: str) -> Sha256 | None:
        """The digest that the name with ``key`` is tied to, or None."""
        return self._digests.get(key)

    def keeps(self, digest: Sha256) -> bool:
        """Whether a name is tied to ``digest``."""
        return digest in self._kept

    def require_free(self, name: ModelName, digest: Sha256 | None) -> None:
        """Raise InvalidRequest if ``name`` is pinned and is to mean ``digest``, which is another one, or nothing (None)."""
        pinned = self._digests.get(name.key)
        if pinned is None or pinned == digest:
            return
        if digest is None:
            raise InvalidRequest(f"'{name}' is pinned: `meshmax unpin {name}` first")
        raise InvalidRequest(f"'{name}' is pinned to model {pinned[:12]}: `meshmax unpin {name}` first")

    def items(self) -> dict[str, Sha256]:
        """All of it, for keeping."""
        return dict(self._digests)
