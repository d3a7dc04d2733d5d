"""Real ports for asking observers; satisfies ports.Probes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from meshmax.core.reachability import MappedSeen
from meshmax.net.tcp_probe import tcp_mapped
from meshmax.net.udp_probe import UdpProbePort, open_probe_port


class SocketProbes:
    """See the module."""

    def open_udp(self, *, ipv6: bool = False) -> AbstractAsyncContextManager[UdpProbePort]:
        """See ports.Probes."""
        return open_probe_port(ipv6=ipv6)

    async def tcp_mapped(self, observers: Sequence[tuple[str, int]]) -> tuple[MappedSeen, ...]:
        """See ports.Probes."""
        return await tcp_mapped(observers)
