"""What to sweep: which models and partials go when there must be room, in which order, and why each other one stays.

Rules. Partials that nobody wants and nobody touched for long go first, whether or not there is need. Then, as long as there
is need, models, the one used longest ago first: never one that is kept (pinned, in use), never one of which nobody else
in the mesh has a whole copy, unless that is allowed; and then only when everything else has gone. That somebody else has
one must be confirmed for each model before it goes (services.leases); who sweeps reports that with `refuse` or `gone`.
A blob is freed when the last model that names it goes; a model whose going would free nothing stays.

Sizes are bytes, times Unix seconds. Not here: who holds what, files, leases.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

import msgspec

from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.units import parse_bytes

ENOUGH: Final = "there is room"
ALONE: Final = "no other peer that is online has it whole"
SHARED: Final = "it would free nothing: its data is shared with models that stay, or with other programs"
YOUNG: Final = "it was touched not long enough ago"


class Budget(msgspec.Struct, frozen=True):
    """How much models may take (None: no bound) and how much of the disk stays free, in bytes."""

    limit_bytes: int | None = None
    keep_free_bytes: int = 0

    @property
    def is_set(self) -> bool:
        """Whether there is one; else models go by command alone."""
        return self.limit_bytes is not None or self.keep_free_bytes > 0

    def excess(self, used_bytes: int, free_bytes: int, coming_bytes: int = 0) -> int:
        """How many bytes must go, with ``coming_bytes`` still to be written; 0 if none."""
        if not self.is_set:
            return 0
        over = used_bytes + coming_bytes - self.limit_bytes if self.limit_bytes is not None else 0
        return max(over, self.keep_free_bytes + coming_bytes - free_bytes, 0)


def parse_budget(disk_budget: str, keep_free: str) -> Budget:
    """The budget that the configuration's texts mean. Raises ConfigError that names the key."""
    limit_bytes = _size("disk_budget", disk_budget)
    return Budget(limit_bytes or None, _size("keep_free", keep_free))


def _size(key: str, text: str) -> int:
    try:
        return parse_bytes(text) if text.strip() else 0
    except InvalidRequest as error:
        raise ConfigError(f"{key}: {error.message}; '' is none") from None


class Copy(msgspec.Struct, frozen=True):
    """A model that is whole here. ``blobs``: what each one frees when it goes; ``kept``: why the model must stay, or ''.

    ``holders``: how many other peers that are online say that they have it whole.
    """

    digest: Sha256
    names: tuple[str, ...]
    size: int
    blobs: tuple[tuple[Sha256, int], ...]
    last_use_s: float
    kept: str = ""
    holders: int = 0


class PartialCopy(msgspec.Struct, frozen=True):
    """A partial on disk. ``kept``: who needs it, or ''."""

    digest: Sha256
    size: int
    touched_s: float
    kept: str = ""


Candidate: TypeAlias = Copy | PartialCopy


class Verdict(msgspec.Struct, frozen=True):
    """What becomes of one model or partial, and why. ``frees``: bytes that went with it, 0 if it stays."""

    candidate: Candidate
    action: Literal["goes", "stays"]
    reason: str
    frees: int = 0


class Sweep:
    """One sweep: `next` names a candidate, whose fate is told with `gone` or `refuse`, until there is none."""

    __slots__ = (
        "_copies",
        "_freed",
        "_last_copies",
        "_need",
        "_now_s",
        "_partials",
        "_stays",
        "_verdicts",
        "_young_s",
    )

    def __init__(
        self,
        copies: Iterable[Copy],
        partials: Iterable[PartialCopy],
        need_bytes: int,
        now_s: float,
        partials_kept_s: float,
        *,
        last_copies: bool = False,
    ) -> None:
        """``partials_kept_s``: how long a partial that nobody wants stays; ``last_copies``: they may go, too."""
        self._need = need_bytes
        self._now_s = now_s
        self._young_s = partials_kept_s
        self._last_copies = last_copies
        self._freed = 0
        self._verdicts: list[Verdict] = []
        self._partials = sorted(partials, key=lambda one: (one.touched_s, one.digest))
        self._copies = sorted(copies, key=lambda one: (one.last_use_s, one.digest))
        self._stays: dict[Sha256, str] = {copy.digest: copy.kept for copy in self._copies if copy.kept}

    @property
    def lacking(self) -> int:
        """Bytes that must still go."""
        return max(self._need - self._freed, 0)

    @property
    def freed(self) -> int:
        """Bytes that went."""
        return self._freed

    def next(self) -> tuple[Candidate, bool] | None:
        """What is to go now, and whether another copy of it must be confirmed first; None: it is done.

        The same one again until its fate is told.
        """
        for partial in self._partials:
            if not partial.kept and self._now_s - partial.touched_s >= self._young_s:
                return partial, False
        if not self.lacking:
            return None
        if (copy := self._oldest(last=False)) is not None:
            return copy, True
        copy = self._oldest(last=True) if self._last_copies else None
        return (copy, copy.digest not in self._stays and copy.holders > 0) if copy is not None else None

    def gone(self, candidate: Candidate) -> int:
        """It has been removed: how many bytes that freed."""
        frees = self._drop(candidate)
        self._freed += frees
        reason = "nobody wants it" if isinstance(candidate, PartialCopy) else "used longest ago"
        self._verdicts.append(Verdict(candidate, "goes", reason, frees))
        return frees

    def refuse(self, candidate: Candidate, reason: str, *, for_good: bool = False) -> None:
        """It stays, for ``reason``; ``for_good``: even where last copies may go."""
        if isinstance(candidate, PartialCopy):
            self._partials.remove(candidate)
            self._verdicts.append(Verdict(candidate, "stays", reason))
            return
        self._stays[candidate.digest] = reason
        if for_good:
            self._copies[self._copies.index(candidate)] = msgspec.structs.replace(candidate, kept=reason)

    def verdicts(self) -> tuple[Verdict, ...]:
        """What went, in order, then what stays, what was used longest ago first."""
        staying = self._staying(last=True)
        copies = [Verdict(copy, "stays", self._why(copy, staying)) for copy in self._copies]
        partials = [Verdict(partial, "stays", partial.kept or YOUNG) for partial in self._partials]
        return (*self._verdicts, *copies, *partials)

    def _why(self, copy: Copy, staying: set[Sha256]) -> str:
        if copy.kept:
            return copy.kept
        if copy.digest in self._stays and self.lacking:
            return self._stays[copy.digest]
        if not self.lacking:
            return ENOUGH
        return ALONE if _gain(copy, staying) else SHARED

    def _drop(self, candidate: Candidate) -> int:
        if isinstance(candidate, PartialCopy):
            self._partials.remove(candidate)
            return candidate.size
        self._copies.remove(candidate)
        left = {digest for copy in self._copies for digest, _ in copy.blobs}
        return sum(size for digest, size in dict(candidate.blobs).items() if digest not in left)

    def _oldest(self, *, last: bool) -> Copy | None:
        """The copy used longest ago that may go and whose going can free something; ``last``: last copies may."""
        staying = self._staying(last=last)
        return next((copy for copy in self._copies if not self._must_stay(copy, last) and _gain(copy, staying)), None)

    def _staying(self, *, last: bool) -> set[Sha256]:
        """The blobs of copies that must stay."""
        return {digest for copy in self._copies if self._must_stay(copy, last) for digest, _ in copy.blobs}

    def _must_stay(self, copy: Copy, last: bool) -> bool:
        return bool(copy.kept) or (not last and (copy.digest in self._stays or not copy.holders))


def _gain(copy: Copy, staying: set[Sha256]) -> int:
    """What its going can free, now or together with others that may go."""
    return sum(size for digest, size in dict(copy.blobs).items() if digest not in staying)
