"""A dial through simulated NATs, as core.dial_plan plans it: direct ways as packets to a listening port, relays as a delay.

Not here: what follows when the path is a relay (sim_traversal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from meshmax.base.status import Path
from meshmax.core.dial_plan import Step
from meshmax.testing.sim_nat import Packet, SimHost

CONTROL_PORT: Final = 11435
_SYNS_S: Final = (0.0, 1.0, 3.0)  # a kernel repeats a SYN after a second, and then after two
_HANDSHAKES: Final = 3  # round trips from the connection to its admission: Noise, Yamux, membership


def listen(host: SimHost) -> None:
    """Answer who connects to the control port."""

    def on_packet(packet: Packet) -> None:
        if packet.kind == "syn":
            host.send(Packet("tcp", packet.to, packet.source, "syn-ack"))

    host.sockets["tcp", CONTROL_PORT] = on_packet


class SimDial:
    """``connected`` is called once, with the path and when it could be used. ``relay_s``: until a relayed connection can."""

    def __init__(self, host: SimHost, relay_s: float, connected: Callable[[Path], None]) -> None:
        self._host, self._net, self._relay_s, self._connected = host, host.net, relay_s, connected
        self.path: Path | None = None

    def run(self, plan: Sequence[Step]) -> None:
        """Begin."""
        for step in plan:
            for address in step.addresses:
                way = partial(self._direct, address) if step.method == "direct" else partial(self._relay)
                self._net.after(step.delay_s, way)

    def _direct(self, address: str) -> None:
        if self.path is not None:
            return
        fields = address.split("/")
        to = (fields[2], int(fields[4]))
        port, began = self._host.port(), self._net.now

        def on_packet(packet: Packet) -> None:
            if packet.kind == "syn-ack":
                self._net.after(_HANDSHAKES * (self._net.now - began), partial(self._won, "direct"))

        self._host.sockets["tcp", port] = on_packet
        for seconds in _SYNS_S:
            self._net.after(seconds, partial(self._try, Packet("tcp", (self._host.ip, port), to, "syn")))

    def _try(self, packet: Packet) -> None:
        if self.path is None:
            self._host.send(packet)

    def _relay(self) -> None:
        if self.path is None:
            self._net.after(self._relay_s, partial(self._won, "relay"))

    def _won(self, path: Path) -> None:
        if self.path is None:
            self.path = path
            self._connected(path)
