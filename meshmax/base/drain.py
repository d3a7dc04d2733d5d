"""How a peer that is being taken out of service stands: draining (answers still run) or drained (none does)."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

MAX_DEADLINE_S: Final = 86400.0  # a day; who waits longer wants the peer to go on serving
DEADLINE_S: Final = 300.0  # where none is said: most answers have ended by then

DrainState = Literal["running", "draining", "drained"]


class DrainView(msgspec.Struct, frozen=True):
    """``running``: answers that still run on the peer's engines. ``left_s``: until they are ended, None while not draining.

    ``ended``: how many the deadline has ended, to be carried on by other peers.
    """

    state: DrainState = "running"
    running: int = 0
    left_s: float | None = None
    ended: int = 0
