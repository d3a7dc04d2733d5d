"""What an error of one peer means for the request: ask another, ask the same one again, or give up.

Rules: what an error's class says of itself (base.errors.Retry) holds, but for a disk's failure and a word that we do not
know, which are that one peer's; an answer has no side effect, so asking again is safe. The same peer is asked again only for
what passes: it went away, its engine crashed (and is started anew), it was full. Pure. Not here: when (core.delivery).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ConnectError,
    Draining,
    EngineCrashed,
    MeshmaxError,
    PeerGone,
    Retry,
    StoreError,
)
from meshmax.core.refusal import went_away

NOBODY_ELSE: Final = ", and no other peer could carry it on"  # an answer that broke off
_PASSING = (PeerGone, ConnectError, EngineCrashed, Busy)


def is_final(error: MeshmaxError, ours: bool) -> bool:
    """Whether asking another peer cannot help. ``ours``: we said it ourselves."""
    if error.retry is not Retry.NEVER or isinstance(error, StoreError):
        return False
    return ours or type(error) is not MeshmaxError


def passes(error: MeshmaxError, *, middle: bool = False) -> bool:
    """Whether the same peer may answer a moment later. ``middle``: of an answer, which also waits for who was drained or
    stopped to be undrained or back: nobody may be asked anew for what is half said."""
    return isinstance(error, _PASSING) and (middle or not isinstance(error, Draining))


def most_telling(errors: Sequence[MeshmaxError], *, middle: bool = False) -> MeshmaxError:
    """What to tell of ``errors``, in their order: the last that is no Busy, else the Busy with the shortest wait.

    Where the last went away, or could not be reached, another try may help, and that is told.
    ``middle``: of an answer; then what broke it off counts more than who could not be reached afterwards.
    """
    if not errors:
        return PeerGone()
    if middle:
        told = next((e for e in reversed(errors) if not isinstance(e, _PASSING)), errors[0])
        if (
            isinstance(told, CapabilityMissing) and told is not errors[0]
        ):  # who was asked to go on; what broke off says more
            return type(errors[0])(f"{errors[0].message}; {told.message}")
        if isinstance(told, Draining):
            return Draining(f"{told.message}{NOBODY_ELSE}", told.retry_after_s, stopping=told.stopping)
        return PeerGone(f"{told.message}{NOBODY_ELSE}") if type(told) is PeerGone else told
    others = [error for error in errors if not isinstance(error, Busy)]
    if others and isinstance(others[-1], PeerGone | ConnectError):
        gone = [error for error in others if isinstance(error, PeerGone | ConnectError)]
        return went_away(gone, alone=len(gone) == len(errors))
    if others:
        return others[-1]
    return min((e for e in errors if isinstance(e, Busy)), key=lambda e: e.retry_after_s)
