"""What can be seen of this machine and of a home without asking anybody: the doctor's first look. Blocking, briefly.

Works with and without a peer that runs; nothing is changed. That the clock was set back is known by files of the home that are
from the future. Not here: what it means (core.doctor).
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from meshmax.base.config import DEFAULT_API_PORT, DEFAULT_CONTROL_PORT, Config
from meshmax.base.doctor import LocalPort, MachineFacts
from meshmax.base.errors import MeshmaxError
from meshmax.net.local_ports import port_holder, try_mdns
from meshmax.store.home import read_run
from meshmax.store.identity import KEY_FILE, load_identity
from meshmax.store.peers_file import FILE_NAME as PEERS_FILE

_WRITTEN_OFTEN: Final = ("lock", "sequence", PEERS_FILE, KEY_FILE)  # files whose times tell when a peer ran here


def check_machine(config: Config, networks: Sequence[str], now_s: float, *, running: bool) -> MachineFacts:
    """The machine, and the home of ``config``. ``running``: a peer runs there, so that its own ports are left out."""
    home = Path(config.home).expanduser()
    models = Path(config.models).expanduser() if config.models else home
    return MachineFacts(
        str(home),
        tuple(networks),
        ports=_api_port(home, config) if running else _ports(config),
        mdns_problem="" if running or not config.lan else try_mdns(networks),
        engine_problem=_engine_problem(config),
        home_problem=_home_problem(home),
        identity_problem=_identity_problem(home),
        clock_back_s=_clock_back_s(home, now_s),
        disk_free_bytes=_free_bytes(models),
    )


def _api_port(home: Path, config: Config) -> tuple[LocalPort, ...]:
    """Who keeps the API of the peer that runs from its usual port."""
    run = read_run(home)
    if config.api or run is None or run.api.rstrip("/").endswith(f":{DEFAULT_API_PORT}"):
        return ()
    return (LocalPort("API", DEFAULT_API_PORT, port_holder("127.0.0.1", DEFAULT_API_PORT)),)


def _ports(config: Config) -> tuple[LocalPort, ...]:
    """Those that a peer takes by default; what the configuration names otherwise is told when it starts."""
    found = [] if config.api else [LocalPort("API", DEFAULT_API_PORT, port_holder("127.0.0.1", DEFAULT_API_PORT))]
    if not config.listen:
        found.append(LocalPort("peers", DEFAULT_CONTROL_PORT, port_holder("0.0.0.0", DEFAULT_CONTROL_PORT)))  # noqa: S104
        udp = port_holder("0.0.0.0", DEFAULT_CONTROL_PORT, socket.SOCK_DGRAM)  # noqa: S104
        found.append(LocalPort("DHT and STUN, UDP", DEFAULT_CONTROL_PORT, udp))
    if config.lanes_per_peer and config.lane_port:
        found.append(LocalPort("models", config.lane_port, port_holder("0.0.0.0", config.lane_port)))  # noqa: S104
    return tuple(found)


def _engine_problem(config: Config) -> str:
    if config.engine.kind == "llamacpp" and importlib.util.find_spec("xllamacpp") is None:
        return "the package xllamacpp (llama.cpp) is not installed"
    return ""


def _home_problem(home: Path) -> str:
    if not home.exists():
        near = next(folder for folder in home.parents if folder.exists())
        return (
            "" if os.access(near, os.W_OK | os.X_OK) else f"the home {home} cannot be made: {near} may not be written"
        )
    if not home.is_dir():
        return f"the home {home} is not a folder"
    return "" if os.access(home, os.R_OK | os.W_OK | os.X_OK) else f"the home {home} may not be read and written"


def _identity_problem(home: Path) -> str:
    try:
        if (home / KEY_FILE).exists():
            load_identity(home)
    except (OSError, MeshmaxError) as error:
        return error.message if isinstance(error, MeshmaxError) else f"{home / KEY_FILE}: {error.strerror}"
    return ""


def _clock_back_s(home: Path, now_s: float) -> float:
    behind = [0.0]
    for name in _WRITTEN_OFTEN:
        try:
            behind.append((home / name).stat().st_mtime - now_s)
        except OSError:
            continue
    return max(behind)


def _free_bytes(folder: Path) -> int | None:
    near = next((each for each in (folder, *folder.parents) if each.exists()), None)
    try:
        return psutil.disk_usage(str(near)).free if near else None
    except OSError:
        return None
