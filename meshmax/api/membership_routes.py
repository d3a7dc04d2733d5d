"""The mesh that this node is in, over HTTP: what it is, who is in it; making, joining and leaving one, revoking, tickets.

Secrets (a ticket's text) travel in bodies alone, and a reply that holds one is not to be stored. Each act is this node's: what
it takes (the root key, the scope admin) it must have itself. Not here: who may call (access, guard), what a certificate allows
(core.membership).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import read_words
from meshmax.api.replies import json_reply
from meshmax.api.stamps import rfc3339
from meshmax.api.table import route
from meshmax.base.errors import NotFound
from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, SCOPES, MemberView, MeshView, Scope
from meshmax.core.membership import check_mesh_name
from meshmax.core.tickets import MAX_LIFE_S, MAX_USES
from meshmax.wire.ticket import MAX_PASTED, parse_ticket

TICKET_S: Final = 7 * 86400  # how long a ticket is valid unless it is said
TICKET_SCOPES: Final[tuple[Scope, ...]] = ("infer", "pull")
MAX_PEER: Final = 256  # characters of a name or a PeerId


class NewBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_PEER)]


class RejoinBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh/rejoin. ``mesh``: its id or name, '' the only one; ``name``: '' as it was called."""

    mesh: Annotated[str, msgspec.Meta(max_length=MAX_PEER)] = ""
    name: Annotated[str, msgspec.Meta(max_length=MAX_PEER)] = ""


class JoinBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh/join."""

    ticket: Annotated[str, msgspec.Meta(max_length=MAX_PASTED)]


class RevokeBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh/revoke: a PeerId, or a name that only one member has."""

    peer: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PEER)]


class TicketBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh/tickets. ``expires_s``: from now."""

    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1, max_length=len(SCOPES))] = TICKET_SCOPES
    expires_s: Annotated[int, msgspec.Meta(ge=1, le=MAX_LIFE_S)] = TICKET_S
    uses: Annotated[int, msgspec.Meta(ge=1, le=MAX_USES)] = 1


class WithdrawBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh/tickets/withdraw: {}."""


class LeaveBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/mesh/leave: {}."""


class _Shows(Protocol):
    def view(self) -> MeshView:
        """The mesh that the node is in."""
        ...

    def members(self) -> tuple[MemberView, ...]:
        """Those that this node knows."""
        ...


class _Acts(Protocol):
    async def create(self, name: str) -> MeshView: ...

    async def rejoin(self, wanted: str, name: str) -> MeshView: ...

    async def join(self, ticket_text: str) -> MeshView: ...

    async def revoke(self, peer_id: PeerId) -> None: ...

    async def leave(self) -> None: ...


class _Invites(Protocol):
    async def ticket(self, scopes: Sequence[Scope], expires_s: float, uses: int) -> str: ...

    async def withdraw_tickets(self) -> int: ...

    def only_near(self) -> str:
        """Why nobody outside our network reaches us now; '' where somebody may."""
        ...


class ShownMembership(_Shows, _Acts, _Invites, Protocol):
    """`services.membership`, as far as it is shown here."""


class HasMembership(Protocol):
    """A node in a mesh."""

    @property
    def membership(self) -> ShownMembership:
        """See services.membership."""
        ...


class MembershipFace:
    """The routes of a node's mesh. ``find_id``: the PeerId of a node, by it or by a name; raises NotFound."""

    def __init__(self, node: HasMembership, find_id: Callable[[str], PeerId]) -> None:
        self._node = node
        self._find_id = find_id

    def routes(self) -> list[HttpRoute]:
        """Every route that is offered."""
        get, post = ("GET", "HEAD"), ("POST",)
        return [
            route("/api/v1/mesh", self.show, get),
            route("/api/v1/mesh", self.create, post),
            route("/api/v1/mesh/members", self.members, get),
            route("/api/v1/mesh/join", self.join, post),
            route("/api/v1/mesh/leave", self.leave, post),
            route("/api/v1/mesh/revoke", self.revoke, post),
            route("/api/v1/mesh/rejoin", self.rejoin, post),
            route("/api/v1/mesh/tickets", self.ticket, post),
            route("/api/v1/mesh/tickets/withdraw", self.withdraw, post),
        ]

    async def show(self, _request: Request) -> Response:
        """GET /api/v1/mesh."""
        return json_reply(mesh_json(self._node.membership.view()))

    async def members(self, _request: Request) -> Response:
        """GET /api/v1/mesh/members."""
        return json_reply({"members": [_member_json(member) for member in self._node.membership.members()]})

    async def create(self, request: Request) -> Response:
        """POST /api/v1/mesh: a new private mesh, whose first member this node is."""
        body = await read_words(request, NewBody)
        return json_reply(mesh_json(await self._node.membership.create(check_mesh_name(body.name))))

    async def join(self, request: Request) -> Response:
        """POST /api/v1/mesh/join: into the mesh that a ticket invites to."""
        body = await read_words(request, JoinBody)
        parse_ticket(body.ticket)  # what is no ticket is refused before anything is asked
        return json_reply(mesh_json(await self._node.membership.join(body.ticket)))

    async def rejoin(self, request: Request) -> Response:
        """POST /api/v1/mesh/rejoin: into a mesh whose root key is on this machine."""
        body = await read_words(request, RejoinBody)
        return json_reply(mesh_json(await self._node.membership.rejoin(body.mesh, body.name)))

    async def withdraw(self, request: Request) -> Response:
        """POST /api/v1/mesh/tickets/withdraw: tickets that this node gave out are worth nothing any more."""
        await read_words(request, WithdrawBody)
        return json_reply({"withdrawn": await self._node.membership.withdraw_tickets()})

    async def leave(self, request: Request) -> Response:
        """POST /api/v1/mesh/leave: back to the open mesh."""
        await read_words(request, LeaveBody)
        await self._node.membership.leave()
        return json_reply(mesh_json(self._node.membership.view()))

    async def revoke(self, request: Request) -> Response:
        """POST /api/v1/mesh/revoke: a peer is no member any more."""
        body = await read_words(request, RevokeBody)
        peer_id = self._find_member(body.peer)
        await self._node.membership.revoke(peer_id)
        return json_reply({"peer_id": peer_id})

    async def ticket(self, request: Request) -> Response:
        """POST /api/v1/mesh/tickets: an invitation. ``warning``: who cannot use it as things are; '' if all can."""
        body = await read_words(request, TicketBody)
        text = await self._node.membership.ticket(body.scopes, body.expires_s, body.uses)
        ticket = parse_ticket(text)
        why = self._node.membership.only_near()
        shown = {
            "ticket": text,
            "mesh_name": self._node.membership.view().name,
            "scopes": list(ticket.scopes),
            "uses": body.uses,
            "expires_at": rfc3339(ticket.expires_at_s),
            "addresses": list(ticket.addresses),
            "bootstrap": list(ticket.bootstrap),
            "warning": f"only machines of this network can use this ticket now: {why}" if why else "",
        }
        return json_reply(shown, headers={"cache-control": "no-store"})

    def _find_member(self, wanted: str) -> PeerId:
        members = self._node.membership.members()
        if any(member.peer_id == wanted for member in members):
            return PeerId(wanted)
        named = {member.peer_id for member in members if member.name == wanted}
        if len(named) > 1:
            raise NotFound(f"{len(named)} members are named '{wanted[:100]}': use the PeerId of one of them")
        return named.pop() if named else self._find_id(wanted)


def mesh_json(view: MeshView) -> dict[str, Any]:
    """The mesh as /api/v1/mesh shows it."""
    private = view.mesh != OPEN_MESH
    return {
        "mesh": view.mesh,
        "name": view.name,
        "private": private,
        "root": view.root,
        "scopes": list(view.scopes),
        "expires_at": None if view.expires_at_s is None else rfc3339(view.expires_at_s),
        "problem": view.problem,
        "joining": view.joining,
        "lan": view.lan,
        "bootstrap": [msgspec.to_builtins(each) for each in view.bootstrap],
    }


def _member_json(member: MemberView) -> dict[str, Any]:
    revoked = member.revoked_at_s
    return {
        "peer_id": member.peer_id,
        "name": member.name,
        "scopes": list(member.scopes),
        "expires_at": rfc3339(member.expires_at_s),
        "revoked_at": None if revoked is None else rfc3339(revoked),
    }
