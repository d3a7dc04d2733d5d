"""The words of MEMBER between two peers: recognising each other, certificates, revocations.

Rules: tags first; who is of another mesh learns nothing but that. In the open mesh that is all, and costs one round trip. In
a private one the dialling side shows its chain, the other verifies it before it shows its own, and revocations are made the
same on both sides where they differ; only then both say Welcome. Whoever refuses says why, and shows who was revoked the signed
notice, so that it believes it. See wire.membership for the messages.
Not here: what is done with who was admitted (services.membership), deadlines (net.admission).
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

import trio

from meshmax.base.errors import MeshmaxError, NotAMember, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import MAX_REVOCATIONS, RevocationNotice
from meshmax.core.chains import clock_hint
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.standing import Member, Standing
from meshmax.wire import membership as wire
from meshmax.wire.failure import Failure, error_of, failure_of

OTHER_MESH: Final = "the two peers are in different meshes"
MAX_MESSAGES: Final = -(-MAX_REVOCATIONS // wire.REVOCATIONS_PER_MESSAGE)  # of revocations, one after the other

# Takes in what a peer told; what is new is kept and passed on.
Take = Callable[[Sequence[RevocationNotice], PeerId], Awaitable[None]]


class _Told(NotAMember):
    """The peer refused us."""


async def admit(
    stream: Stream,
    direction: Literal["in", "out"],
    standing: Standing,
    unix_now: Callable[[], float],
    take: Take,
) -> Member | None:
    """The member at the other end of ``stream``; None in the open mesh. Raises NotAMember, RemoteProtocolError, PeerGone."""
    frames = FrameStream(stream)
    try:
        await _recognise(frames, direction, standing)
        if standing.core is None:
            return None
        return await _Introduction(frames, standing, unix_now, take).run(direction)
    except _Told:
        raise
    except NotAMember as error:
        refusal = error
    await frames.send(wire.MEMBER, failure_of(refusal))
    raise refusal


async def receive(frames: FrameStream) -> wire.MemberMessage:
    """The peer's next message. Raises what it refuses with."""
    message = await frames.receive(wire.MEMBER)
    if isinstance(message, Failure):
        error = error_of(message)
        raise _Told(error.message) if isinstance(error, NotAMember) else error
    return message


async def receive_notices(frames: FrameStream, first: wire.MemberMessage, take: Take) -> None:
    """Take in revocations, beginning with those of ``first``, to the last. Raises RemoteProtocolError."""
    message = first
    for _ in range(MAX_MESSAGES):
        if not isinstance(message, wire.Revocations):
            break
        await take(message.notices, frames.peer)
        if message.last:
            return
        message = await receive(frames)
    raise RemoteProtocolError("the peer sent something else, or more, than the revocations that were due")


async def tell_notices(frames: FrameStream, notices: Sequence[RevocationNotice]) -> None:
    """Send ``notices``, to the last."""
    for message in wire.revocation_messages(notices):
        await frames.send(wire.MEMBER, message)


async def _recognise(frames: FrameStream, direction: Literal["in", "out"], standing: Standing) -> None:
    own_id, peer_id = standing.signer.peer_id, frames.peer
    own = wire.Tag(wire.mesh_tag(standing.mesh, own_id, peer_id, direction))
    due = wire.mesh_tag(standing.mesh, peer_id, own_id, "in" if direction == "out" else "out")
    if direction == "out":
        await frames.send(wire.MEMBER, own)
    theirs = await receive(frames)
    if not isinstance(theirs, wire.Tag):
        raise RemoteProtocolError("the peer began its admission with something else than a tag")
    if not hmac.compare_digest(theirs.value, due):
        raise NotAMember(OTHER_MESH)
    if direction == "in":
        await frames.send(wire.MEMBER, own)


class _Introduction:
    """Certificates and revocations, after both sides know that they mean the same mesh."""

    def __init__(self, frames: FrameStream, standing: Standing, unix_now: Callable[[], float], take: Take) -> None:
        self._frames, self._standing, self._unix_now, self._take = frames, standing, unix_now, take
        self._notices = standing.core.revocations.notices() if standing.core else ()
        self._known = wire.notice_digest(self._notices)

    async def run(self, direction: Literal["in", "out"]) -> Member:
        own = wire.Credentials(self._standing.chain, self._known, int(self._unix_now()))
        if direction == "out":
            await self._frames.send(wire.MEMBER, own)
        theirs = await receive(self._frames)
        if isinstance(theirs, wire.Revocations):  # of ourselves: a refusal follows
            await receive_notices(self._frames, theirs, self._take)
            theirs = await receive(self._frames)
        if not isinstance(theirs, wire.Credentials):
            raise RemoteProtocolError("the peer showed no certificate")
        try:
            verdict: Member | NotAMember = self._verify(theirs)
        except NotAMember as error:
            verdict = error
        if isinstance(verdict, NotAMember):
            await self._show_why(theirs)
            raise verdict
        member = verdict
        if direction == "in":
            await self._frames.send(wire.MEMBER, own)
        if theirs.known != self._known:
            await self._swap_notices()
            member = self._verify(theirs)
        await self._frames.send(wire.MEMBER, wire.Welcome())
        if not isinstance(await receive(self._frames), wire.Welcome):
            raise RemoteProtocolError("the peer did not end its admission")
        return member

    def _verify(self, theirs: wire.Credentials) -> Member:
        now_s = self._unix_now()
        try:
            return self._standing.verify(theirs.chain, self._frames.peer, now_s)
        except NotAMember as error:
            hint = clock_hint(theirs.now_s, now_s)
            raise NotAMember(f"{error.message} ({hint})" if hint else error.message) from None

    async def _show_why(self, theirs: wire.Credentials) -> None:
        if self._standing.core is None or theirs.known == self._known:
            return  # it knows already
        holders = (self._frames.peer, *(signed.signer for signed in theirs.chain))
        if notices := self._standing.core.revocations.about(holders):
            await tell_notices(self._frames, notices)

    async def _swap_notices(self) -> None:
        # Both ways at once: each side's may be more than a stream holds unread.
        failed: list[MeshmaxError] = []

        async def tell() -> None:
            try:
                await tell_notices(self._frames, self._notices)
            except MeshmaxError as error:
                failed.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            try:
                await receive_notices(self._frames, await receive(self._frames), self._take)
            except MeshmaxError as error:
                failed.append(error)
                nursery.cancel_scope.cancel()
        if failed:
            raise failed[0]
