"""A router's own daemon for port mappings, the one that most home routers run: miniupnpd (UPnP IGD, NAT-PMP)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.natlab.lab import Host

_RULES: Final = """
    table inet miniupnpd {
        chain prerouting { type nat hook prerouting priority dstnat - 5; policy accept; jump prerouting_miniupnpd; }
        chain miniupnpd { }
        chain prerouting_miniupnpd { }
        chain postrouting_miniupnpd { }
    }"""
_CONFIG: Final = """
ext_ifname=wan
listening_ip=lan
port=0
enable_natpmp={natpmp}
enable_upnp={upnp}
secure_mode=yes
uuid=fc4ec57e-b051-11db-88f8-0060085db3f6
min_lifetime=120
max_lifetime=86400
upnp_table_name=miniupnpd
upnp_nat_table_name=miniupnpd
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


def why_no_igd() -> str:
    """Why there can be none here; '' if there can."""
    return "" if shutil.which("miniupnpd") else "port mappings take a router: miniupnpd was not found"


@contextmanager
def open_igd(router: Host, folder: Path, *, upnp: bool = True, natpmp: bool = True) -> Iterator[None]:
    """The router, with interfaces lan and wan, maps ports on request."""
    word = {True: "yes", False: "no"}
    config = folder / f"{router.name}.conf"
    config.write_text(_CONFIG.format(upnp=word[upnp], natpmp=word[natpmp]))
    router.rules(_RULES)
    with router.inside(), (folder / f"{router.name}.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["miniupnpd", "-d", "-f", str(config), "-P", str(folder / f"{router.name}.pid")], stdout=log, stderr=log
        )
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait(5)
        router.run("nft", "delete", "table", "inet", "miniupnpd")


def forwarded(router: Host) -> set[tuple[str, str]]:
    """The protocol (its number) and ADDRESS:PORT in the LAN of everything that is forwarded."""
    rules = router.run("nft", "list", "chain", "inet", "miniupnpd", "prerouting_miniupnpd")
    return set(re.findall(r"@nh,72,8 (0x\w+) .* dnat ip to ([\d.]+:\d+)", rules))
