"""Who belongs to a mesh: its id, scopes, certificates, tickets, revocations, as words.

A mesh is an Ed25519 root key; a MeshId is its public key, written like a PeerId. A member holds a chain of certificates:
its own, then its issuer's, up to one that the root signed. In the open mesh ('' as id) nobody holds anything. Not here:
bytes and signatures (wire.membership), what is valid now (core.membership), who is asked (services.membership).
"""

from __future__ import annotations

from typing import Final, Literal, NewType, get_args

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.model import Signed

MeshId = NewType("MeshId", str)  # base58 text of the root key as a PeerId; OPEN_MESH for the open mesh
OPEN_MESH: Final = MeshId("")

# infer: have prompts answered; pull: be sent models; admin: admit and revoke others, act on other peers.
Scope = Literal["infer", "pull", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

MAX_CHAIN: Final = 4  # certificates from a member to the root's signature; more is nobody's household
MAX_MESH_NAME: Final = 64  # characters
MAX_REVOCATIONS: Final = 4096  # kept and spread; each with its signer's chain has 1 KB, at most 4
MAX_TICKET_ADDRESSES: Final = 8  # of the issuer, so that a ticket stays short enough for a QR code
MAX_LEARNT_BOOTSTRAP: Final = 16  # addresses of bootstrap nodes kept of tickets: those of two

BootstrapSource = Literal["config", "ticket"]


class Certificate(msgspec.Struct, frozen=True):
    """``peer_id`` belongs to ``mesh`` with ``scopes``. ``serial`` grows with each issue to the peer; times are Unix seconds."""

    mesh: MeshId
    peer_id: PeerId
    scopes: tuple[Scope, ...]
    serial: int
    issued_at_s: int
    expires_at_s: int


Chain = tuple[Signed, ...]  # of Certificates: the member's own first, one signed by the mesh's root last


class Revocation(msgspec.Struct, frozen=True):
    """Certificates of ``peer_id`` issued at or before ``issued_at_s`` are void; the newest of a peer wins."""

    mesh: MeshId
    peer_id: PeerId
    issued_at_s: int


class RevocationNotice(msgspec.Struct, frozen=True):
    """A signed Revocation and the ``chain`` of who signed it, so that anybody can check its right to; () if the root signed."""

    revocation: Signed
    chain: Chain = ()


class Ticket(msgspec.Struct, frozen=True):
    """An invitation: present ``secret`` to ``issuer``, who counts its uses, and get a certificate. Never logged.

    ``bootstrap``: multiaddrs of bootstrap nodes at which the issuer can be found when it is not at ``addresses``.
    """

    mesh: MeshId
    mesh_name: str
    issuer: PeerId
    secret: bytes
    scopes: tuple[Scope, ...]
    expires_at_s: int
    addresses: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Ticket(mesh={self.mesh!r}, issuer={self.issuer!r}, secret=...)"


class BootstrapAddress(msgspec.Struct, frozen=True):
    """A multiaddr with /p2p of a bootstrap node that is in use, and where it comes from."""

    address: str
    source: BootstrapSource


class MemberView(msgspec.Struct, frozen=True):
    """A member as this node knows it; ``revoked_at_s`` None unless it was."""

    peer_id: PeerId
    name: str
    scopes: tuple[Scope, ...]
    expires_at_s: int
    revoked_at_s: int | None = None


class MeshView(msgspec.Struct, frozen=True):
    """The mesh that this node is in. ``root``: the root key is on this machine; ``scopes`` and ``expires_at_s`` are our own."""

    mesh: MeshId
    name: str
    root: bool
    scopes: tuple[Scope, ...]
    expires_at_s: int | None = None
    problem: str = ""  # what keeps this node from being a member, or from becoming one; '' if nothing does
    bootstrap: tuple[BootstrapAddress, ...] = ()  # in use; those of tickets end with the membership
    joining: str = ""  # what the mesh is called whose ticket is still on its way; '' if none is
    lan: bool = True  # whether this node shows itself on its LAN
