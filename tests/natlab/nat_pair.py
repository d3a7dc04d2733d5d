"""What a pair of peers behind NATs is measured by: connected how, how soon, how far apart, how fast; and what is expected of it.

Seconds are those that the peers measure themselves, from the first try to connect (`connect_ms` and `direct_ms` of
`/api/v1/nodes`); `met_s` counts from the moment when both APIs answer, with finding each other at a bootstrap node. Not here: the
places (nat_site), what a table looks like (scripts/bench_nat).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from meshmax.testing.process import until
from tests.natlab.nat_site import NatSite, Place
from tests.natlab.site import Site

MODEL: Final = "big"
PROMPT: Final = "we meet behind our routers"
MEET_S: Final = 60.0  # until a pair that is not connected counts as such
PULL_S: Final = 90.0
DIRECT_S: Final = 40.0  # the same for a direct path
DIRECT: Final = ("direct", "mapped", "punched-tcp", "punched-udp")


@dataclass
class Pair:
    """One pair; 0 or '' for what did not happen. ``back`` is as the second peer sees the first one."""

    left: Place
    right: Place
    path: str = ""
    back: str = ""
    via: str = ""
    met_s: float = 0.0
    usable_s: float = 0.0
    direct_s: float = 0.0
    rtt_ms: float = 0.0
    answered_by: str = ""
    route: str = ""
    pulled_mb_per_s: float = 0.0
    pull_problem: str = ""


def possible_directly(left: Place, right: Place) -> bool:
    """Whether a direct path is there to be found, by TCP or UDP."""
    pair = {left, right}
    if "corp" in pair:
        return False  # everything but web traffic is dropped on its way out, and peers listen elsewhere
    if "public" in pair:
        return True
    # From where a symmetric one will come is not known before: the other side must let in who was not asked from that port.
    return "sym" not in pair or bool(pair & {"full", "addr"})


def measure(site: NatSite, left: Place, right: Place, model: Path | None = None, small: Path | None = None) -> Pair:
    """Start such a pair and look. ``model``: what the first one pulls of the second; ``small``: what a relayed pair pulls.

    Without ``model`` nothing is pulled.
    """
    pair = Pair(left, right)
    one, two = site.pair(left, right)
    began_s = time.monotonic()
    try:
        site.until_met(one, two, within_s=MEET_S)
    except AssertionError:
        return pair
    pair.met_s = time.monotonic() - began_s
    _await_direct(site, one, two, DIRECT_S if possible_directly(left, right) else 0.0)
    _ask(site, pair, one, two)
    if model is not None:
        _look(site, pair, one, two)
        chosen = model if pair.path in DIRECT else small
        if chosen is not None:
            _pull(site, pair, one, two, chosen)
    _look(site, pair, one, two)
    return pair


def _await_direct(site: NatSite, one: str, two: str, within_s: float) -> None:
    try:
        site.until_path(one, two, *DIRECT, within_s=within_s)
        site.until_path(two, one, *DIRECT, within_s=20.0)
    except AssertionError:
        return  # the table shows it


def _look(site: NatSite, pair: Pair, one: str, two: str) -> None:
    here, there = site.node(one, two), site.node(two, one)
    pair.path, pair.back = str(here.get("path", "")), str(there.get("path", ""))
    pair.via = str(here.get("path_via") or there.get("path_via") or "")
    pair.rtt_ms = float(here.get("rtt_ms") or 0.0)
    pair.usable_s = _least(here, there, "connect_ms")
    pair.direct_s = _least(here, there, "direct_ms") if pair.path in DIRECT else 0.0


def _least(here: dict[str, Any], there: dict[str, Any], key: str) -> float:
    """Either may have led."""
    return min((float(node[key]) / 1000 for node in (here, there) if node.get(key)), default=0.0)


def _ask(site: NatSite, pair: Pair, one: str, two: str) -> None:
    """A prompt that only the other one can answer."""
    give_model(site, two, "tiny", site.folder / "tiny.gguf")
    until(f"{one} hears of the model", lambda: lists(site, one, "tiny"))
    reply = site.call(
        one, "POST", "/api/generate", {"model": "tiny", "prompt": PROMPT, "stream": False}, timeout_s=60.0
    )
    assert reply.json()["response"].strip() == PROMPT, reply.text
    pair.answered_by = reply.headers["X-Meshmax-Peer"]
    pair.route = reply.headers["X-Meshmax-Route"]


def _pull(site: NatSite, pair: Pair, one: str, two: str, model: Path) -> None:
    give_model(site, two, MODEL, model)
    until(f"{one} hears of the model", lambda: lists(site, one, MODEL))
    began_s = time.monotonic()
    try:
        reply = site.call(one, "POST", "/api/pull", {"model": MODEL, "stream": False}, timeout_s=PULL_S)
    except httpx.HTTPError as error:
        pair.pull_problem = f"{type(error).__name__}: {error}"
        return
    if reply.json().get("status") != "success":
        pair.pull_problem = reply.text[:300]
        return
    pair.pulled_mb_per_s = model.stat().st_size / (time.monotonic() - began_s) / 1e6


def give_model(site: Site, name: str, model: str, path: Path) -> None:
    """Let the peer have the file under that name."""
    body = {"name": model, "path": str(path), "link": True}
    reply = site.call(name, "POST", "/api/v1/models/add", body, timeout_s=60.0)
    assert "success" in reply.text, reply.text


def lists(site: Site, name: str, model: str) -> bool:
    """Whether it knows of the model."""
    return any(one["name"] == f"{model}:latest" for one in site.get(name, "/api/tags")["models"])
