"""Messages of ``/meshmax/pull/1.0.0``: pull this model for as long as I wait for it.

The asker says PullAsk and leaves its side open; the asked peer says Pulling at once and then every few seconds, at the end
Pulled or a Failure, and ends the stream. Whoever ends or loses the stream before that waits no more. Decided here: bounds.
Not here: who may ask (services.guards), what follows (services.pull_server, services.shared_pulls).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from meshmax.base.names import MAX_NAME
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec

MAX_MODEL_BYTES: Final = 1 << 50  # a petabyte; more is no size
MAX_REASON: Final = 300  # characters
_MAX_BODY_BYTES: Final = 4 * KIB  # a Failure has up to 2,000

_Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_MODEL_BYTES)]


class PullAsk(msgspec.Struct, frozen=True, tag="pull"):
    """Asker: pull the model whose manifest has this ``digest``, and call it ``name``, until I am gone."""

    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]


class Pulling(msgspec.Struct, frozen=True, tag="pulling"):
    """Asked: how far it is. ``bytes_total`` 0: not known yet; ``reason``: what it waits for."""

    state: Literal["running", "waiting", "paused"]
    bytes_done: _Bytes = 0
    bytes_total: _Bytes = 0
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)] = ""


class Pulled(msgspec.Struct, frozen=True, tag="pulled"):
    """Asked: the model is here, whole."""


FromAsker: TypeAlias = PullAsk
FromAsked: TypeAlias = Pulling | Pulled | Failure

FROM_ASKER: Final[Codec[FromAsker]] = Codec(PullAsk, _MAX_BODY_BYTES)
FROM_ASKED: Final[Codec[FromAsked]] = Codec(FromAsked, _MAX_BODY_BYTES)
