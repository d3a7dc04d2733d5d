"""One attempt at a better path, done: what core.attempt decides is said, prepared, started, adopted and closed here.

The run owns its stream, port, channel and whatever they find, until it ends; the stream that was adopted belongs to the swarm
then or, of a lane, to who wanted it. A TCP connection that becomes a lane is first proved to be of this attempt by both ends,
so that one to somebody else's machine, or one too many, does not count; that it is the right peer's its lane proves by itself.
Not here: decisions, which attempts there are (services.signalling).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec
import trio

from meshmax.base.errors import ConnectError, MeshmaxError, PeerGone
from meshmax.base.status import Path
from meshmax.base.traversal import TurnServer
from meshmax.core.attempt import Attempt
from meshmax.core.attempt_actions import Action, Adopt, Drop, End, Method, Prepare, Send, StartTcp, StartUdp, Stop
from meshmax.core.candidates import Screen
from meshmax.net.addresses import multiaddr_of
from meshmax.ports import ByteStream, Channels, Puncher, Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.telemetry.log import get_logger
from meshmax.wire import signal as wire
from meshmax.wire.protocols import SIGNAL

LAST_WORD_S: Final = 1.0  # for what is still to be said when an attempt ends
MAX_UNSENT: Final = 32  # messages; an attempt says about four
_PROOF_BYTES: Final = 16

_log = get_logger("attempt")


class Ways(msgspec.Struct, frozen=True):
    """What makes streams, and where observers are, as they are now. None: that method is not there."""

    puncher: Puncher | None = None
    channels: Channels | None = None
    observers: tuple[tuple[str, int], ...] = ()
    stun: tuple[tuple[str, int], ...] = ()
    turn: tuple[TurnServer, ...] = ()


class AttemptRun:
    """See the module. ``perform`` is given every action that an event here brings, and gives back ours by `do`."""

    def __init__(
        self,
        attempt: Attempt,
        swarm: Swarm,
        ways: Ways,
        screen: Callable[[wire.Answer], Screen],
        perform: Callable[[Sequence[Action]], None],
    ) -> None:
        self.attempt = attempt
        self.end: End | None = None
        self.ended = trio.Event()
        self._swarm, self._ways, self._screen, self._perform = swarm, ways, screen, perform
        self._unsent, self._to_send = trio.open_memory_channel[wire.Message](MAX_UNSENT)
        self._said = trio.Event()  # everything that will ever be
        self._stream: Stream | None = None  # that we opened
        self._streams: dict[int, tuple[Method, ByteStream]] = {}
        self._fruitful: set[Method] = set()  # those that made any
        self._scopes: dict[Method | int, trio.CancelScope] = {}
        self._tcp: StartTcp | None = None
        self._udp: StartUdp | None = None
        self._tcp_go, self._udp_go = trio.Event(), trio.Event()
        self._again = trio.Event()  # deadlines may be others
        self._nursery: trio.Nursery | None = None
        self._count = 0
        self._marks: dict[str, float] = {}  # when each kind of action came first

    # --- as a whole --------------------------------------------------------------------------------------------------

    async def run(self, actions: Sequence[Action], frames: FrameStream | None = None) -> End:
        """Until it ends. ``actions``: what began it; ``frames``: of the peer's offer, None where we lead and open a stream.

        Cancelling tells the peer that it is wanted no more. With the end of an attempt for a lane, `take` gives its stream.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._perform(actions)
                nursery.start_soon(self._talk, frames)
                nursery.start_soon(self._tick)
                await self.ended.wait()
                with trio.move_on_after(LAST_WORD_S):
                    await self._said.wait()
                nursery.cancel_scope.cancel()
        except BaseException:
            if self.attempt.purpose == "lane" and (stream := self.take()) is not None:
                stream.close()  # nobody will know of it
            raise
        finally:
            self._nursery = None
            with trio.CancelScope(deadline=trio.current_time() + LAST_WORD_S, shield=True):
                await self._clean(frames)
        assert self.end is not None
        self._log_end(self.end)
        return self.end

    def _log_end(self, end: End) -> None:
        began = self.attempt.started_s
        marks = {what: round(at_s - began, 3) for what, at_s in self._marks.items()}
        _log.debug(
            "attempt ended",
            peer=self.attempt.peer,
            purpose=self.attempt.purpose,
            lead=self.attempt.lead,
            outcome=end.outcome,
            path=end.path,
            after_s=marks,
            tried=[f"{what} ({stage}: {cause})" for what, stage, cause in end.tried],
        )

    def take(self) -> ByteStream | None:
        """The stream that the attempt ended with; its owner is the caller, or the swarm."""
        number = self.end.number if self.end else None
        return self._streams[number][1] if number is not None else None

    def do(self, action: Action) -> None:
        """Perform what the core decided. Never blocks, never calls the core."""
        self._marks.setdefault(type(action).__name__, trio.current_time())
        match action:
            case Send():
                self._send(action.message)
            case Prepare():
                self._prepare(action)
            case StartTcp():
                self._tcp = action
                self._tcp_go.set()
            case StartUdp():
                self._udp = action
                self._udp_go.set()
            case Stop():
                self._stop(action.method)
            case Adopt():
                self._start_adopting(action)
            case Drop():
                self._stop(action.number)
                self._streams.pop(action.number)[1].close()
            case End():
                self._finish(action)

    def look_again(self) -> None:
        """Its deadlines may be others."""
        self._again.set()

    # --- signalling --------------------------------------------------------------------------------------------------

    def _send(self, message: wire.Message) -> None:
        with suppress(trio.WouldBlock, trio.ClosedResourceError):  # it stalls: deadlines end it
            self._unsent.send_nowait(message)

    async def _talk(self, frames: FrameStream | None) -> None:
        try:
            if frames is None:
                self._stream = await self._swarm.open_stream(self.attempt.peer, SIGNAL, eager=True)
                frames = FrameStream(self._stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, frames)
                async for message in self._to_send:
                    await frames.send(wire.MESSAGES, message)
                self._said.set()
        except* MeshmaxError as group:
            self._lost(group)
        finally:
            self._said.set()

    async def _listen(self, frames: FrameStream) -> None:
        while (message := await frames.try_receive(wire.MESSAGES)) is not None:
            screen = self._screen(message) if isinstance(message, wire.Answer) else None
            self._perform(self.attempt.on_message(message, screen, trio.current_time()))
        raise PeerGone("the peer ended the signalling")

    def _lost(self, group: BaseExceptionGroup[MeshmaxError]) -> None:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._perform(self.attempt.on_stream_lost(trio.current_time(), str(error)))

    async def _clean(self, frames: FrameStream | None) -> None:
        """Close what is ours; where it was cut off, the peer is told before."""
        cut = self.end is None
        if cut:
            self._perform(self.attempt.withdraw("withdrawn", "withdrawn", trio.current_time()))
        for number, (_, stream) in self._streams.items():
            if self.end is None or number != self.end.number:
                stream.close()
        if frames is None and self._stream is not None:
            frames = FrameStream(self._stream)
        if cut and frames is not None:
            with suppress(trio.WouldBlock, trio.EndOfChannel, MeshmaxError):
                while True:
                    await frames.send(wire.MESSAGES, self._to_send.receive_nowait())
        self._to_send.close()
        if self._stream is not None:
            await self._stream.aclose()

    async def _tick(self) -> None:
        while True:
            self._again = trio.Event()
            deadline = self.attempt.deadline()
            with trio.CancelScope(deadline=trio.current_time() + 3600.0 if deadline is None else deadline) as scope:
                await self._again.wait()
            if scope.cancelled_caught:
                self._perform(self.attempt.tick(trio.current_time()))

    # --- methods -----------------------------------------------------------------------------------------------------

    def _prepare(self, action: Prepare) -> None:
        if self._nursery is None:
            return
        if action.tcp:
            self._scopes["punch-tcp"] = trio.CancelScope()
            self._nursery.start_soon(self._run_method, "punch-tcp", self._punch)
        if action.udp:
            self._scopes["punch-udp"] = trio.CancelScope()
            self._nursery.start_soon(self._run_method, "punch-udp", self._connect)

    async def _run_method(self, method: Method, work: Callable[[], Awaitable[None]]) -> None:
        """Until it finds no more. Its causes are told, whatever they are."""
        stage, cause = "connect", "no connection was made"
        with self._scopes[method]:
            try:
                await work()
            except MeshmaxError as error:
                running = self._tcp_go.is_set() if method == "punch-tcp" else self._udp_go.is_set()
                stage, cause = "connect" if running else "prepare", error.message
            else:
                if method in self._fruitful:
                    cause = "what was made was not taken"
        self._perform(self.attempt.on_method_over(method, stage, cause, trio.current_time()))

    async def _punch(self) -> None:
        assert self._ways.puncher is not None
        async with self._ways.puncher.open_port(self._ways.observers) as port:
            self._perform(self.attempt.on_tcp_ready(port.candidates, trio.current_time()))
            await self._tcp_go.wait()
            assert self._tcp is not None
            await trio.sleep_until(max(self._tcp.at_s, trio.current_time()))
            async with trio.open_nursery() as nursery:
                found, streams = trio.open_memory_channel[ByteStream](0)  # 0: none is left inside when it is cut off
                nursery.start_soon(self._collect, streams)
                async with found:
                    await port.run(self._tcp.targets, found)

    async def _collect(self, streams: trio.MemoryReceiveChannel[ByteStream]) -> None:
        async for stream in streams:
            self._found("punch-tcp", stream)

    async def _connect(self) -> None:
        assert self._ways.channels is not None
        turn = self._ways.turn if self.attempt.means.turn else ()
        async with self._ways.channels.open_channel(self._ways.stun, turn) as end:
            if self.attempt.lead:
                self._perform(self.attempt.on_udp_ready(await end.offer(), trio.current_time()))
            await self._udp_go.wait()
            assert self._udp is not None
            if self.attempt.lead:
                await end.accept(self._udp.sdp)
            else:
                self._perform(self.attempt.on_udp_ready(await end.answer(self._udp.sdp), trio.current_time()))
            self._found("punch-udp", await end.connected())

    def _stop(self, what: Method | int) -> None:
        if what in self._scopes:
            self._scopes[what].cancel()

    # --- streams -----------------------------------------------------------------------------------------------------

    def _found(self, method: Method, stream: ByteStream) -> None:
        self._count += 1
        self._streams[self._count] = (method, stream)
        self._fruitful.add(method)
        self._perform(self.attempt.on_found(method, self._count, trio.current_time()))

    def _start_adopting(self, action: Adopt) -> None:
        self._scopes[action.number] = trio.CancelScope()
        if self._nursery is not None:
            self._nursery.start_soon(self._adopt, action)

    async def _adopt(self, action: Adopt) -> None:
        stream = self._streams[action.number][1]
        cause: str | None = None
        with self._scopes[action.number]:
            try:
                if self.attempt.purpose == "control":
                    await self._adopt_control(action, stream)
                else:
                    await self._prove(action, stream)
            except MeshmaxError as error:
                cause = error.message
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                cause = f"the connection was lost: {str(error)[:100] or 'closed'}"
            if cause is None:
                self._perform(self.attempt.on_adopted(action.number, trio.current_time()))
            else:
                stream.close()
                self._perform(self.attempt.on_adopt_failed(action.number, cause, trio.current_time()))

    async def _adopt_control(self, action: Adopt, stream: ByteStream) -> None:
        method = self._streams[action.number][0]
        path: Path = "punched-tcp" if method == "punch-tcp" else "relay" if self.attempt.means.turn else "punched-udp"
        address = multiaddr_of(*stream.remote)
        if method == "punch-udp":
            address = address.replace("/tcp/", "/udp/")
        await self._swarm.adopt(stream, self.attempt.peer, action.side, path, address)

    async def _prove(self, action: Adopt, stream: ByteStream) -> None:
        """Raises ConnectError, OSError and what else the stream does."""
        asked, answer = (
            self.attempt.id,
            hashlib.sha256(b"meshmax signal lane" + self.attempt.id).digest()[:_PROOF_BYTES],
        )
        if action.side == "out":
            await stream.send_all(asked)
            await _expect(stream, answer)
        else:
            await _expect(stream, asked)
            await stream.send_all(answer)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, end: End) -> None:
        self.end = end
        self._unsent.close()
        for what, scope in self._scopes.items():
            if what != end.number:
                scope.cancel()
        self.ended.set()


async def _expect(stream: ByteStream, proof: bytes) -> None:
    got = b""
    while len(got) < len(proof):  # never more: what follows is the lane's
        data = await stream.receive_some(len(proof) - len(got))
        if not data:
            raise ConnectError("the other end closed the connection")
        got += data
    if not hmac.compare_digest(got, proof):
        raise ConnectError("somebody else is at the other end")
