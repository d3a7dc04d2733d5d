"""The one place where ``except Exception`` stands: the boundary of a connection, a stream or a request.

A peer's failure, or a programming error that one request ran into, ends that request; it is logged and counted. The
errors of our tree are logged as one line, others with their traceback. Cancellation passes through. Strangers can make
us fail as often as they like, so a boundary logs at most LINES a window and then how many it kept to itself. That somebody
left is how connections end and no failure to a person: it is counted, and logged for who debugs. What is left of an error
afterwards has no frames any more: whoever kept it, as a session keeps why it ended, would keep itself and its buffers by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from meshmax.base.errors import MeshmaxError, without_frames
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import FAILURES

LINES: Final = 50  # logged for one boundary in one window; a person reads no more
WINDOW_S: Final = 10.0

_LEFT: Final = frozenset({"peer_gone", "connect"})
_log = get_logger("isolate")


class _Spigot:
    """How many lines may still be logged for one boundary."""

    def __init__(self) -> None:
        self._opened_s = -math.inf
        self._lines = self._kept = 0

    def open(self, what: str) -> bool:
        """Whether one more line may be logged now."""
        now_s = time.monotonic()
        if now_s - self._opened_s >= WINDOW_S:
            if self._kept:
                _log.warning("more failures than are logged", what=what, count=self._kept)
            self._opened_s, self._lines, self._kept = now_s, 0, 0
        self._lines += 1
        self._kept += self._lines > LINES
        return self._lines <= LINES


_spigots: Final[dict[str, _Spigot]] = {}  # by boundary, of which there are few


async def isolate(
    what: str,
    work: Callable[[], Awaitable[object]],
    failed: Callable[[Exception], None] | None = None,
    **context: Any,
) -> bool:
    """Run ``work``; True if it ended well. ``what`` names the boundary in log and metric: one of few words.

    ``failed`` is shown the error besides.
    """
    try:
        await work()
    except MeshmaxError as error:
        without_frames(error)
        if failed is not None:
            failed(error)
        _report(what, error.code, error, error.message, context)
    except Exception as error:
        if failed is not None:
            failed(error)
        if isinstance(error, BaseExceptionGroup) and _only_ours(error):
            _report(what, "group", error, str(error.exceptions[0])[:300], context)
        else:
            _report(what, "unexpected", error, "", context)
        without_frames(error)
    else:
        return True
    return False


def _report(what: str, code: str, error: Exception, text: str, context: dict[str, Any]) -> None:
    FAILURES.labels(what=what, code=code).inc()
    if code in _LEFT:
        _log.debug("failed", what=what, code=code, error=text, **context)
        return
    if not _spigots.setdefault(what, _Spigot()).open(what):
        return
    if code == "unexpected":
        _log.error("failed unexpectedly", what=what, exc_info=error, **context)
    else:
        _log.info("failed", what=what, code=code, error=text, **context)


def _only_ours(group: BaseExceptionGroup[BaseException]) -> bool:
    return all(
        _only_ours(error) if isinstance(error, BaseExceptionGroup) else isinstance(error, MeshmaxError)
        for error in group.exceptions
    )
