"""Messages of ``/meshmax/drain/1.0.0``: take yourself out of service, come back, how do you stand?

An asker says DrainAsk, UndrainAsk or StandAsk; the asked peer answers with how it stands then or a Failure, and the stream
ends. Each may be said again, with no other effect than to say it once. Decided here: bounds. Not here: who may
(services.guards, and that nobody may in the open mesh: services.drain_exchange), what follows (core.draining).
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from meshmax.base.drain import MAX_DEADLINE_S, DrainState, DrainView
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec

MAX_RUNNING: Final = 1_000_000  # answers; more is no count
_MAX_BODY_BYTES: Final = 4 * KIB  # a Failure has up to 2,000

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_S)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_RUNNING)]


class DrainAsk(msgspec.Struct, frozen=True, tag="drain"):
    """Asker: take no prompts any more; what runs may go on for ``deadline_s``."""

    deadline_s: _Seconds


class UndrainAsk(msgspec.Struct, frozen=True, tag="undrain"):
    """Asker: take prompts again."""


class StandAsk(msgspec.Struct, frozen=True, tag="stand"):
    """Asker: how do you stand?"""


class Standing(msgspec.Struct, frozen=True, tag="standing"):
    """Asked: fields as in base.drain.DrainView."""

    state: DrainState
    running: _Count
    left_s: _Seconds | None = None
    ended: _Count = 0


FromAsker: TypeAlias = DrainAsk | UndrainAsk | StandAsk
FromAsked: TypeAlias = Standing | Failure

FROM_ASKER: Final[Codec[FromAsker]] = Codec(FromAsker, _MAX_BODY_BYTES)
FROM_ASKED: Final[Codec[FromAsked]] = Codec(FromAsked, _MAX_BODY_BYTES)


def standing_of(view: DrainView) -> Standing:
    """``view`` as a message, within its bounds."""
    left_s = None if view.left_s is None else min(max(view.left_s, 0.0), MAX_DEADLINE_S)
    return Standing(view.state, min(view.running, MAX_RUNNING), left_s, min(view.ended, MAX_RUNNING))


def view_of(standing: Standing) -> DrainView:
    """What a peer says of itself."""
    return DrainView(standing.state, standing.running, standing.left_s, standing.ended)
