"""Answers STUN: tells whoever asks from which address the question came, over UDP and TCP.

Rules: each source is answered PER_S times a second (BURST at once), all together TOTAL_PER_S times; what is beyond, and what
is no binding request, is not answered at all, since an error would only help to find out whom to flood. No answer has over
wire.stun.MAX_ANSWER_BYTES. Nothing is remembered of anybody but how often they came. Not here: sockets (net.datagrams,
net.observer), the bytes (wire.stun).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from meshmax.base.errors import RemoteProtocolError
from meshmax.core.rates import Rates
from meshmax.core.subnets import source_of
from meshmax.ports import Datagrams
from meshmax.telemetry.metrics import STUN
from meshmax.wire import stun

PER_S: Final = 20.0  # for one subnet: an ICE agent asks once for each of its sockets, and repeats what is lost
BURST: Final = 100.0  # several agents behind one NAT, each with some sockets
TOTAL_PER_S: Final = 2000.0  # a few percent of one core, and 100 KB/s of answers at most


class StunServer:
    """One a node, for all its ports. ``clock``: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rates = Rates(PER_S, BURST, TOTAL_PER_S)

    def answer(self, data: bytes, source: tuple[str, int]) -> bytes | None:
        """What to send back to ``source`` for ``data``; None for nothing."""
        try:
            request = stun.parse_request(data)
        except RemoteProtocolError:
            STUN.labels(outcome="invalid").inc()
            return None
        if not self._rates.take(source_of(source[0]), self._clock()):
            STUN.labels(outcome="limited").inc()
            return None
        STUN.labels(outcome="answered").inc()
        return stun.encode_answer(request, source)

    def register(self, datagrams: Datagrams) -> None:
        """Answer on the UDP port from now on."""

        def on_datagram(data: bytes, sender: tuple[str, int]) -> None:
            reply = self.answer(data, sender)
            if reply is not None:
                datagrams.send(reply, sender)

        datagrams.receive(stun.FIRST_BYTES, on_datagram)
