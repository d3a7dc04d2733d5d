"""The default gateway of IPv4: the router that this machine's way out leads through. From the kernel's table (Linux), or by
asking `route` (macOS, BSD)."""

from __future__ import annotations

import ipaddress
import re
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import trio

ROUTE_S: Final = 2.0  # for `route`, which asks the kernel
MAX_ROUTES: Final = 4096  # lines that are looked through

_ROUTES: Final = Path("/proc/thread-self/net/route")
_UP, _GATEWAY = 0x1, 0x2  # flags of a route (linux/route.h)
_LINE: Final = re.compile(r"^\s*gateway: (\S+)$", re.MULTILINE)


async def default_gateway() -> str | None:
    """Its address; None where there is none, as on links without a router."""
    try:
        with _ROUTES.open() as lines:
            return gateway_of(lines)
    except OSError:  # not Linux
        return await _by_route()


def gateway_of(lines: Iterable[str]) -> str | None:
    """The gateway in a table as in /proc/net/route: of default routes the one with the lowest metric."""
    found: list[tuple[int, str]] = []
    for _, line in zip(range(MAX_ROUTES), lines, strict=False):
        fields = line.split()
        try:
            destination, gateway, flags, metric, mask = (
                int(fields[1], 16),
                int(fields[2], 16),
                int(fields[3], 16),
                int(fields[6]),
                int(fields[7], 16),
            )
        except (IndexError, ValueError):  # the heading
            continue
        if not destination and not mask and flags & _UP and flags & _GATEWAY:
            found.append((metric, str(ipaddress.IPv4Address(struct.pack("=I", gateway)))))
    return min(found)[1] if found else None


async def _by_route() -> str | None:
    output = b""
    with trio.move_on_after(ROUTE_S):
        try:
            done = await trio.run_process(
                ["route", "-n", "get", "default"], capture_stdout=True, stderr=subprocess.DEVNULL, check=False
            )
        except OSError:
            return None
        output = done.stdout or b""
    match = _LINE.search(output.decode(errors="replace"))
    try:
        return str(ipaddress.IPv4Address(match[1])) if match else None
    except ValueError:
        return None
