"""The one place where ``except Exception`` stands: the boundary of a connection, a stream or a request.

A peer's failure, or a programming error that one request ran into, ends that request; it is logged and counted. The
errors of our tree are logged as one line, others with their traceback. Cancellation passes through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from meshmax.base.errors import MeshmaxError
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import FAILURES

_log = get_logger("isolate")


async def isolate(what: str, work: Callable[[], Awaitable[object]], **context: Any) -> bool:
    """Run ``work``; True if it ended well. ``what`` names the boundary in log and metric."""
    try:
        await work()
    except MeshmaxError as error:
        FAILURES.labels(what=what, code=error.code).inc()
        _log.info("failed", what=what, code=error.code, error=error.message, **context)
    except Exception as error:
        if isinstance(error, BaseExceptionGroup) and _only_ours(error):
            FAILURES.labels(what=what, code="group").inc()
            _log.info("failed", what=what, code="group", error=str(error.exceptions[0])[:300], **context)
        else:
            FAILURES.labels(what=what, code="unexpected").inc()
            _log.error("failed unexpectedly", what=what, exc_info=error, **context)
    else:
        return True
    return False


def _only_ours(group: BaseExceptionGroup[BaseException]) -> bool:
    return all(
        _only_ours(error) if isinstance(error, BaseExceptionGroup) else isinstance(error, MeshmaxError)
        for error in group.exceptions
    )
