"""Test workers that run side by side, each with a network of its own: their peers must not find each other.

Where this process may make network namespaces (root, iproute2), a worker moves into one of its own as it starts, with
loopback and one interface of a LAN on which nobody else is. `why_not` of natlab.lab tells where that cannot be.
"""

from __future__ import annotations

from typing import Final

from tests.natlab.lab import Namespace

LAN_ADDRESS: Final = "10.77.255.1/24"  # private, and seen by nobody else
_kept: list[Namespace] = []  # for as long as this process lives


def go_apart() -> None:
    """Move this thread, and so all that it starts from now on, into a network of its own. Raises OSError, CalledProcessError."""
    namespace = Namespace("apart")
    namespace.ip("link add eth0 type veth peer name cable", "link set eth0 up", "link set cable up")
    namespace.ip(f"address add {LAN_ADDRESS} dev eth0")
    namespace.ip("route add default dev eth0")  # as a machine has one: what leads nowhere is lost, not refused
    namespace.enter()
    _kept.append(namespace)
