"""`scripts/demo` as a newcomer runs it, after the installation."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.loopback

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo"
WITHIN_S = 300.0  # the script promises two minutes on two cores; they may be slow, and busy with other tests


def start(tmp_path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "MESHMAX_DEMO_READY": "1", "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(DEMO)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def left_running(output: str) -> list[str]:
    """The peers' addresses that still answer with the PeerId that they had."""
    alive = []
    for peer_id, url in re.findall(r"^   [ABC]  (\S+)  (\S+)", output, re.MULTILINE):
        try:
            if httpx.get(url + "/api/v1/status", timeout=60, trust_env=False).json()["node_id"] == peer_id:
                alive.append(url)
        except (httpx.HTTPError, ValueError, KeyError):
            continue
    return alive


def test_the_demo_shows_a_mesh_an_answer_and_who_gave_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    began_s = time.monotonic()
    demo = start(tmp_path)
    output, _ = demo.communicate(timeout=WITHIN_S)
    assert demo.returncode == 0, output
    assert time.monotonic() - began_s < WITHIN_S
    assert "== what happened" in output
    assert len(re.findall(r"^   answered by \w+.*: .*est ", output, re.MULTILINE)) == 2, output
    assert re.search(r"^   98 MB from A in [\d.]+ s, every chunk verified", output, re.MULTILINE), output
    assert left_running(output) == []
    assert list(tmp_path.iterdir()) == []


def test_the_demo_ended_by_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = start(tmp_path)
    assert demo.stdout is not None
    seen = ""
    for line in demo.stdout:
        seen += line
        if line.startswith("== 2."):
            break
    demo.send_signal(signal.SIGINT)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, rest
    assert "Traceback" not in rest
    assert left_running(seen) == []
    assert list(tmp_path.iterdir()) == []
