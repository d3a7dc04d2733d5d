"""Tells peers how they are seen from here and which services there are for strangers; asks others the same.

Served to anyone. What another node says about our address is its word and no more: who uses it asks several. Not here:
STUN and its TCP form (services.stun_server), which need no connection of ours and no PeerId.
"""

from __future__ import annotations

from typing import Final

import trio

from meshmax.base.errors import PeerGone
from meshmax.base.ids import PeerId
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.wire import observe as wire
from meshmax.wire.protocols import OBSERVE

ANSWER_TIMEOUT_S: Final = 5.0  # for two small messages


class ObserveServer:
    """Ports as in wire.observe.Observed; ``services``: names of what is done for strangers here."""

    def __init__(self, udp_port: int, observer_port: int, services: tuple[str, ...]) -> None:
        self._udp_port, self._observer_port, self._services = udp_port, observer_port, services

    def register(self, swarm: Swarm) -> None:
        """Serve from now on."""
        swarm.serve(OBSERVE, self.answer, to="anyone")

    async def answer(self, stream: Stream) -> None:
        """One question, one answer. Raises PeerGone, RemoteProtocolError."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            frames = FrameStream(stream)
            await frames.receive(wire.FROM_ASKER)
            reply = wire.Observed(
                stream.address[: wire.MAX_ADDRESS], self._udp_port, self._observer_port, self._services
            )
            await frames.send(wire.FROM_OBSERVER, reply)
            return
        raise PeerGone("the peer did not ask in time")


async def ask_observed(swarm: Swarm, peer_id: PeerId) -> wire.Observed:
    """What a connected node says. Raises PeerGone, VersionMismatch (it does not answer such questions), RemoteProtocolError."""
    stream = await swarm.open_stream(peer_id, OBSERVE)
    try:
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            frames = FrameStream(stream)
            await frames.send(wire.FROM_ASKER, wire.Observe())
            return await frames.receive(wire.FROM_OBSERVER)
        raise PeerGone("the node did not answer in time")
    finally:
        with trio.CancelScope(shield=True):  # does not block
            await stream.reset()
