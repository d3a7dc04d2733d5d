"""What the residency asks of engines that bring their models along; `NothingBrought` where there are none.

Such models are in memory that is not ours to fill: their server loads and unloads them. Not here: those engines
(services.backends, which satisfies `Brought`), queues for their models (services.residency).
"""

from __future__ import annotations

from typing import Protocol

import trio

from meshmax.base.catalog import LoadedView
from meshmax.base.ids import Sha256


class Brought(Protocol):
    """The models that engines bring along (services.backends)."""

    def brings(self, digest: Sha256) -> bool:
        """Whether such an engine runs this model here."""
        ...

    def loaded(self) -> tuple[LoadedView, ...]:
        """What they have in memory."""
        ...

    def parallel(self) -> int:
        """How much they answer at once."""
        ...

    def look_at(self, digest: Sha256) -> None:
        """Something has happened to one there: see soon how its engine stands."""
        ...

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """Load and keep one so long, or unload it (0). Raises ModelNotFound, EngineError, InvalidRequest (it cannot)."""
        ...


class NothingBrought:
    """There are no such engines."""

    def brings(self, digest: Sha256) -> bool:
        """No."""
        return False

    def loaded(self) -> tuple[LoadedView, ...]:
        """Nothing."""
        return ()

    def parallel(self) -> int:
        """Nothing."""
        return 0

    def look_at(self, digest: Sha256) -> None:
        """Nothing to do."""

    async def keep(self, digest: Sha256, keep_alive_s: float | None) -> None:
        """Nothing to do."""
        await trio.lowlevel.checkpoint()
