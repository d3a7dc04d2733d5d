"""Where this node stands in one mesh: its name, our chain, the root key if it is here, what we know of the others.

One `Standing` is one mesh from joining to leaving; changing mesh makes a new one, so that what goes on with an old one
can see that it is over. Not here: how it is kept (store.mesh_files), who is asked (services.membership).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from meshmax.base.errors import NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, SCOPES, Certificate, Chain, MeshId, RevocationNotice, Scope
from meshmax.core.chains import CLOCK_TOLERANCE_S
from meshmax.core.membership import Membership
from meshmax.core.tickets import GivenTicket, Tickets
from meshmax.ports import Signer
from meshmax.store.mesh_files import OwnMesh
from meshmax.wire.membership import sign_certificate

MAX_MEMBERS: Final = 2048  # remembered; four times as many as can be connected


class Member(msgspec.Struct, frozen=True):
    """A peer that has proved to be a member: its ``certificate`` as all of its ``chain`` allows it."""

    certificate: Certificate
    chain: Chain


class Standing:
    """See the module. ``own`` None: the open mesh, in which everybody may everything."""

    def __init__(
        self,
        signer: Signer,
        own: OwnMesh | None = None,
        root: Signer | None = None,
        notices: Iterable[RevocationNotice] = (),
        given: Iterable[GivenTicket] = (),
        now_s: float = 0.0,
    ) -> None:
        self.signer, self.root = signer, root
        self.mesh: MeshId = own.mesh if own else OPEN_MESH
        self.name = own.name if own else ""
        self.chain: Chain = own.chain if own else ()
        self.bootstrap: tuple[str, ...] = own.bootstrap if own else ()  # nodes that tickets named
        self.core = Membership(own.mesh, notices, now_s) if own else None
        self.tickets = Tickets(given)
        self._members: OrderedDict[PeerId, Member] = OrderedDict()  # the longest not asked about first

    @property
    def members(self) -> tuple[tuple[PeerId, Member], ...]:
        """Those that have proved it to us and were not found to be no members any more."""
        return tuple(self._members.items())

    def own(self, now_s: float) -> Certificate | None:
        """Our certificate; None in the open mesh. Raises NotAMember: it is expired or revoked."""
        return self.core.verify(self.chain, self.signer.peer_id, now_s) if self.core else None

    def scopes(self, now_s: float) -> tuple[Scope, ...]:
        """What we may; () if our certificate is worth nothing any more."""
        try:
            own = self.own(now_s)
        except NotAMember:
            return ()
        return own.scopes if own else SCOPES

    def verify(self, chain: Chain, peer_id: PeerId, now_s: float) -> Member:
        """The member with ``chain``. Raises NotAMember."""
        if self.core is None:
            raise NotAMember("this peer is in the open mesh, in which nobody has a certificate")
        return Member(self.core.verify(chain, peer_id, now_s), chain)

    def confirm(self, peer_id: PeerId, member: Member, now_s: float) -> None:
        """Raises NotAMember if what was verified a moment ago has ceased to be true. Cheap: see `fallen`."""
        if why := self._fault(peer_id, member, now_s):
            raise NotAMember(why)

    def note(self, peer_id: PeerId, member: Member) -> None:
        """``peer_id`` has proved to be ``member``; the chain that it showed last counts."""
        self._members[peer_id] = member
        self._members.move_to_end(peer_id)
        if len(self._members) > MAX_MEMBERS:
            self._members.popitem(last=False)

    def knows(self, peer_id: PeerId) -> bool:
        """Whether it has proved to be a member, and was not found to be none any more."""
        return peer_id in self._members

    def forget(self, peer_id: PeerId) -> None:
        """It is no member any more."""
        self._members.pop(peer_id, None)

    def member(self, peer_id: PeerId, now_s: float) -> Member:
        """The member ``peer_id``, if it still is one by the clock. Raises NotAMember. Cheap: no signature is checked."""
        member = self._members.get(peer_id)
        if member is None:
            raise NotAMember("the peer has not shown a certificate of this mesh")
        self._members.move_to_end(peer_id)  # who is connected asks now and then, and so is never the one forgotten
        if now_s > member.certificate.expires_at_s + CLOCK_TOLERANCE_S:
            raise NotAMember("the peer's certificate has expired")
        return member

    def fallen(self, now_s: float) -> tuple[tuple[PeerId, str], ...]:
        """Known members that are none any more, and why."""
        return tuple(
            (peer_id, why) for peer_id, member in self._members.items() if (why := self._fault(peer_id, member, now_s))
        )

    def _fault(self, peer_id: PeerId, member: Member, now_s: float) -> str:
        late = now_s > member.certificate.expires_at_s + CLOCK_TOLERANCE_S
        holders = (peer_id, *(signed.signer for signed in member.chain))
        if self.core is None or not (late or any(self.core.revocations.revoked_at_s(one) for one in holders)):
            return ""  # signatures were checked when it came
        try:
            self.verify(member.chain, peer_id, now_s)
        except NotAMember as error:
            return error.message
        return ""

    def next_expiry_s(self, peers: Iterable[PeerId]) -> float | None:
        """When the first of ``peers`` ceases to be a member by the clock, Unix seconds."""
        known = (self._members[peer_id].certificate for peer_id in peers if peer_id in self._members)
        return min((certificate.expires_at_s + CLOCK_TOLERANCE_S for certificate in known), default=None)

    def issue(self, peer_id: PeerId, scopes: Sequence[Scope], now_s: float, serial: int = 0) -> Chain:
        """A chain for ``peer_id``, signed by the root if its key is here, else by us. Raises OutOfScope, NotAMember."""
        if self.core is None:
            raise NotAMember("the open mesh has no certificates: `meshmax mesh new NAME` makes a mesh that has")
        if self.root is not None:
            issued = self.core.issue(peer_id, scopes, now_s, issuer=(), issuer_id=self.root.peer_id, serial=serial)
            return (sign_certificate(issued, self.root.peer_id, self.root.sign),)
        own_id = self.signer.peer_id
        issued = self.core.issue(peer_id, scopes, now_s, issuer=self.chain, issuer_id=own_id, serial=serial)
        return (sign_certificate(issued, own_id, self.signer.sign), *self.chain)
