"""The Admissions of nodes to which others than members may connect.

Rules: a bootstrap node is in no mesh, so nobody is a member. A peer of an open mesh that serves strangers, or is on its way
into a private mesh, lets anybody connect, from anywhere; members are still only those from where its mesh lives. Who is
refused is told why, and may use what is for anyone on a connection as a guest. Not here: who is a member otherwise
(services.membership).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from meshmax.base.errors import NotAMember
from meshmax.base.ids import PeerId
from meshmax.core.subnets import ip_of
from meshmax.ports import Admission, Stream
from meshmax.services.frames import FrameStream
from meshmax.wire.failure import failure_of
from meshmax.wire.membership import MEMBER

IN_NO_MESH: Final = "this is a bootstrap node, which is in no mesh: give its address as --bootstrap, not as --join"
FROM_ELSEWHERE: Final = (
    "the open mesh is for machines on one LAN: a mesh with certificates has members anywhere (`meshmax mesh new`)"
)


class NoMesh:
    """Nobody is a member."""

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        """See ports.Admission."""
        await _refuse(stream, IN_NO_MESH)

    def check(self, peer_id: PeerId, protocol: str) -> None:
        """See ports.Admission."""
        raise NotAMember(IN_NO_MESH)


class BesideStrangers:
    """Members are those whom ``members`` admits, as long as ``allows`` says yes to the IP address that they come from."""

    def __init__(self, members: Admission, allows: Callable[[str], bool]) -> None:
        self._members, self._allows = members, allows
        self.check = members.check

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        """See ports.Admission."""
        if not self._allows(ip_of(stream.address)):
            await _refuse(stream, FROM_ELSEWHERE)
        await self._members.admit(stream, direction)


async def _refuse(stream: Stream, why: str) -> None:
    error = NotAMember(why)
    await FrameStream(stream).send(MEMBER, failure_of(error))
    raise error
