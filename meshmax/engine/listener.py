"""Whose program listens at a port of this machine: a server that nobody configured is used only where its owner could be trusted
with this peer itself.

By Linux's table of TCP sockets; where there is none nobody can tell, and that is no reason to refuse. Trusted are our own user,
the system's accounts, and those that systemd makes for one service. Not here: what listens there (engine.ollama).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTENS: Final = "0A"  # a state, in the tables
PEOPLE: Final = 1000  # the first user id of a person, as login.defs has it
DYNAMIC: Final = range(61184, 65520)  # of systemd's services with DynamicUser


def owners(port: int, tables: Iterable[Path] = TABLES) -> frozenset[int]:
    """User ids of who listens at ``port``; none where that cannot be told. Reads a file of some kilobytes."""
    found: set[int] = set()
    for table in tables:
        try:
            lines = table.read_text("ascii").splitlines()[1:]
        except (OSError, ValueError):
            continue
        for line in lines:
            fields = line.split()
            if (
                len(fields) > 7
                and fields[3] == LISTENS
                and fields[1].endswith(f":{port:04X}")
                and fields[7].isdecimal()
            ):
                found.add(int(fields[7]))
    return frozenset(found)


def strangers(uids: Iterable[int], own: int) -> list[int]:
    """Those of ``uids`` that are other people. ``own``: ours."""
    return sorted(uid for uid in uids if uid != own and uid >= PEOPLE and uid not in DYNAMIC)
