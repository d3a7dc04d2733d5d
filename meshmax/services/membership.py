"""The mesh that this node is in: who is admitted, who may what, and how that changes while it runs. Satisfies ports.Admission.

Rules: what changes is written down before it counts. Changing mesh cuts every connection, and discovery starts afresh. A
revocation takes effect at once here, is told to all connected members, who tell theirs, and to everybody at admission. Our
certificate is renewed in time by the root if its key is here, else by any connected member that may; then it is shown to those
who are connected. A member whose certificate ends is let go. The bootstrap nodes of the ticket that was redeemed are kept with
the membership, and go with it. Not here: the words (wire.membership, services.admission), what is valid (core.membership), what
needs which scope (services.guards), the files (store.mesh_files), a ticket on its way (services.joining).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Literal, NoReturn

import trio

from meshmax.base.errors import InvalidRequest, NotAMember, OutOfScope, RemoteProtocolError
from meshmax.base.ids import PeerId, parse_peer_id
from meshmax.base.membership import (
    OPEN_MESH,
    SCOPES,
    BootstrapAddress,
    MemberView,
    MeshId,
    MeshView,
    Revocation,
    RevocationNotice,
    Scope,
    Ticket,
)
from meshmax.core.membership import check_mesh_name, shown_mesh_name
from meshmax.core.rendezvous import learnt_bootstrap
from meshmax.ports import Discovery, RunSync, Signer, Stream, Swarm
from meshmax.services import admission
from meshmax.services.frames import FrameStream
from meshmax.services.guards import guard, guard_protocol, lacking
from meshmax.services.joining import AddressesOf, Connect, Joining
from meshmax.services.renewal import Renewal
from meshmax.services.standing import Standing
from meshmax.services.telling import Telling
from meshmax.services.tickets import TicketDesk, reachable
from meshmax.store.mesh_files import MeshFiles, OwnMesh
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire import membership as wire
from meshmax.wire.failure import failure_of
from meshmax.wire.protocols import MEMBER, TICKET
from meshmax.wire.ticket import parse_ticket

JOIN_WAIT_S: Final = 20.0  # how long `join` waits for the first outcome; afterwards it goes on behind
HEAR_TIMEOUT_S: Final = 10.0  # for what one member tells
NEWS_PACE_S: Final = 0.1  # after each message of a peer's news: 64 notices take up to 50 ms to check
MAX_HEARD: Final = 4  # told by one member at the same time; ours tell one thing after the other
LOOK_AGAIN_S: Final = 60.0

_log = get_logger("membership")


class MembershipService:
    """See the module. Made before the swarm, which asks it; running once `open_membership` is entered."""

    def __init__(
        self,
        signer: Signer,
        files: MeshFiles,
        unix_now: Callable[[], float],
        random: Any,
        run_sync: RunSync,
        name: str = "",
    ) -> None:
        """Reads the files, which blocks briefly. Raises ConfigError. ``name``: what people call this node."""
        self._signer, self._files, self._unix_now = signer, files, unix_now
        self._random, self._run_sync, self._name = random, run_sync, name
        files.sweep()
        self._standing = self._load()
        self._joining = self._load_pending(name)
        self._refused = ""  # what became of the last ticket, if it was worth nothing; until a person acts
        self._writing = trio.Lock()
        self._woken = trio.Event()  # somebody was admitted, the mesh or a ticket changed: look again at what is due
        self._hearing: Counter[PeerId] = Counter()
        self._swarm: Swarm
        self._telling: Telling
        self.desk = TicketDesk(lambda: self._standing, self._keep_tickets, unix_now)
        # The bootstrap nodes in use, which tickets name beside our own addresses.
        self.bootstrap: Callable[[], Sequence[BootstrapAddress]] = tuple
        self.told: Callable[[], Sequence[str]] = tuple  # our addresses that others may know; () is those of the swarm
        self.only_near: Callable[[], str] = str  # why nobody outside our network reaches us now; '' where somebody may
        self.connect: Connect | None = None  # how a ticket's giver is reached; None: by dialling alone
        self.name_of: Callable[[PeerId], str] = lambda peer_id: ""
        self.addresses_of: AddressesOf = lambda peer_id: ()
        self.lan = True  # whether this node shows itself on its LAN; for people
        self.search: Callable[[Ticket], Discovery | None] = lambda ticket: None  # who else may know its issuer
        # Called after the mesh has changed, with who is to be dialled first and where.
        self.on_change: Callable[[PeerId | None, Sequence[str]], None] = lambda peer_id, addresses: None

    def _load(self) -> Standing:
        own = self._files.load_own()
        if own is None:
            return Standing(self._signer)
        root = self._files.load_root(own.mesh)
        notices, given = self._files.load_notices(own.mesh), self._files.load_tickets(own.mesh)
        return Standing(self._signer, own, root, notices, given, self._unix_now())

    def _load_pending(self, name: str) -> Joining | None:
        text = self._files.load_pending()
        if text is None:
            return None
        ticket = parse_ticket(text)
        if self._standing.mesh in (OPEN_MESH, ticket.mesh):
            return Joining(ticket, name)
        _log.warning("a ticket of another mesh is not used: this peer is in a mesh already", mesh=self._standing.name)
        self._files.drop_pending()
        return None

    # --- ports.Admission ---------------------------------------------------------------------------------------------

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        """See ports.Admission."""
        standing = self._standing
        member = await admission.admit(stream, direction, standing, self._unix_now, partial(self._take, standing))
        if standing is not self._standing:
            raise NotAMember("one of the two peers has just changed its mesh")
        if member is not None:
            # Between looking at its chain and the last word the peer could take its time, and be revoked meanwhile.
            standing.confirm(stream.peer, member, self._unix_now())
            standing.note(stream.peer, member)
            self._wake()

    def check(self, peer_id: PeerId, protocol: str) -> None:
        """See ports.Admission."""
        if self._standing.core is None:
            return
        held = self._standing.member(peer_id, self._unix_now()).certificate.scopes
        guard_protocol(held, protocol, _whose(peer_id))

    def require(self, peer_id: PeerId, *scopes: Scope) -> None:
        """Raises OutOfScope unless the member ``peer_id`` has one of ``scopes``, NotAMember. In the open mesh all have all."""
        if self._standing.core is None:
            return
        guard(self._standing.member(peer_id, self._unix_now()).certificate.scopes, scopes, _whose(peer_id))

    # --- for faces ---------------------------------------------------------------------------------------------------

    @property
    def mesh(self) -> MeshId:
        """The id of our mesh; '' for the open one."""
        return self._standing.mesh

    @property
    def waiting(self) -> Ticket | None:
        """The ticket that is on its way; None if none is."""
        return self._joining.ticket if self._joining else None

    @property
    def standing(self) -> Standing:
        """Our certificates, and what makes others members, for protocols that need no connection."""
        return self._standing

    def view(self) -> MeshView:
        """The mesh that this node is in, and what is wrong with it."""
        standing, problem = self._standing, self._joining.problem if self._joining else self._refused
        scopes: tuple[Scope, ...] = ()
        expires_at_s = None
        try:
            own = standing.own(self._unix_now())
        except NotAMember as error:
            problem = problem or error.message
        else:
            scopes, expires_at_s = (own.scopes, own.expires_at_s) if own else (SCOPES, None)
        bootstrap = tuple(self.bootstrap())
        joining, root = self._joining.ticket.mesh_name if self._joining else "", standing.root is not None
        return MeshView(standing.mesh, standing.name, root, scopes, expires_at_s, problem, bootstrap, joining, self.lan)

    def members(self) -> tuple[MemberView, ...]:
        """Ourselves, the members that this node has met, and who was revoked; () in the open mesh."""
        standing = self._standing
        if standing.core is None:
            return ()
        view, revocations, own_id = self.view(), standing.core.revocations, self._signer.peer_id
        found = [MemberView(own_id, self._name, view.scopes, view.expires_at_s or 0, revocations.revoked_at_s(own_id))]
        for peer_id, member in standing.members:
            certificate = member.certificate
            found.append(MemberView(peer_id, self.name_of(peer_id), certificate.scopes, certificate.expires_at_s))
        known = {member.peer_id for member in found}
        for peer_id in revocations.peers():
            if peer_id not in known:
                revoked_at_s = revocations.revoked_at_s(peer_id)
                found.append(MemberView(peer_id, self.name_of(peer_id), (), 0, revoked_at_s))
        return tuple(found)

    async def create(self, name: str) -> MeshView:
        """Make a mesh with this node as its first member and the keeper of its root key. Raises InvalidRequest, StoreError."""
        name = check_mesh_name(name)
        async with self._changing():
            self._require_open()
            await self._run_sync(self._files.drop_pending)  # else it would be followed out of the new mesh
            self._stop_joining()
            own = await self._run_sync(partial(self._files.found, name, self._signer.peer_id, self._unix_now()))
            await self._enter(own)
        return self.view()

    async def rejoin(self, wanted: str = "", name: str = "") -> MeshView:
        """Come back into a mesh by its root key, which is here: see `MeshFiles.find_root` and `MeshFiles.rejoin`.

        Raises InvalidRequest (in another mesh, no such key), ConfigError, StoreError.
        """
        async with self._changing():
            mesh = await self._run_sync(partial(self._files.find_root, wanted))
            if self._standing.mesh != mesh:
                self._require_open()
            own = await self._run_sync(partial(self._files.rejoin, mesh, self._signer.peer_id, self._unix_now(), name))
            await self._run_sync(self._files.drop_pending)
            self._stop_joining()
            await self._enter(own)
        return self.view()

    async def ticket(self, scopes: Sequence[Scope], expires_s: float, uses: int) -> str:
        """The text of a new ticket. Raises InvalidRequest, OutOfScope, NotAMember, QuotaExceeded, StoreError."""
        bootstrap = [each.address for each in self.bootstrap()]
        return await self.desk.give(scopes, expires_s, uses, reachable(self.told() or self._swarm.addresses), bootstrap)

    async def withdraw_tickets(self) -> int:
        """Take back every ticket that this node gave out; how many could still be used. Raises InvalidRequest, StoreError."""
        return await self.desk.withdraw_all()

    async def join(self, text: str) -> MeshView:
        """Join with a ticket; returns after the first outcome, or JOIN_WAIT_S: see `MeshView.problem`, it goes on behind.

        Raises InvalidRequest (no ticket, in another mesh), NotAMember (refused), StoreError.
        """
        ticket = parse_ticket(text)
        async with self._changing():
            if self._standing.mesh not in (OPEN_MESH, ticket.mesh):
                self._require_open()
            await self._run_sync(partial(self._files.save_pending, "".join(text.split())))
            self._stop_joining()
            joining = self._joining = Joining(ticket, self._name)
        self._wake()
        with trio.move_on_after(JOIN_WAIT_S):
            await joining.settled.wait()
        if joining.refused is not None:
            raise joining.refused
        return self.view()

    async def revoke(self, peer_id: PeerId) -> None:
        """End the membership of ``peer_id``, here and everywhere. Raises InvalidRequest, OutOfScope, NotAMember, StoreError."""
        standing, now_s = self._standing, self._unix_now()
        peer_id = parse_peer_id(peer_id)
        if standing.core is None:
            raise InvalidRequest(
                "nobody can be revoked in the open mesh: `meshmax mesh new NAME` makes one with members"
            )
        if peer_id == self._signer.peer_id:
            raise InvalidRequest("this is the peer itself: `meshmax mesh leave` leaves the mesh")
        signer, chain = (standing.root, ()) if standing.root else (self._signer, standing.chain)
        own = standing.own(now_s)
        if standing.root is None and own and "admin" not in own.scopes:
            raise OutOfScope(lacking("admin", "this peer's certificate"))
        word = Revocation(standing.mesh, peer_id, int(now_s))
        notice = RevocationNotice(wire.sign_revocation(word, signer.peer_id, signer.sign), chain)
        standing.core.revocations.check(notice, now_s)
        await self._take(standing, (notice,), self._signer.peer_id)

    async def leave(self) -> None:
        """Go back to the open mesh; a root key stays where it is. Raises StoreError."""
        async with self._changing():
            await self._run_sync(self._files.leave)
            self._stop_joining()
            await self._enter(None)

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """For a change that is written down: once begun it comes to its end, whoever gives up meanwhile."""
        async with self._writing:
            with trio.CancelScope(shield=True):  # noqa: ASYNC100  who changes it awaits
                yield

    def _stop_joining(self) -> None:
        """Nobody waits for the outcome of another ticket any more."""
        if self._joining:
            self._joining.settled.set()
        self._joining, self._refused = None, ""

    def _require_open(self) -> None:
        if self._standing.core is not None:
            raise InvalidRequest(
                f"this peer is in the mesh '{self._standing.name}' already: `meshmax mesh leave` leaves it first"
            )

    # --- for the node ------------------------------------------------------------------------------------------------

    def attach(self, swarm: Swarm) -> None:
        """Serve on ``swarm``, and act on it from now on."""
        self._swarm = swarm
        swarm.serve(MEMBER, self.answer)
        swarm.serve(TICKET, self.desk.answer, to="anyone")

    def look_again(self) -> None:
        """Our network has changed: a ticket that is on its way is tried at once. Cheap, called from any task."""
        if self._joining:
            self._joining.look_again()
            self._wake()

    def allows(self, ip: str, is_lan: Callable[[str], bool]) -> bool:
        """Whether ``ip`` may be dialled, and may connect: any in a private mesh or on the way into one, else those of a LAN."""
        return self._joining is not None or self.houses(ip, is_lan)

    def houses(self, ip: str, is_lan: Callable[[str], bool]) -> bool:
        """Whether a member may be at ``ip``: anywhere in a private mesh, on a LAN in the open one, also on the way out of it."""
        return self._standing.core is not None or is_lan(ip)

    async def _enter(self, own: OwnMesh | None) -> None:
        """The mesh has changed on disk: follow. The caller holds the lock."""
        joining, self._joining = self._joining, None
        self._standing = await self._run_sync(self._load) if own else Standing(self._signer)
        _log.info("mesh changed", mesh=own.name if own else "open")
        for peer_id in (*self._swarm.connections(), *([joining.ticket.issuer] if joining else [])):
            await self._swarm.disconnect(peer_id)
        first = (joining.ticket.issuer, joining.ticket.addresses) if joining else (None, ())
        self.on_change(*first)
        self._wake()

    def _wake(self) -> None:
        self._woken.set()
        self._woken = trio.Event()

    async def _keep_tickets(self, standing: Standing) -> None:
        async with self._writing:
            if standing is not self._standing:
                raise NotAMember("this peer has just left the mesh that the ticket is for")
            await self._run_sync(partial(self._files.save_tickets, standing.mesh, standing.tickets.given))

    # --- news ---------------------------------------------------------------------------------------------------------

    async def answer(self, stream: Stream) -> None:
        """What an admitted peer has to tell. Raises NotAMember, RemoteProtocolError, PeerGone."""
        peer_id = stream.peer
        if self._hearing[peer_id] >= MAX_HEARD:
            raise RemoteProtocolError(f"the peer tells more than {MAX_HEARD} things at once")
        self._hearing[peer_id] += 1
        try:
            with trio.move_on_after(HEAR_TIMEOUT_S):
                await self._hear(FrameStream(stream), self._standing)
                await trio.sleep(NEWS_PACE_S)
        finally:
            self._hearing[peer_id] -= 1
            if not self._hearing[peer_id]:
                del self._hearing[peer_id]

    async def _hear(self, frames: FrameStream, standing: Standing) -> None:
        message = await admission.receive(frames)
        if standing.core is None:
            raise RemoteProtocolError("the open mesh has no news of members")
        reply: wire.MemberMessage = wire.Welcome()
        if isinstance(message, wire.Credentials):
            try:
                standing.note(frames.peer, standing.verify(message.chain, frames.peer, self._unix_now()))
            except NotAMember as error:
                reply = failure_of(error)
            self._wake()
        else:
            await admission.receive_notices(frames, message, partial(self._take, standing))
        await frames.send(wire.MEMBER, reply)

    async def _take(self, standing: Standing, notices: Sequence[RevocationNotice], bearer: PeerId) -> None:
        if standing is not self._standing or standing.core is None:
            return
        news = standing.core.revoke(notices, self._unix_now())
        if not news:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(shield=True):  # it is news once, and who brought it may have no more time
            await self._enforce(standing)  # before it is kept: a full disk keeps nobody in
            self._telling.tell_all(partial(admission.tell_notices, notices=news), bearer)
            async with self._writing:
                if standing is self._standing:
                    save = partial(self._files.save_notices, standing.mesh, standing.core.revocations.notices())
                    await isolate("revocations", partial(self._run_sync, save))

    async def _enforce(self, standing: Standing) -> None:
        """Let go who is no member any more."""
        for peer_id, why in standing.fallen(self._unix_now()):
            standing.forget(peer_id)
            _log.info("no member any more", peer=peer_id, why=why)
            await self._swarm.disconnect(peer_id)
        try:
            standing.own(self._unix_now())
        except NotAMember as error:
            _log.warning("this peer is no member of its mesh any more", mesh=standing.name, why=error.message)

    # --- what is due -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow expiry, renewal and joining until cancelled."""
        async with trio.open_nursery() as nursery:
            self._telling = Telling(self._swarm, nursery)
            nursery.start_soon(self._run_due)
            nursery.start_soon(self._run_joining)

    async def _run_due(self) -> NoReturn:
        renewal = Renewal(self._standing, self._unix_now(), self._random)
        while True:
            woken, standing, now_s = self._woken, self._standing, self._unix_now()
            if not renewal.is_of(standing):
                renewal = Renewal(standing, now_s, self._random)
            expiry_s = standing.next_expiry_s(self._swarm.connections())
            if expiry_s is not None and expiry_s < now_s:
                await self._enforce(standing)
                continue
            issuer = renewal.issuer(self._swarm.connections(), now_s)
            if issuer is not None:
                await isolate("renewal", partial(self._renew, renewal, issuer))
                continue
            due_s = renewal.next_s(now_s) if expiry_s is None else min(renewal.next_s(now_s), expiry_s)
            # Not for longer than clocks can be trusted to go on as they did.
            with trio.move_on_after(min(max(due_s - now_s, 0.0) + 1.0, LOOK_AGAIN_S)):
                await woken.wait()

    async def _renew(self, renewal: Renewal, issuer: PeerId) -> None:
        standing = renewal.standing
        chain = await renewal.ask(issuer, self._swarm, self._unix_now())
        async with self._writing:
            if not renewal.is_of(self._standing):
                return
            own = OwnMesh(standing.mesh, standing.name, chain, standing.bootstrap)
            await self._run_sync(partial(self._files.save_own, own))
            standing.chain = chain
        _log.info("certificate renewed", mesh=standing.name, issuer=issuer)
        self._telling.tell_all(self._show)

    async def _show(self, frames: FrameStream) -> None:
        standing = self._standing
        if standing.core is not None:
            known = standing.core.revocations.digest()
            await frames.send(wire.MEMBER, wire.Credentials(standing.chain, known, int(self._unix_now())))

    async def _run_joining(self) -> NoReturn:
        while True:
            woken, joining = self._woken, self._joining
            if joining is None:
                await woken.wait()
            elif not await isolate("joining", partial(self._join, joining)):
                joining.settled.set()
                with trio.move_on_after(LOOK_AGAIN_S):  # the disk takes nothing
                    while self._joining is joining:
                        await self._woken.wait()

    async def _join(self, joining: Joining) -> None:
        issued: wire.Issued | None = None
        async with trio.open_nursery() as nursery:

            async def replaced() -> None:
                while self._joining is joining:
                    await self._woken.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(replaced)
            if rung := self.search(joining.ticket):
                nursery.start_soon(joining.search, rung, self._wake)
            issued = await joining.run(
                self._swarm, self.addresses_of, self._unix_now, self._random, lambda: self._woken, self.connect
            )
            nursery.cancel_scope.cancel()
        async with self._changing():
            if self._joining is joining:
                if issued is not None:
                    ticket = joining.ticket
                    # Those of before are of the same mesh, or none: one joins from the open mesh, or again.
                    bootstrap = learnt_bootstrap(ticket.bootstrap, self._standing.bootstrap)
                    name = shown_mesh_name(issued.mesh_name, ticket.mesh_name)
                    own = OwnMesh(ticket.mesh, name, issued.chain, bootstrap)
                    await self._run_sync(partial(self._files.save_own, own))
                    await self._run_sync(self._files.drop_pending)
                    await self._enter(own)
                else:
                    await self._run_sync(self._files.drop_pending)
                    self._joining, self._refused = None, joining.problem
        joining.settled.set()


@asynccontextmanager
async def open_membership(membership: MembershipService, swarm: Swarm) -> AsyncIterator[None]:
    """``membership``, running on the ``swarm`` that asks it."""
    membership.attach(swarm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.run)
        await trio.lowlevel.checkpoint()
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


def _whose(peer_id: PeerId) -> str:
    return f"the certificate of {peer_id}"
