"""`meshmax bootstrap`: run a bootstrap node until a signal, and say what other sites put into their configuration.

It starts and ends as a peer does (cli.peer), with /health and /metrics on loopback in place of the API. Not here: the node
(node.bootstrap).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from meshmax import __version__
from meshmax.base.config import Config
from meshmax.cli.output import emit
from meshmax.cli.peer import Cancellable, run_until_signal, spare_lasting_objects, start
from meshmax.cli.settings import load_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshmax.node.bootstrap import BootstrapNode

MAX_FILES: Final = 8192  # guests, observed connections and half-open ones are some 1,700; the usual limit is 1,024
DEFAULT_STATUS_PORT: Final = 11438  # not the API's, which clients of a peer on this machine would try


def bootstrap(
    *,
    home: Annotated[
        Path | None, Parameter(help="Folder of identity and configuration; default ~/.meshmax-bootstrap.")
    ] = None,
    listen: Annotated[
        tuple[str, ...],
        Parameter(help="HOST:PORT for peers, repeatable; default all interfaces, port 11435 or next."),
    ] = (),
    api: Annotated[
        str | None, Parameter(help="HOST:PORT of /health and /metrics; default 127.0.0.1, port 11438 or next.")
    ] = None,
    config: Annotated[
        Path | None, Parameter(help="Configuration file; default meshmax.yaml in the home folder.")
    ] = None,
    json_logs: Annotated[bool | None, Parameter(help="Log as JSON lines.")] = None,
) -> int:
    """Run a bootstrap node in the foreground: peers of any mesh meet here. Ctrl-C ends it."""
    from meshmax.node.bootstrap import BOOTSTRAP_DEFAULTS

    given = {"home": str(home) if home else None, "listen": listen or None, "api": api, "json_logs": json_logs}
    flags = {key: value for key, value in given.items() if value is not None}
    return start(load_config(flags, os.environ, config, defaults=BOOTSTRAP_DEFAULTS), run_bootstrap)


async def run_bootstrap(config: Config) -> None:
    """Run a bootstrap node until a signal comes."""
    _allow_files(MAX_FILES)
    await run_until_signal(partial(_run, config))


def _allow_files(most: int) -> None:
    """Raise the limit of open files as far as this user may, and no further than ``most``."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(config: Config, stage: list[Cancellable]) -> None:
    import trio

    from meshmax.api.plain_server import serve_pages
    from meshmax.node.bootstrap import open_bootstrap

    async with open_bootstrap(config) as node, trio.open_nursery() as nursery:
        spare_lasting_objects()
        url = await nursery.start(partial(serve_pages, _pages(node), config.api, DEFAULT_STATUS_PORT))
        stage.append(nursery.cancel_scope)
        node.home.write_run(str(url), node.peer_id, node.started_at_s)
        emit(banner(facts_of(node), str(url)))
        sys.stdout.flush()


def _pages(node: BootstrapNode) -> dict[str, Any]:
    import msgspec
    from prometheus_client import generate_latest

    from meshmax.telemetry.metrics import REGISTRY

    def health() -> tuple[str, bytes]:
        return "application/json", msgspec.json.encode({"status": "ok", "role": "bootstrap", **facts_of(node)})

    def metrics() -> tuple[str, bytes]:
        return "text/plain; version=0.0.4; charset=utf-8", generate_latest(REGISTRY)

    return {"/health": health, "/metrics": metrics}


def facts_of(node: BootstrapNode) -> dict[str, Any]:
    """What banner and /health say of a running node."""
    return {
        "version": __version__,
        "peer_id": node.peer_id,
        "home": node.config.home,
        "addresses": node.addresses,
        "services": node.serving.services,
        "udp_port": node.serving.udp_port,
        "observer_port": node.serving.observer_port,
    }


def banner(facts: Mapping[str, Any], url: str) -> str:
    """What a person sees when the node is up: the lines to copy stand unindented by anything but YAML's own need."""
    ports = [f"UDP port {facts['udp_port']}"] if facts["udp_port"] else []
    ports += [f"observer TCP port {facts['observer_port']}"] if facts["observer_port"] else []
    lines = [
        f"meshmax {__version__}: bootstrap node {facts['peer_id']}",
        f"  serves   {', '.join(facts['services'])}",
        f"  also     {', '.join(ports) or 'no other ports'}",
        f"  watch    {url}/health and /metrics",
        f"  home     {facts['home']}",
        "Other sites put this into their meshmax.yaml (a public name of this machine may stand in place of the IP address,",
        "as /dns/NAME/tcp/...):",
        "",
        "bootstrap:",
        *(f"  - {address}" for address in facts["addresses"]),
        "",
        "Ctrl-C ends it.",
    ]
    return "\n".join(lines)
