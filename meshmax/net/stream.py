"""A libp2p stream as ports.Stream: bounded writes, reads that lose nothing when cancelled, an end that always comes.

Rules: a write goes out in the wire's steps with a checkpoint between; a cancelled write costs this stream, never
the connection (net.wire finishes what the cipher has numbered). A read waits cancellably for data and takes it in one go.
`reset` and `aclose` return at once; the rest goes on in the swarm's nursery. After `aclose` the peer has CLOSE_TIMEOUT_S to
end its side; then the stream is reset.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from typing import Any, Final

import trio

from meshmax.base.errors import PeerGone
from meshmax.base.foreign import words_of
from meshmax.base.ids import PeerId
from meshmax.net import library, limits
from meshmax.net.muxer import ACK
from meshmax.net.negotiation import MAX_PROPOSAL_BYTES, parse_proposal, proposal

READS_A_TURN: Final = 16  # of what was there already, before others have a turn
_DRAIN_BYTES: Final = 65536


class LibraryStream:
    """One open stream; satisfies ports.Stream."""

    def __init__(
        self,
        peer: PeerId,
        muxed: Any,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        on_close: Callable[[LibraryStream], None],
    ) -> None:
        """``muxed``: net.muxer's. ``spawn`` runs the farewell in the swarm's nursery; ``on_close`` is called when it is done."""
        self.peer = peer
        self.asks = False  # it is but a question about its link
        self._spawn = spawn
        self._on_close = on_close
        self.muxed = muxed
        self._wire = library.wire_of(muxed.conn)
        self._over = False
        self._eof_sent = False
        self._unsaid = b""  # goes out before what is sent next
        self._unpaused = 0  # reads that found something there and took no turn of the event loop

    @property
    def address(self) -> str:
        """See ports.Stream."""
        return self._wire.address

    def try_agree(self, served: Container[str]) -> str | None:
        """The protocol of ``served`` that the peer proposes, if that is there to see; the answer goes with what is sent next."""
        found = parse_proposal(bytes(self._buffer[:MAX_PROPOSAL_BYTES]))
        if found is None or found[0] not in served or not self.muxed.take(found[1]):
            return None
        self._unsaid = proposal(found[0])
        return found[0]

    @property
    def has_more(self) -> bool:
        """Whether there is something to read."""
        return bool(self._buffer)

    async def receive_some(self, max_bytes: int) -> bytes:
        """See ports.Stream."""
        if self._over:
            raise PeerGone("the stream was closed here")
        try:
            if self.has_more:
                await self._pause()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
                await self._wait_readable()
            if data := self.muxed.take(max_bytes):
                if self.muxed.owes:
                    with trio.CancelScope(shield=True):
                        await self.muxed.give_credit(len(data))
                return bytes(data)
            # The library takes bytes out of its buffer and then sends a window update; cancelled there they would be lost.
            with trio.CancelScope(shield=True):
                return await self._read(max_bytes)
        except library.failures() as error:
            self.give_up()
            raise PeerGone(_why(error)) from error

    async def _pause(self) -> None:
        """A checkpoint, though a turn of the event loop only now and then: it costs as much as many a read."""
        self._unpaused += 1
        if self._unpaused % READS_A_TURN == 0 or len(self._buffer) >= limits.READ_AHEAD_BYTES:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    @property
    def _buffer(self) -> bytes | bytearray:
        return self.muxed.conn.stream_buffers.get(self.muxed.stream_id, b"")  # type: ignore[no-any-return]

    async def _wait_readable(self) -> None:
        muxed, connection, stream_id = self.muxed, self.muxed.conn, self.muxed.stream_id
        while not (
            connection.stream_buffers.get(stream_id)
            or muxed.recv_closed
            or muxed.reset_received
            or muxed.closed
            or connection.event_shutting_down.is_set()
        ):
            event = connection.stream_events.get(stream_id)
            if event is None:
                return
            if muxed.unsaid == ACK:  # there is nothing to go with: the peer may wait for it
                await muxed.say()
                continue
            if event.is_set():  # set for data that was read since; the library renews it in the same way
                event = connection.stream_events[stream_id] = trio.Event()
            await event.wait()

    async def _read(self, max_bytes: int) -> bytes:
        from libp2p.stream_muxer.exceptions import MuxedStreamEOF

        muxed = self.muxed
        try:
            return bytes(await muxed.read(max_bytes))
        except MuxedStreamEOF:
            # The library says EOF for a lost connection, too: only the peer's own FIN is an end.
            if muxed.reset_received or muxed.conn.event_shutting_down.is_set() or not muxed.recv_closed:
                raise PeerGone("the connection was lost") from None
            await trio.lowlevel.cancel_shielded_checkpoint()  # finding that out was none
            return b""

    async def send_all(self, data: bytes) -> None:
        """See ports.Stream."""
        await trio.lowlevel.checkpoint_if_cancelled()  # writing is a checkpoint
        unsaid, self._unsaid = self._unsaid, b""
        view = memoryview(unsaid + data if unsaid else data)
        if not view:
            await trio.lowlevel.checkpoint()
        try:
            step = self._wire.step_bytes
            for start in range(0, len(view), step):
                if self._over or self._eof_sent:
                    raise PeerGone("the stream was closed here")
                await self._wire.wait_room(len(view))
                await self.muxed.write(bytes(view[start : start + step]))
        except library.failures() as error:
            self.give_up()
            raise PeerGone(_why(error)) from error
        except trio.Cancelled:
            self.give_up()
            raise

    async def send_eof(self) -> None:
        """See ports.Stream."""
        await trio.lowlevel.checkpoint()
        if self._over:
            raise PeerGone("the stream was closed here")
        if self._eof_sent:
            return
        if self._unsaid:
            await self.send_all(b"")
        self._eof_sent = True
        try:
            await self.muxed.close()
        except library.failures() as error:
            self.give_up()
            raise PeerGone(_why(error)) from error
        except trio.Cancelled:
            self.give_up()
            raise

    async def reset(self) -> None:
        """See ports.Stream."""
        self.give_up()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def give_up(self) -> None:
        """`reset` without an await, for where something else is on its way already."""
        self._end(self._reset_now)

    async def aclose(self) -> None:
        """See ports.Stream. What the peer still sends is thrown away."""
        self._end(self._close_in_order)
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _end(self, farewell: Callable[[], Awaitable[None]]) -> None:
        if not self._over:
            self._over = True
            self._spawn(farewell)

    async def _close_in_order(self) -> None:
        with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
            try:
                if unsaid := self._unsaid:
                    await self.muxed.write(unsaid)
                await self.muxed.close()
                await self._drain()
            except library.failures():
                scope.cancel()
        await self._reset_now()

    async def _drain(self) -> None:
        muxed = self.muxed
        while not (muxed.recv_closed or muxed.closed):
            await self._wait_readable()
            if not muxed.conn.stream_buffers.get(muxed.stream_id):
                return  # nothing waits and nothing will come: the end, a reset, or the connection's end
            await muxed.read(_DRAIN_BYTES)

    async def _reset_now(self) -> None:
        # Also after an orderly close: on a stream that is closed both ways this sends nothing and tidies up.
        try:
            await self.muxed.reset()
        except library.failures():
            pass
        finally:
            self._on_close(self)


def _why(error: Exception) -> str:
    return f"the stream or its connection was lost ({words_of(error)})"
