"""Pulls that another peer waits for: the asked end of ``/meshmax/pull/1.0.0``.

Rules. We watch the pull for the asker as one more watcher (services.pull), so that it ends when the last of them is gone, and
what came is kept; a person's own pull goes on. An asker that closes its stream, says another word, is lost, or takes no
word is gone. Not here: whether a peer may ask (services.guards), pulls (services.pull), the asking end (services.shared_pulls).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Final

import trio

from meshmax.base.errors import Busy, MeshmaxError, PeerGone, RemoteProtocolError, error_for
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.pull_progress import FINAL
from meshmax.telemetry.log import get_logger
from meshmax.wire import pull as wire
from meshmax.wire.failure import failure_of
from meshmax.wire.protocols import PULL

MAX_WAITING: Final = 64  # askers in all; each asks for a model, and few models are pulled for others at once
MAX_WAITING_PER_PEER: Final = 8  # of those
REQUEST_TIMEOUT_S: Final = 10.0  # for an asker's message, and for it to take ours
TELL_S: Final = 2.0  # between words on how far it is

OpenAsked = Callable[[PeerId, str, Sha256], AbstractAsyncContextManager[AsyncIterator[Transfer]]]

_log = get_logger("pull")


class PullServer:
    """Answers other peers. ``open_asked``: the pull that a peer asks for; it raises Refused, Busy, NoProviders."""

    def __init__(self, open_asked: OpenAsked) -> None:
        self._open_asked = open_asked
        self._waiting: Counter[PeerId] = Counter()

    def register(self, swarm: Swarm) -> None:
        """Serve on ``swarm`` from now on."""
        swarm.serve(PULL, self.answer)

    async def answer(self, stream: Stream) -> None:
        """One asker, until its model is here or it is gone. Raises PeerGone, RemoteProtocolError."""
        frames = FrameStream(stream)
        with trio.move_on_after(REQUEST_TIMEOUT_S) as waited:
            ask = await frames.receive(wire.FROM_ASKER)
        if waited.cancelled_caught:
            raise RemoteProtocolError("the peer opened a stream and asked for nothing")
        end: wire.FromAsked | None
        try:
            with self._place(stream.peer):
                async with self._open_asked(stream.peer, ask.name, Sha256(ask.digest)) as values:
                    end = await _tell_while_there(frames, values)
        except (PeerGone, RemoteProtocolError):
            raise
        except MeshmaxError as error:
            end = failure_of(error)
        if end is not None:
            await _send(frames, end)
            await stream.send_eof()

    @contextmanager
    def _place(self, peer: PeerId) -> Iterator[None]:
        if self._waiting[peer] >= MAX_WAITING_PER_PEER or self._waiting.total() >= MAX_WAITING:
            raise Busy("as many wait for pulls of this peer as it has room for", 30.0)
        self._waiting[peer] += 1
        try:
            yield
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]


async def _tell_while_there(frames: FrameStream, values: AsyncIterator[Transfer]) -> wire.FromAsked | None:
    """How the pull ended; None: nobody waits for it any more."""
    end: wire.FromAsked | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_gone, frames, nursery.cancel_scope)
        end = await _tell(frames, values)
        nursery.cancel_scope.cancel()
    return end


async def _until_gone(frames: FrameStream, scope: trio.CancelScope) -> None:
    """The asker has nothing more to say: whatever comes, it no longer waits."""
    try:
        await frames.try_receive(wire.FROM_ASKER)
    except (PeerGone, RemoteProtocolError) as error:
        _log.debug("asker lost", peer=frames.peer, error=error.message)
    scope.cancel()


async def _tell(frames: FrameStream, values: AsyncIterator[Transfer]) -> wire.FromAsked | None:
    told: tuple[float, str] = (0.0, "")  # when, which state
    async for value in values:
        if value.state == "done":
            return wire.Pulled()
        if value.state in FINAL:
            return failure_of(error_for(value.error_code or "no_providers", value.reason or f"it was {value.state}"))
        now = trio.current_time()
        if value.state == told[1] and now - told[0] < TELL_S:
            continue
        told = now, value.state
        try:
            await _send(frames, _pulling(value))
        except PeerGone:
            return None
    return failure_of(PeerGone("the pull ended without a word"))


def _pulling(value: Transfer) -> wire.Pulling:
    done, total = (min(max(size, 0), wire.MAX_MODEL_BYTES) for size in (value.bytes_done, value.bytes_total))
    state: Final = "waiting" if value.state == "waiting" else "paused" if value.state == "paused" else "running"
    return wire.Pulling(state, done, total, value.reason[: wire.MAX_REASON])


async def _send(frames: FrameStream, message: wire.FromAsked) -> None:
    with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
        await frames.send(wire.FROM_ASKED, message)
    if scope.cancelled_caught:
        raise PeerGone(f"the asker took nothing for {REQUEST_TIMEOUT_S:g} s")
