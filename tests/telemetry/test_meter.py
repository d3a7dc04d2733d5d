"""Readings of this machine."""

from pathlib import Path

from meshmax.telemetry.meter import WINDOW_S, Meter


def test_a_reading_is_plausible_and_made_no_more_often_than_the_cpu_can_be_measured(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    first = meter.read(0.0)
    assert meter.read(WINDOW_S - 0.1) is first
    assert meter.read(WINDOW_S) is not first
    assert 0 <= first.cpu_percent <= 100
    assert 0 < first.memory_bytes < first.memory_total_bytes
    assert first.disk_free_bytes > 0
    assert first.process_bytes > 0


def test_a_folder_that_has_vanished_ends_nothing(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "unmounted")
    assert meter.read(0.0).disk_free_bytes == 0
