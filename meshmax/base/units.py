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
MIN_RATE_BYTES_PER_S: Final = 10_000  # a slower transfer is silence to the other side
_SPAN_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN: Final = re.compile(r"(\d{1,9})([smhdw])")
_BYTE_UNITS: Final = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
}  # fmt: skip
_BYTES: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([kmgt]?i?b|)", re.IGNORECASE)
_MAX_BYTES_TEXT: Final = 32  # characters
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


def parse_bytes(text: str) -> int:
    """Bytes in ``text``: a whole number, or one with KB, MB, GB, TB (decimal) or KiB, MiB, GiB, TiB. Raises InvalidRequest."""
    match = _BYTES.fullmatch(text.strip()) if len(text) <= _MAX_BYTES_TEXT else None
    if match is None:
        raise InvalidRequest(f"'{text[:_MAX_BYTES_TEXT]}' is no size: write it like 500MB, 4GB or 2GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def parse_rate(text: str) -> int:
    """Bytes a second in ``text`` (``10MB/s``, ``800KB``); 0 for ``off``, ``none``, ``0`` and ''. Raises InvalidRequest."""
    body = text.strip().lower().removesuffix("/s")
    if body in ("", "off", "none", "unlimited", "0"):
        return 0
    try:
        rate = parse_bytes(body)
    except InvalidRequest:
        rate = 0
    if rate < MIN_RATE_BYTES_PER_S:
        raise InvalidRequest(f"'{text[:_MAX_BYTES_TEXT]}' is no rate: write it like 10MB/s (10KB/s at least), or off")
    return rate


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


def parse_span_s(text: str) -> int:
    """Seconds in a length of time of one unit (``30m``, ``12h``, ``7d``, ``2w``), above zero. Raises InvalidRequest."""
    match = _SPAN.fullmatch(text.strip().lower()) if len(text) <= _MAX_DURATION_TEXT else None
    if match is None or not int(match[1]):
        raise InvalidRequest(
            f"'{text[:_MAX_DURATION_TEXT]}' is no length of time: write it like 90s, 30m, 12h, 7d or 2w"
        )
    return int(match[1]) * _SPAN_UNITS_S[match[2]]


def format_span(seconds: float) -> str:
    """``seconds`` as people say it roughly: ``40 s``, ``12 min``, ``3 h``, ``2 days``."""
    for factor, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= (1.95 if unit == "days" else 0.95) * factor:
            return f"{round(seconds / factor)} {unit}"
    return f"{max(0, round(seconds))} s"
