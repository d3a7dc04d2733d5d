"""Asking observers from ports of our own that nobody knows yet, to learn what a NAT makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from meshmax.core.reachability import MappedSeen


class Arrival:
    """A probe that is waited for. ``sender`` is known when ``there`` is set."""

    def __init__(self) -> None:
        self.there = trio.Event()
        self.sender: tuple[str, int] = ("", 0)


class ProbePort(Protocol):
    """A fresh UDP port."""

    @property
    def local_port(self) -> int:
        """Its number."""
        ...

    async def mapped(self, server: tuple[str, int]) -> tuple[str, int] | None:
        """Where the STUN server at ``server`` (an IP address and port) sees this port.

        None where it does not answer within net.udp_probe.STUN_S, or where there is no way to it.
        """
        ...

    def expect(self, nonce: bytes) -> Arrival:
        """The probe (wire.look_back) with ``nonce``, which may arrive from anywhere. At most MAX_EXPECTED at once."""
        ...


class Probes(Protocol):
    """Makes them."""

    def open_udp(self, *, ipv6: bool = False) -> AbstractAsyncContextManager[ProbePort]:
        """A port that has sent nothing yet. Raises ConnectError: there is none to be had."""
        ...

    async def tcp_mapped(self, observers: Sequence[tuple[str, int]]) -> tuple[MappedSeen, ...]:
        """How TCP observers (net.observer) of one family see one local port of ours; within net.tcp_probe.TCP_S.

        Those that do not answer are left out.
        """
        ...
