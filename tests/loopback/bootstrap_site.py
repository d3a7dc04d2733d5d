"""`meshmax bootstrap` as processes, for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from meshmax.testing.process import spawn, until


class Point:
    """One bootstrap node. ``listen``: HOST:PORT of its control port; ``settings``: MESHMAX_* variables, without the prefix."""

    def __init__(self, home: Path, *flags: str, listen: str = "127.0.0.1:0", **settings: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.log = home / "bootstrap.log"
        where = ("--listen", listen, "--api", "127.0.0.1:0")
        self.process = spawn(["bootstrap", "--home", str(home), *where, *flags], environment(**settings), self.log)

    @property
    def facts(self) -> dict[str, Any]:
        """What /health says, once it is up."""
        return until("the bootstrap node is up", self._facts)

    @property
    def address(self) -> str:
        """Where peers meet, once it is up."""
        return str(self.facts["addresses"][0])

    @property
    def api(self) -> str:
        """Where /health and /metrics are."""
        return str(json.loads((self.home / "run.json").read_text())["api"]).rstrip("/")

    def _facts(self) -> dict[str, Any]:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        if not (self.home / "run.json").exists():
            return {}
        return dict(httpx.get(self.api + "/health", timeout=60, trust_env=False).json())

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(60)


def environment(**settings: str) -> dict[str, str]:
    """Of a bootstrap node in a test: ports that collide with nobody's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHMAX_")}
    given = {f"MESHMAX_{key.upper()}": value for key, value in settings.items()}
    return kept | {"MESHMAX_OBSERVER_PORT": "0"} | given


@contextmanager
def points(folder: Path, *names: str) -> Iterator[list[Point]]:
    """Bootstrap nodes of these names, killed at the end of the block."""
    started: list[Point] = []
    try:
        started.extend(Point(folder / name) for name in names)
        yield started
    finally:
        for point in started:
            point.kill()
