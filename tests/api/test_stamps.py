"""Times and durations as Go writes them."""

import math

import pytest

from meshmax.api.stamps import nanoseconds, rfc3339


@pytest.mark.parametrize(
    ("unix_s", "text"),
    [
        (1_761_498_924.097767, "2025-10-26T17:15:24.097767Z"),
        (1_761_498_924.17, "2025-10-26T17:15:24.17Z"),
        (1_761_498_924.0, "2025-10-26T17:15:24Z"),
        (1_761_498_920.0, "2025-10-26T17:15:20Z"),
        (0.0, "1970-01-01T00:00:00Z"),
        (-5.0, "1970-01-01T00:00:00Z"),
        (math.inf, "1970-01-01T00:00:00Z"),
        (1e300, "9999-12-31T23:59:59Z"),
    ],
)
def test_a_time_is_rfc_3339_in_utc_without_trailing_zeros(unix_s: float, text: str) -> None:
    assert rfc3339(unix_s) == text


@pytest.mark.parametrize(("duration_s", "expected"), [(1.5, 1_500_000_000), (0, 0), (-1, 0), (math.nan, 0)])
def test_a_duration_is_integer_nanoseconds(duration_s: float, expected: int) -> None:
    assert nanoseconds(duration_s) == expected
