"""What all tests share: hypothesis without time limits, and quiet logs."""

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from meshmax.telemetry import log

# A slow machine must not fail a test, so there are no deadlines; CI tries the same examples each time. A failing example is
# made small but not explained: that traces every line, so that a property of a long run seems to hang for minutes.
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)
settings.register_profile("local", deadline=None, max_examples=60, phases=PHASES)
settings.register_profile("ci", deadline=None, max_examples=60, phases=PHASES, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and os.environ.get("TESTS_APART"):  # set by scripts/test
        from tests.apart import go_apart

        go_apart()


@pytest.fixture(autouse=True, scope="session")
def quiet_logs() -> None:
    """Errors only: a test asserts on behaviour, and a failing one prints what was logged."""
    log.configure("error", json_lines=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MESHMAX_HOME for one test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MESHMAX_HOME", str(folder))
    return folder
