"""Asks one peer for an answer over /meshmax/infer/1.0.0. No tasks: frames are read as the caller asks for events.

A peer of which nothing comes for SILENCE_S, no KeepAlive and nothing else, is gone (core.liveness); long before that it is
suspected (core.pace). What the peer sends is checked against what was asked. Leaving the block resets the stream, which stops
the work there. Not here: whom to ask (services.router), what a suspicion leads to (core.delivery).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Literal

import trio

from meshmax.base.errors import PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask, Delta, EmbedRequest, Event, Finish, Vector
from meshmax.core.liveness import Silence
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.wire.failure import Failure, error_of
from meshmax.wire.infer import ASK_PART, REPLY, Accepted, Events, Reply, ask_parts, check_reply
from meshmax.wire.protocols import INFER

OPEN_DEADLINE_S: Final = 5.0  # a round trip or two on a connection that is there
SILENCE_S: Final = 7.0  # three of the rare keep-alives missed, and a second

Step = Literal["sending", "heard", "accepted"]


def _ignore(step: Step) -> None:
    pass


def _unheard() -> None:
    pass


@asynccontextmanager
async def open_remote_answer(
    swarm: Swarm, peer: PeerId, ask: Ask, on_step: Callable[[Step], None] = _ignore
) -> AsyncIterator[RemoteEvents]:
    """The events of ``peer``'s answer, a Finish at the end. Entered once the request is sent; leaving resets the stream.

    ``on_step`` is told that a piece of a request goes out that fills more than one, that the peer was heard of, and that it
    has accepted.

    Raises, on entering or at any event: PeerGone, VersionMismatch, RemoteProtocolError, Busy, EngineError... as the peer
    says; InvalidRequest for a request that is too large.
    """
    parts = ask_parts(ask)
    stream = await _open(swarm, peer)
    try:
        frames, large = FrameStream(stream), False
        for part in parts:
            if not part.last:
                large = True
                on_step("sending")
            with trio.move_on_after(SILENCE_S) as scope:
                await frames.send(ASK_PART, part)
            if scope.cancelled_caught:
                raise PeerGone(f"the peer took nothing of the request for {SILENCE_S:g} s")
            if large:
                on_step("heard")
        hears = getattr(swarm, "heard_s", None)  # of ports.HearsPeers, which takes long to ask for
        heard_s = _unheard if hears is None else partial(hears, peer)
        yield RemoteEvents(frames, ask, on_step, heard_s)
    finally:
        with trio.CancelScope(shield=True):  # reset does not block; without it the peer would work on
            await stream.reset()


async def _open(swarm: Swarm, peer: PeerId) -> Stream:
    stream = None
    with trio.move_on_after(OPEN_DEADLINE_S):
        stream = await swarm.open_stream(peer, INFER, eager=True)
    if stream is None:
        raise PeerGone(f"the peer did not open a stream within {OPEN_DEADLINE_S:g} s")
    return stream


class RemoteEvents:
    """The events of one answer as they come."""

    def __init__(
        self,
        frames: FrameStream,
        ask: Ask,
        on_step: Callable[[Step], None] = _ignore,
        heard_s: Callable[[], float | None] = _unheard,
    ) -> None:
        """``heard_s``: when anything came from the peer last; None: unknown."""
        self._frames, self._heard_s = frames, heard_s
        self._on_step = on_step
        self._inputs = len(ask.request.inputs) if isinstance(ask.request, EmbedRequest) else None
        self._seen: set[int] = set()
        self._ready: deque[Event] = deque()
        self._accepted = self._finished = False

    def __aiter__(self) -> RemoteEvents:
        return self

    async def __anext__(self) -> Event:
        """The next event. Raises PeerGone, RemoteProtocolError, and what the peer says that went wrong."""
        while not self._ready:
            batch = await self.try_next()
            if batch is None:
                raise StopAsyncIteration
            self._ready.extend(batch)
        return self._ready.popleft()

    async def try_next(self) -> tuple[Event, ...] | None:
        """The events that come next, together; None at the end. Raises as `__anext__`; do not use both."""
        while not self._finished:
            events = self._on_reply(await self._receive())
            if events:
                return events
        return None

    async def _receive(self) -> Reply:
        silence = Silence(SILENCE_S, trio.current_time())
        while not silence.is_over:
            reply = None
            with trio.move_on_after(silence.look_s) as scope:
                reply = await self._frames.try_receive(REPLY)
            if reply is not None:
                return reply
            if not scope.cancelled_caught:
                raise PeerGone("the peer ended the stream before its answer was whole")
            silence.on_look(self._heard_s())
        raise PeerGone(f"the peer was silent for {silence.waited_s:g} s")

    def _on_reply(self, reply: Reply) -> tuple[Event, ...]:
        if isinstance(reply, Failure):
            raise error_of(reply)
        if isinstance(reply, Accepted) == self._accepted:
            raise RemoteProtocolError("the peer did not accept the request once, before everything else")
        if not isinstance(reply, Events):
            self._on_step("heard" if self._accepted else "accepted")
            self._accepted = True
            return ()
        check_reply(reply)
        for event in reply.events:
            self._check(event)
        return reply.events

    def _check(self, event: Event) -> None:
        """Whether the event answers what was asked: vectors or text, each vector once, all of them before the end."""
        if isinstance(event, Finish):
            self._finished = True
            if self._inputs is not None and len(self._seen) != self._inputs:
                raise RemoteProtocolError("the peer ended its answer without a vector for each input")
        elif isinstance(event, Delta) == (self._inputs is not None):
            raise RemoteProtocolError("the peer sent another kind of answer than was asked for")
        elif isinstance(event, Vector):
            if event.index in self._seen or event.index >= (self._inputs or 0):
                raise RemoteProtocolError("the peer sent a vector twice, or one that was not asked for")
            self._seen.add(event.index)
