"""Serves /meshmax/infer/1.0.0 from this node's Residency: the model must be here, others are not asked.

A request lives as long as its stream: the moment the requester closes or resets it, says another word, or is lost, the
work is cancelled and the engine stops. Three tasks a request: one makes events, one says that the request is accepted and sends
them (those that are ready together in one frame, with many answers those of a moment; a KeepAlive when there are none), one
watches the requester. While a request comes in, it is bounded here: how many of them, and the bytes that requests hold, in all
and per peer. Once it is whole, the Residency alone says whether it may wait; in both cases the answer is Busy if not.

Where a model runs here, and with how many threads (num_gpu, num_thread), is for this node's own requests, its configuration
and the model to say: a peer's words on it are passed over. Its num_ctx counts as far as there is room for it (core.context).
Neither prompts nor answers are logged. Not here: queues and slots of a model (services.residency).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Final

import msgspec
import structlog
import trio

from meshmax.base.errors import Busy, LocalProtocolError, MeshmaxError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask, Event, Finish
from meshmax.base.units import MIB
from meshmax.core.pace import keep_alive_s
from meshmax.core.write_pace import pause_s
from meshmax.ports import Residency, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.telemetry.log import get_logger
from meshmax.wire.failure import Failure, failure_of
from meshmax.wire.infer import ASK_PART, MAX_EVENTS, REPLY, Accepted, AskAssembly, KeepAlive, events_frames
from meshmax.wire.protocols import INFER

MAX_INCOMING: Final = 512  # requests that are not whole yet; they hold a task each, and nobody's turn
MAX_INCOMING_PER_PEER: Final = 64  # a third of the streams that a peer may have open
MAX_HELD_BYTES: Final = 256 * MIB  # of requests in all: 15 of the largest, or thousands of usual ones
MAX_HELD_SHARE: Final = 2  # one peer's requests hold at most half of that, so that others' come through
PART_DEADLINE_S: Final = 15.0  # for each piece of a request: 35 kB/s at least
SEND_DEADLINE_S: Final = 30.0  # a requester that takes nothing for so long holds a slot that others wait for

Precedence = Callable[[], AbstractContextManager[None]]

_ACCEPTED: Final = REPLY.encode(Accepted())
_log = get_logger("infer_server")


class InferServer:
    """Answers peers' requests. Per peer: ``active`` counts those under way, ``incoming`` those of them that are not whole
    yet, ``held`` the bytes of all.
    """

    def __init__(self, residency: Residency, precedence: Precedence = nullcontext) -> None:
        """``precedence``: entered for as long as a request waits for its first event."""
        self._residency = residency
        self._precedence = precedence
        self.held: Counter[PeerId] = Counter()
        self.active: Counter[PeerId] = Counter()
        self.incoming: Counter[PeerId] = Counter()

    @property
    def held_bytes(self) -> int:
        """Bytes that requests hold, of all peers."""
        return self.held.total()

    def register(self, swarm: Swarm) -> None:
        """Serve the protocol on ``swarm`` from now on."""
        swarm.serve(INFER, self.answer)

    async def answer(self, stream: Stream) -> None:
        """Serve one request. Raises RemoteProtocolError and PeerGone; what else goes wrong is told to the requester."""
        frames = FrameStream(stream)
        try:
            with _counted(self.active, stream.peer):
                await self._serve(frames)
        except Busy as error:
            await _send(frames, REPLY.encode(failure_of(error)))
            await _drain(frames)

    async def _serve(self, frames: FrameStream) -> None:
        assembly = AskAssembly()
        try:
            with self._place(frames.peer):
                ask = _without_machine_options(await self._receive_ask(frames, assembly))
            with structlog.contextvars.bound_contextvars(request_id=ask.request_id, peer=frames.peer):
                _log.debug("request taken", digest=ask.digest)
                await _Exchange(self._residency, frames, ask, self._precedence).run()
        finally:
            _add(self.held, frames.peer, -assembly.held_bytes)

    @contextmanager
    def _place(self, peer: PeerId) -> Iterator[None]:
        if self.incoming[peer] >= MAX_INCOMING_PER_PEER or self.incoming.total() >= MAX_INCOMING:
            raise Busy("this peer takes in as many requests as it can at the moment")
        with _counted(self.incoming, peer):
            yield

    async def _receive_ask(self, frames: FrameStream, assembly: AskAssembly) -> Ask:
        peer = frames.peer
        while True:
            part = None
            with trio.move_on_after(PART_DEADLINE_S):
                part = await frames.receive(ASK_PART)
            if part is None:
                raise RemoteProtocolError(f"the peer did not send its request within {PART_DEADLINE_S:g} s")
            more = len(part.data)
            if self.held_bytes + more > MAX_HELD_BYTES or self.held[peer] + more > MAX_HELD_BYTES // MAX_HELD_SHARE:
                raise Busy("this peer holds as many large requests as it has room for")
            before = assembly.held_bytes
            try:
                ask = assembly.on_part(part)
            finally:
                _add(self.held, peer, assembly.held_bytes - before)
            if ask is not None:
                return ask


@contextmanager
def _counted(counts: Counter[PeerId], peer: PeerId) -> Iterator[None]:
    _add(counts, peer, 1)
    try:
        yield
    finally:
        _add(counts, peer, -1)


def _add(counts: Counter[PeerId], peer: PeerId, more: int) -> None:
    counts[peer] += more
    if not counts[peer]:
        del counts[peer]


def _without_machine_options(ask: Ask) -> Ask:
    options = msgspec.structs.replace(ask.request.options, num_gpu=None, num_thread=None)
    return msgspec.structs.replace(ask, request=msgspec.structs.replace(ask.request, options=options))


class _Exchange:
    """One request that was accepted, until its answer is sent or nobody wants it any more."""

    def __init__(self, residency: Residency, frames: FrameStream, ask: Ask, precedence: Precedence) -> None:
        self._residency = residency
        self._precedence = precedence
        self._frames = frames
        self._ask = ask
        self._error: PeerGone | RemoteProtocolError | None = None
        self._hurry = trio.Event()  # what was made is not to wait for what may follow

    async def run(self) -> None:
        # The engine may be MAX_EVENTS ahead of the wire, not more: a slow requester slows the engine down.
        made, ready = trio.open_memory_channel[Event | Failure](MAX_EVENTS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, ready, nursery.cancel_scope)
            nursery.start_soon(self._watch, nursery.cancel_scope)
            await self._make(
                made
            )  # at once: every turn of the event loop before the engine is asked is time that is waited
        if self._error is not None:
            raise self._error

    async def _watch(self, scope: trio.CancelScope) -> None:
        """The requester has nothing more to say; whatever comes, it no longer wants (or may not have) the answer."""
        try:
            extra = await self._frames.try_receive(ASK_PART)
            if extra is not None:
                self._error = RemoteProtocolError("the peer sent more after its request was whole")
        except (PeerGone, RemoteProtocolError) as error:
            self._error = error
        _log.debug("requester left")
        scope.cancel()

    async def _make(self, made: trio.MemorySendChannel[Event | Failure]) -> None:
        async with made:
            try:
                with ExitStack() as waiting:
                    waiting.enter_context(self._precedence())
                    async with self._residency.open_answer(self._ask, self._frames.peer) as events:
                        async for event in events:
                            waiting.close()
                            await self._put(made, event)
            except MeshmaxError as error:
                # Those that are turned away are counted; under overload they would be all that the log says.
                (_log.debug if isinstance(error, Busy) else _log.info)("request failed", code=error.code)
                await made.send(failure_of(error))
            finally:
                self._hurry.set()

    async def _put(self, made: trio.MemorySendChannel[Event | Failure], event: Event) -> None:
        """Without a turn of the event loop where there is room: what the engine said in one breath goes out in one frame."""
        try:
            made.send_nowait(event)
        except trio.WouldBlock:
            self._hurry.set()
            await made.send(event)
        if isinstance(event, Finish):
            self._hurry.set()

    async def _send(self, ready: trio.MemoryReceiveChannel[Event | Failure], scope: trio.CancelScope) -> None:
        try:
            await _send(self._frames, _ACCEPTED)
            await self._send_all(ready)
        except PeerGone as error:
            self._error = error
        scope.cancel()  # the answer is out: nothing that the watcher could see matters any more

    async def _send_all(self, ready: trio.MemoryReceiveChannel[Event | Failure]) -> None:
        told_s = trio.current_time()  # the last word that was no KeepAlive
        next_s = -math.inf  # before then it waits for what may come with it
        while (batch := await self._next_batch(ready, told_s, next_s)) is not None:
            if batch:
                told_s = trio.current_time()
                next_s = told_s + pause_s(self._residency.load().running)
            try:
                sendable = _encode(batch)
            except LocalProtocolError as error:  # an event that no frame can carry
                await _send(self._frames, REPLY.encode(failure_of(error)))
                return
            for frame in sendable:
                await _send(self._frames, frame)

    async def _next_batch(
        self, ready: trio.MemoryReceiveChannel[Event | Failure], told_s: float, next_s: float
    ) -> list[Event | Failure] | None:
        """What came before ``next_s``, or comes then; [] if nothing does for too long after ``told_s``, None at the end."""
        now = trio.current_time()
        silent_s = now + keep_alive_s(now - told_s)
        batch: list[Event | Failure] = []
        try:
            if next_s > now:
                with trio.move_on_at(next_s):
                    await self._hurry.wait()
                    self._hurry = trio.Event()
                _take_ready(ready, batch)
            if not batch:
                with trio.move_on_at(silent_s):
                    batch.append(await ready.receive())
                _take_ready(ready, batch)
        except trio.EndOfChannel:
            return batch or None
        return batch


def _take_ready(ready: trio.MemoryReceiveChannel[Event | Failure], batch: list[Event | Failure]) -> None:
    with suppress(trio.WouldBlock):
        while len(batch) < MAX_EVENTS:
            batch.append(ready.receive_nowait())


def _encode(batch: list[Event | Failure]) -> list[bytes]:
    if not batch:
        return [REPLY.encode(KeepAlive())]
    events = [item for item in batch if not isinstance(item, Failure)]
    frames = events_frames(events) if events else []
    return frames + [REPLY.encode(item) for item in batch if isinstance(item, Failure)]


async def _send(frames: FrameStream, frame: bytes) -> None:
    with trio.move_on_after(SEND_DEADLINE_S) as scope:
        await frames.stream.send_all(frame)
    if scope.cancelled_caught:
        raise PeerGone(f"the requester took nothing for {SEND_DEADLINE_S:g} s")


async def _drain(frames: FrameStream) -> None:
    """Read on after a refusal until the requester has closed, so that the refusal is not lost in a reset."""
    with trio.move_on_after(PART_DEADLINE_S):
        while await frames.try_receive(ASK_PART) is not None:
            pass
