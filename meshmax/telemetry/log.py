"""Structured logs: structlog to standard error, one event a line, for people or as JSON.

Every line may carry ``peer`` and ``request_id`` (bound by contextvars where the work begins). Secrets, prompts and
answers are never logged: values under the keys in SECRET_KEYS are replaced, whoever passes them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

SECRET_KEYS: Final = frozenset(
    {"token", "secret", "key", "private_key", "api_key", "authorization", "prompt", "content"}
)


def configure(level: str, json_lines: bool) -> None:
    """Set the process's logging up: ``level`` is debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: Any = (
        structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _hide_secrets,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_to_stderr,
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> Any:
    """The logger of a module, ``name`` its last part."""
    return structlog.get_logger(component=name)


def _to_stderr(*_names: Any) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)  # looked up each time: whoever replaced it meant to


def _hide_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in event.keys() & SECRET_KEYS:
        event[key] = "***"
    return event
