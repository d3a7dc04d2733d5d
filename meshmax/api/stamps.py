"""Times and durations as Go writes them in JSON: RFC 3339 with up to nine decimals and a Z, and integer nanoseconds."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Final

from meshmax.base.units import NS_PER_S

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_S: Final = 253402300799  # the end of year 9999, beyond which RFC 3339 has no form


def rfc3339(unix_s: float) -> str:
    """``unix_s`` as RFC 3339 in UTC, to the microsecond (a Unix time in a float holds no more), trailing zeros cut."""
    bounded = min(max(unix_s, 0.0), _LAST_S) if math.isfinite(unix_s) else 0.0
    moment = _EPOCH + timedelta(microseconds=round(bounded * 1_000_000))
    whole = moment.strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{moment.microsecond:06d}".rstrip("0").rstrip(".") + "Z"


def nanoseconds(duration_s: float) -> int:
    """``duration_s`` as integer nanoseconds; 0 for what is not finite or negative."""
    return round(duration_s * NS_PER_S) if math.isfinite(duration_s) and duration_s > 0 else 0
