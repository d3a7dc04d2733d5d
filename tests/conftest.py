"""What all tests share: hypothesis without time limits, the clock of their fixtures, and quiet logs."""

import os
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from trio.abc import Clock

from meshmax.telemetry import log

# A slow machine must not fail a test, so there are no deadlines. CI and scripts/test try the same examples each time, and the
# same turns of tasks (below): what only chance finds is for who works on it. A failing example is made small but not explained:
# that traces every line, so that a property of a long run seems to hang for minutes.
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)
QUIET = [HealthCheck.too_slow]  # which is measured in real time
settings.register_profile("local", deadline=None, max_examples=60, phases=PHASES, suppress_health_check=QUIET)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
ALIKE = bool(os.environ.get("CI") or os.environ.get("TESTS_SAME_EXAMPLES"))
settings.load_profile("ci" if ALIKE else "local")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and os.environ.get("TESTS_APART"):  # set by scripts/test
        from tests.apart import go_apart

        go_apart()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test on the clock that any of its fixtures asks for.

    By itself pytest-trio looks only among the arguments that the test names: where none of them is the clock, all that
    the fixtures made would run in real time, and slow machines would miss its deadlines. Where all runs are to be alike, tasks
    take their turns in the same order each time; trio sorts them first because hypothesis is imported.
    """
    if ALIKE:
        trio._core._run._r.seed(item.nodeid)
    for clock in {value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Clock)}:
        item.add_marker(pytest.mark.trio(run=partial(_run_on, clock)), append=False)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Give a skip in an async test or fixture its reason back: pytest-trio raises another one, without."""
    try:
        return (yield)
    except pytest.skip.Exception as skipped:
        group = skipped.__context__
        while isinstance(group, BaseExceptionGroup) and len(group.exceptions) == 1:
            group = group.exceptions[0]
        if isinstance(group, pytest.skip.Exception):
            skipped.msg = group.msg
        raise


def _run_on(asked: Clock, test: Callable[[], Awaitable[Any]], *, clock: Clock | None, **more: Any) -> Any:
    return trio.run(test, clock=clock or asked, **more)


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
