"""Units and how people write them: bytes (decimal, as Ollama prints them) and Go durations (as Ollama reads them).

Sizes inside the program are integers of bytes, times floats of seconds; names end in their unit. Not here: clocks.
"""

from __future__ import annotations

import re
from typing import Final

from meshmax.base.errors import InvalidRequest

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
NS_PER_S: Final = 1_000_000_000

_DURATION_UNITS_S: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_MAX_DURATION_TEXT: Final = 64  # characters; a Go duration needs far fewer, and longer input is no duration


def format_bytes(size_bytes: int) -> str:
    """``size_bytes`` as Ollama prints it: decimal units, whole from 10 up, else one decimal (``4.7 GB``, ``13 GB``)."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size_bytes >= factor:
            value = size_bytes / factor
            if value >= 10 or value == int(value):
                return f"{int(value)} {unit}"
            return f"{value:.1f} {unit}"
    return f"{size_bytes} B"


def parse_duration_s(text: str) -> float:
    """Seconds in a Go duration (``5m``, ``1h30m``, ``-1s``, ``0``). Raises InvalidRequest that says what is accepted."""
    body = text[1:] if text[:1] in "+-" else text
    if body == "0":
        return 0.0
    parts = _DURATION_PART.findall(body) if len(body) <= _MAX_DURATION_TEXT else []
    if not parts or "".join(number + unit for number, unit in parts) != body:
        raise InvalidRequest(
            f'time: invalid duration "{text[:_MAX_DURATION_TEXT]}": write it like "5m", "1h30m" or "90s"'
        )
    total_s = sum(float(number) * _DURATION_UNITS_S[unit] for number, unit in parts)
    return -total_s if text.startswith("-") else total_s
