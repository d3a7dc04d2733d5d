"""Draining other peers: both ends of ``/meshmax/drain/1.0.0``.

Rules: only a member of a private mesh whose certificate has the scope ``admin`` is answered; in the open mesh, where nobody
is told apart, nobody is, and the sentence says what to do there. An answer costs nothing, so none is refused for load. Not here:
what draining is (core.draining).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from meshmax.base.drain import DrainView
from meshmax.base.errors import MeshmaxError, PeerGone, Refused, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.ports import Stream, Swarm
from meshmax.services.drain import Drain
from meshmax.services.frames import FrameStream
from meshmax.telemetry.log import get_logger
from meshmax.wire import drain as wire
from meshmax.wire.failure import Failure, error_of, failure_of
from meshmax.wire.protocols import DRAIN

REQUEST_TIMEOUT_S: Final = 5.0  # for an asker's message, and for it to take ours
ASK_TIMEOUT_S: Final = 10.0  # for an answer, which costs the other no work
NOT_IN_OPEN_MESH: Final = (
    "in the open mesh nobody drains another peer, since anybody on the LAN could: run `meshmax drain` on that machine,"
    " or make a private mesh (`meshmax mesh new`)"
)

Require = Callable[[PeerId], None]  # raises OutOfScope, NotAMember

_log = get_logger("drain")


class DrainServer:
    """Answers other peers. ``require``: whether the peer may; ``mesh``: the one that we are in."""

    def __init__(self, drain: Drain, mesh: Callable[[], MeshId], require: Require) -> None:
        self._drain, self._mesh, self._require = drain, mesh, require

    def register(self, swarm: Swarm) -> None:
        """Serve on ``swarm`` from now on."""
        swarm.serve(DRAIN, self.answer)

    async def answer(self, stream: Stream) -> None:
        """One request. Raises PeerGone, RemoteProtocolError."""
        frames = FrameStream(stream)
        reply: wire.FromAsked
        with trio.move_on_after(REQUEST_TIMEOUT_S) as waited:
            request = await frames.receive(wire.FROM_ASKER)
        if waited.cancelled_caught:
            raise RemoteProtocolError("the peer opened a stream and asked nothing")
        try:
            reply = wire.standing_of(self._do(stream.peer, request))
        except MeshmaxError as error:
            reply = failure_of(error)
        with trio.move_on_after(REQUEST_TIMEOUT_S):  # who does not take its answer loses it
            await frames.send(wire.FROM_ASKED, reply)
            await stream.send_eof()

    def _do(self, peer: PeerId, request: wire.FromAsker) -> DrainView:
        if self._mesh() == OPEN_MESH:
            raise Refused(NOT_IN_OPEN_MESH)
        self._require(peer)
        match request:
            case wire.DrainAsk(deadline_s=deadline_s):
                _log.info("drained by", peer=peer, deadline_s=deadline_s)
                return self._drain.drain(deadline_s)
            case wire.UndrainAsk():
                _log.info("undrained by", peer=peer)
                return self._drain.undrain()
            case wire.StandAsk():
                return self._drain.view


async def ask_drain(swarm: Swarm, peer: PeerId, request: wire.FromAsker) -> DrainView:
    """What ``peer`` says to ``request``. Raises Refused, OutOfScope..., PeerGone, RemoteProtocolError, VersionMismatch."""
    reply: wire.FromAsked | None = None
    with trio.move_on_after(ASK_TIMEOUT_S):
        try:
            stream = await swarm.open_stream(peer, DRAIN)
        except PeerGone as error:
            raise PeerGone(
                f"{error.message}: it is away or hangs, and nothing was drained; `meshmax peers` shows who is there"
            ) from None
        try:
            frames = FrameStream(stream)
            await frames.send(wire.FROM_ASKER, request)
            reply = await frames.receive(wire.FROM_ASKED)
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()
    if reply is None:
        raise PeerGone(f"the peer did not answer within {ASK_TIMEOUT_S:g} s")
    if isinstance(reply, Failure):
        raise error_of(reply)
    return wire.view_of(reply)
