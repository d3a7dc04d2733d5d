"""What this machine and this process use now: CPU, memory, disk. Readings are cheap and never block."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import psutil

CPU_WINDOW_S: Final = 1.0  # two readings closer than that would measure noise


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
        self._cpu_percent = 0.0
        self._cpu_read_at = float("-inf")
        psutil.cpu_percent(None)  # the first call only starts the measurement

    def read(self, now: float) -> Reading:
        """The machine at ``now`` (monotonic seconds)."""
        if now - self._cpu_read_at >= CPU_WINDOW_S:
            self._cpu_percent, self._cpu_read_at = psutil.cpu_percent(None), now
        memory = psutil.virtual_memory()
        return Reading(
            self._cpu_percent,
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
