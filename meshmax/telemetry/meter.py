"""What this machine and this process use now, or did up to WINDOW_S ago: CPU, memory, disk. Readings never block."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import psutil

WINDOW_S: Final = 1.0  # two readings of the CPU closer than that measure noise, and a look takes half a millisecond


class Reading(msgspec.Struct, frozen=True):
    """One reading. ``cpu_percent`` is of the whole machine, 0 to 100; the rest bytes; ``process_bytes`` our resident set."""

    cpu_percent: float
    memory_bytes: int
    memory_total_bytes: int
    disk_free_bytes: int
    process_bytes: int


class Meter:
    """Reads the machine; ``folder`` is where the store is, whose disk counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._last: Reading | None = None
        self._read_at = float("-inf")
        psutil.cpu_percent(None)  # the first call only starts the measurement

    def read(self, now: float) -> Reading:
        """The machine at ``now`` (monotonic seconds), or WINDOW_S before."""
        if self._last is None or now - self._read_at >= WINDOW_S:
            self._last, self._read_at = self._look(), now
        return self._last

    def _look(self) -> Reading:
        memory = psutil.virtual_memory()
        return Reading(
            psutil.cpu_percent(None),
            memory.total - memory.available,
            memory.total,
            self._disk_free_bytes(),
            self._process.memory_info().rss,
        )

    def _disk_free_bytes(self) -> int:
        try:
            return psutil.disk_usage(str(self._folder)).free
        except (
            OSError
        ):  # unmounted or removed under us: the store says so where it matters, a figure need not end the node
            return 0
