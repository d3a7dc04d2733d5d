"""Agreeing on a stream's protocol, or a connection's: multistream-select 1.0, the opener's side.

Decided here: both lines go out at once and both answers are read afterwards, which saves a round trip; who has the first
message ready sends it along (`EagerStream`), which saves another. So it is with Noise and Yamux on connections that we begin,
where there is nothing else to choose (`propose_on`). The answering side is the library's and takes either, but where the whole
proposal is there at once (`parse_proposal`; net.swarm).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import trio

from meshmax.base.errors import ConfigError, MeshmaxError, PeerGone, RemoteProtocolError, VersionMismatch
from meshmax.base.ids import PeerId
from meshmax.ports import Stream

_MULTISTREAM: Final = "/multistream/1.0.0"
_MAX_LINE_BYTES: Final = 127  # what one byte of varint can say; ours are all that short
MAX_PROPOSAL_BYTES: Final = 2 * (1 + _MAX_LINE_BYTES)


def parse_proposal(data: bytes) -> tuple[str, int] | None:
    """The protocol that whoever opened a stream wants, and how many of the stream's first bytes say so; None: not to be seen.

    Who takes it answers in the same words (`proposal`).
    """
    head = _delimited(_MULTISTREAM)
    if not data.startswith(head) or len(data) == len(head):
        return None
    end = len(head) + 1 + data[len(head)]
    line = data[len(head) + 1 : end]
    if end > len(data) or not line.endswith(b"\n"):
        return None
    return line[:-1].decode(errors="replace"), end


async def negotiate(stream: Stream, protocol: str) -> None:
    """Agree on ``protocol`` over a fresh ``stream``. Raises VersionMismatch, RemoteProtocolError, PeerGone."""
    await propose(stream, protocol)
    await hear(stream, protocol)


async def propose(stream: Stream, protocol: str) -> None:
    """Say that we want ``protocol``."""
    await stream.send_all(proposal(protocol))


def proposal(protocol: str) -> bytes:
    """What says that we want ``protocol``."""
    return _delimited(_MULTISTREAM) + _delimited(protocol)


async def hear(stream: Stream, protocol: str) -> None:
    """Read the peer's answers to `propose`. Raises VersionMismatch, RemoteProtocolError, PeerGone; the stream is reset."""
    await _Answers(protocol).read(stream)


class _Answers:
    """The peer's two lines, as far as they have come: reading them may be cancelled, and goes on where it was.

    ``rest``: what came and was not taken, the beginning of a line or what follows both.
    """

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        self._due = [protocol, _MULTISTREAM]
        self.rest = b""

    async def read(self, stream: Stream, ahead_bytes: int = 0) -> None:
        """Until both have come; at once where they have. What follows them may be read ahead. Raises as `hear`."""
        while self._due:
            needs = 1 + self.rest[0] - len(self.rest) if self.rest else 1
            part = await stream.receive_some(max(needs, ahead_bytes))
            try:
                if not part:
                    raise PeerGone("the peer closed the stream before it was open")
                self._take(part)
            except MeshmaxError:
                with trio.CancelScope(shield=True):  # which does not block
                    await stream.reset()
                raise

    def _take(self, part: bytes) -> None:
        self.rest += part
        while self._due and self.rest:
            length = self.rest[0]
            if not 1 <= length <= _MAX_LINE_BYTES:
                raise RemoteProtocolError("the peer's answer is not multistream-select's")
            if len(self.rest) <= length:
                return
            line, self.rest = self.rest[1 : 1 + length].decode(errors="replace").rstrip("\n"), self.rest[1 + length :]
            if line == "na":
                raise VersionMismatch(f"the peer does not speak {self._protocol}")
            if line != self._due.pop():
                raise RemoteProtocolError("the peer's answer is not multistream-select's")


class EagerStream:
    """A fresh stream whose protocol is proposed with the first message; satisfies ports.Stream.

    What is sent goes out at once; the first `receive_some` reads the answer and raises what `hear` raises.
    """

    def __init__(self, stream: Stream, protocol: str) -> None:
        self._stream = stream
        self._unsaid = proposal(protocol)
        self._answers = _Answers(protocol)

    @property
    def peer(self) -> PeerId:
        """See ports.Stream."""
        return self._stream.peer

    @property
    def address(self) -> str:
        """See ports.Stream."""
        return self._stream.address

    async def receive_some(self, max_bytes: int) -> bytes:
        """See ports.Stream."""
        if self._unsaid:
            await self.send_all(b"")
        await self._answers.read(self._stream, max_bytes)
        if rest := self._answers.rest:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._answers.rest = rest[max_bytes:]
            return rest[:max_bytes]
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes) -> None:
        """See ports.Stream."""
        unsaid, self._unsaid = self._unsaid, b""
        await self._stream.send_all(unsaid + data if unsaid else data)

    async def send_eof(self) -> None:
        """See ports.Stream."""
        if self._unsaid:
            await self.send_all(b"")
        await self._stream.send_eof()

    async def reset(self) -> None:
        """See ports.Stream."""
        await self._stream.reset()

    async def aclose(self) -> None:
        """See ports.Stream."""
        await self._stream.aclose()


async def propose_on(connection: Any, protocol: str, refused: Callable[[], Exception], agreed: trio.Event) -> None:
    """Say on one of the library's connections that we want ``protocol``; its next `read` reads the answers first.

    That read sets ``agreed``, or raises what ``refused`` makes where the peer says something else.
    """
    await connection.write(proposal(protocol))
    read = connection.read

    async def read_answers_first(n: int | None = None) -> bytes:
        for line in (_MULTISTREAM, protocol):
            due, answer = _delimited(line), b""
            while len(answer) < len(due):
                # The length by itself: some readers wait for all that they are asked for, and "na" is shorter.
                part = await read(len(due) - len(answer) if answer else 1)
                if not part:
                    return b""
                answer += part
                if not due.startswith(answer):
                    raise refused()
        del connection.read  # its class's is there again; to set that would make a ring of references
        agreed.set()
        return bytes(await read(n))

    connection.read = read_answers_first


def _delimited(line: str) -> bytes:
    data = line.encode() + b"\n"
    if len(data) > _MAX_LINE_BYTES:
        raise ConfigError(f"a protocol id has at most {_MAX_LINE_BYTES - 1} bytes: {line[:100]}")
    return bytes([len(data)]) + data
