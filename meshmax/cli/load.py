"""`meshmax load`: have models in memory before somebody asks them.

It acts on this peer where the model is here; one that only other peers hold is loaded by the best of them. Other models go
for it as for a prompt. While it lasts a terminal shows for how long. Not here: what goes (core.residency), `stop` (cli.models).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final
from urllib.parse import quote

from cyclopts import Parameter

from meshmax.base.units import parse_duration_s
from meshmax.cli.client import PeerClient, Target, open_client
from meshmax.cli.models import HERE, AsJson, Model, MoreModels
from meshmax.cli.output import emit, emit_json, printable
from meshmax.cli.spelling import corrected

SHOW_INTERVAL_S: Final = 1.0
_NEW_LINE: Final = "\r\x1b[K"  # back to the beginning of the line, which is erased


def load(
    model: Model,
    /,
    *more: MoreModels,
    keepalive: Annotated[
        str | None,
        Parameter(name=("--keep-alive", "--keepalive"), help="How long it stays unused, like 30m; -1s: for ever."),
    ] = None,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Load models into memory, so that the first answer need not wait; `meshmax stop` unloads one."""
    if keepalive is not None:
        parse_duration_s(keepalive)
    loaded = []
    with open_client(target) as client:
        for name in (model, *more):
            with corrected(client, name), _shown(name, quiet=as_json):
                loaded.append(_load(client, name, keepalive))
            if not as_json:
                emit(_sentence(loaded[-1]))
    if as_json:
        emit_json({"loaded": loaded})


def _load(client: PeerClient, name: str, keepalive: str | None) -> dict[str, Any]:
    digest = client.get(f"/api/v1/models/{quote(name, safe='/:@')}")["digest"]
    body: dict[str, Any] = {"model": name, "stream": False}
    if keepalive is not None:
        body["keep_alive"] = keepalive
    before, begun_s = _in_memory(client, digest), time.monotonic()
    answer = client.call_slowly("POST", "/api/generate", body)
    here = _in_memory(client, digest)
    return {
        "model": name,
        "peer": answer.get("remote_host") or "",
        "was_loaded": bool(before),
        "took_s": round(time.monotonic() - begun_s, 3),
        "size": here.get("size"),
        "size_vram": here.get("size_vram"),
        "expires_at": here.get("expires_at"),
    }


def _in_memory(client: PeerClient, digest: str) -> dict[str, Any]:
    """What the peer says of a model in its memory; {} if it is not there."""
    return next((each for each in client.get("/api/ps")["models"] if each["digest"] == digest), {})


def _sentence(loaded: dict[str, Any]) -> str:
    where = f" on {printable(loaded['peer'])}" if loaded["peer"] else ""
    took = "was loaded already" if loaded["was_loaded"] else f"loaded in {loaded['took_s']:.1f} s"
    return f"'{loaded['model']}' {took}{where}"


@contextmanager
def _shown(name: str, *, quiet: bool) -> Iterator[None]:
    """Say on a terminal how long it has taken so far."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    over, begun = threading.Event(), time.monotonic()

    def show() -> None:
        while not over.wait(SHOW_INTERVAL_S):
            sys.stderr.write(f"{_NEW_LINE}loading '{printable(name)}' ... {time.monotonic() - begun:.0f} s")
            sys.stderr.flush()

    shown = threading.Thread(target=show, daemon=True)
    shown.start()
    try:
        yield
    finally:
        over.set()
        shown.join()
        sys.stderr.write(_NEW_LINE)
        sys.stderr.flush()
