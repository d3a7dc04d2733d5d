"""Two network namespaces with a cable between them, whose link can be taken down. Needs root and iproute2.

Nothing outside the namespaces is touched, and nothing leads out of them. A thread can be inside one for a moment: sockets
and processes that it makes there stay there.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

CLONE_NEWNET: Final = 0x40000000
ADDRESSES: Final = ("10.77.0.1", "10.77.0.2")  # private, and seen by nobody else


class Cable:
    """Made by `lay_cable`: its ends 0 and 1."""

    def __init__(self, prefix: str) -> None:
        self.names = (f"{prefix}-0", f"{prefix}-1")

    def link(self, end: int, state: str) -> None:
        """Take the link ``down`` or ``up`` at one end; the other end loses its carrier."""
        ip("-n", self.names[end], "link", "set", "cable", state)

    @contextmanager
    def inside(self, end: int) -> Iterator[None]:
        """This thread is at that end."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/run/netns/{self.names[end]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(there)
            try:
                yield
            finally:
                enter(here)
        finally:
            os.close(here)
            os.close(there)


@contextmanager
def lay_cable() -> Iterator[Cable]:
    """Two namespaces of our own, gone with the block. Raises subprocess.CalledProcessError where none can be made."""
    cable = Cable(f"mm{os.getpid()}")
    try:
        for name in cable.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = cable.names
        ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(cable.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield cable
    finally:
        for name in cable.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*words: str) -> None:
    """iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def enter(fd: int) -> None:
    """setns(2) for this thread; Python has it from 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
