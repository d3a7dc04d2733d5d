"""An error on its way to a peer: its code and sentence, never a traceback or a path of ours."""

from __future__ import annotations

from typing import Final

import msgspec

from meshmax.base.errors import Busy, Draining, MeshmaxError, error_for

MAX_MESSAGE: Final = 500  # characters
MAX_RETRY_AFTER_S: Final = 3600.0  # who asks for more means "go away"; the next hour may be another


class Failure(msgspec.Struct, frozen=True, omit_defaults=True, tag="failure"):
    """``code`` is a MeshmaxError's; ``retry_after_s`` only with "busy" and "draining", ``stopping`` only with the latter."""

    code: str
    message: str
    retry_after_s: float | None = None
    stopping: bool = False  # the peer ends; peers from before this field are taken to be drained


def failure_of(error: MeshmaxError) -> Failure:
    """``error`` as a message."""
    retry_after_s = error.retry_after_s if isinstance(error, Busy) else None
    return Failure(
        error.code, error.message[:MAX_MESSAGE], retry_after_s, isinstance(error, Draining) and error.stopping
    )


def error_of(failure: Failure) -> MeshmaxError:
    """The error that a peer's ``failure`` stands for, its text cut to MAX_MESSAGE printable characters."""
    text = "".join(c if c.isprintable() else " " for c in failure.message[:MAX_MESSAGE])
    retry_after_s = failure.retry_after_s
    if retry_after_s is not None:
        retry_after_s = min(retry_after_s, MAX_RETRY_AFTER_S) if retry_after_s >= 0 else None  # also what is no number
    error = error_for(failure.code, text, retry_after_s)
    if isinstance(error, Draining):
        error.stopping = failure.stopping
    return error
