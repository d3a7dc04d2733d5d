"""The mesh that this node is in, kept over restarts in ``<home>/mesh/`` (mode 0700, files 0600).

    member.json           mesh, name, our chain, bootstrap nodes that tickets named; not there: the open mesh
    revocations.json      notices of one mesh
    tickets.json          tickets of one mesh that this node gave out (hashes of their secrets)
    ticket                a ticket's text that is to be redeemed when the peer runs; removed then
    roots/<MeshId>.key    root keys of meshes made here, PKCS #8 PEM; never overwritten, and kept when the mesh is left
    roots/<MeshId>.json   of a mesh that was left with its root key here: its name and revocations, to come back with

Rules: each file is the old or the new one, whole; revocations and tickets name their mesh, so that those of a mesh that was
left count for nothing. A file that is damaged is a ConfigError and never taken for none: a node must not fall into the open
mesh, nor let somebody in who was revoked, because of a disk. Everything here blocks. Not here: what it means
(core.membership).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.base.ids import PeerId, parse_peer_id
from meshmax.base.membership import (
    MAX_CHAIN,
    MAX_LEARNT_BOOTSTRAP,
    MAX_MESH_NAME,
    MAX_REVOCATIONS,
    SCOPES,
    Chain,
    MeshId,
    RevocationNotice,
)
from meshmax.core.membership import Membership, check_mesh_name
from meshmax.core.rendezvous import learnt_bootstrap
from meshmax.core.tickets import MAX_TICKETS, MAX_USES, GivenTicket
from meshmax.store.disk import Disk, sweep_temps, translated
from meshmax.store.identity import Identity, create_key, load_key
from meshmax.wire.membership import sign_certificate
from meshmax.wire.ticket import MAX_PASTED, parse_ticket

FOLDER: Final = "mesh"
MEMBER_FILE: Final = "member.json"
REVOCATIONS_FILE: Final = "revocations.json"
TICKETS_FILE: Final = "tickets.json"
PENDING_FILE: Final = "ticket"
ROOTS_FOLDER: Final = "roots"

_MAX_BYTES: Final = {
    MEMBER_FILE: 64 << 10,  # a chain of four certificates of 1 KB in base64
    REVOCATIONS_FILE: MAX_REVOCATIONS * (8 << 10),  # 4 KB each in base64
    TICKETS_FILE: MAX_TICKETS * (512 + 64 * MAX_USES),  # a hash, and 52 characters a use
    PENDING_FILE: MAX_PASTED * 4,
}
_MAX_LEFT_BYTES: Final = _MAX_BYTES[REVOCATIONS_FILE]
_LEFT_REMEDY: Final = "put back a copy of it, or move it away: other members tell the revocations again"
_REMEDY: Final = {
    MEMBER_FILE: "put back a copy of it, or move it away to be in the open mesh and join again with a new ticket",
    REVOCATIONS_FILE: "put back a copy of it, or move it away: other members tell it again",
    TICKETS_FILE: "put back a copy of it, or move it away: tickets given so far are then worth nothing",
    PENDING_FILE: "remove it, and join again with the ticket",
}

W = TypeVar("W")


class OwnMesh(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Our membership: the mesh, what it is called, our chain. ``bootstrap``: multiaddrs with /p2p that tickets named."""

    mesh: MeshId
    name: str
    chain: Chain
    bootstrap: tuple[str, ...] = ()


class _Notices(msgspec.Struct, frozen=True):
    mesh: MeshId
    notices: tuple[RevocationNotice, ...]


class _Left(msgspec.Struct, frozen=True):
    mesh: MeshId
    name: str
    notices: tuple[RevocationNotice, ...] = ()


class _Given(msgspec.Struct, frozen=True):
    mesh: MeshId
    tickets: tuple[GivenTicket, ...]


class MeshFiles:
    """The folder in one home. ``disk``: tests play a dying one."""

    def __init__(self, home: Path, disk: Disk | None = None) -> None:
        self.folder = home / FOLDER
        self._disk = disk or Disk()

    def sweep(self) -> None:
        """Remove what writes that a crash cut short left behind; while nobody writes here."""
        for folder in (self.folder, self.folder / ROOTS_FOLDER):
            sweep_temps(folder)

    # --- our own membership --------------------------------------------------------------------------------------------

    def load_own(self) -> OwnMesh | None:
        """The mesh that we are in; None: the open one. Raises ConfigError."""
        own = self._load(MEMBER_FILE, OwnMesh)
        if own is None:
            return None
        try:
            parse_peer_id(own.mesh)
        except InvalidRequest:
            self._damaged(MEMBER_FILE)
        if not own.chain or len(own.chain) > MAX_CHAIN or not 0 < len(own.name) <= MAX_MESH_NAME:
            self._damaged(MEMBER_FILE)
        if len(own.bootstrap) > MAX_LEARNT_BOOTSTRAP or learnt_bootstrap(own.bootstrap) != own.bootstrap:
            self._damaged(MEMBER_FILE)
        return own

    def save_own(self, own: OwnMesh) -> None:
        """We are in this mesh from now on. Raises StoreFull, StoreError."""
        self._save(MEMBER_FILE, own)

    def leave(self) -> None:
        """We are in the open mesh from now on; root keys stay, and what is needed to use them. Raises ConfigError, StoreError."""
        self._keep_to_return()
        with translated(f"{self.folder} was not changed"):
            # What would lead us into it again first, then what says that we are in it.
            for name in (PENDING_FILE, MEMBER_FILE, REVOCATIONS_FILE, TICKETS_FILE):
                self._disk.unlink(self.folder / name)
            if self.folder.is_dir():
                self._disk.sync_folder(self.folder)

    def _keep_to_return(self) -> None:
        """The root outlives its membership: without the revocations it would let in again whom it threw out."""
        try:
            own = self.load_own()
        except ConfigError:
            return  # damaged: leaving is the way out of it
        if own is not None and self.root_path(own.mesh).exists():
            self._save(_left_name(own.mesh), _Left(own.mesh, own.name, self.load_notices(own.mesh)))

    # --- root keys -----------------------------------------------------------------------------------------------------

    def found(self, name: str, peer_id: PeerId, now_s: float) -> OwnMesh:
        """Make a mesh, with ``peer_id`` as its first member, all scopes: its root key and our certificate are written.

        Raises InvalidRequest (name), ConfigError, StoreFull, StoreError.
        """
        name = check_mesh_name(name)
        root = self._create_root()
        mesh = MeshId(root.peer_id)
        certificate = Membership(mesh).issue(peer_id, SCOPES, now_s, issuer=(), issuer_id=root.peer_id)
        own = OwnMesh(mesh, name, (sign_certificate(certificate, root.peer_id, root.sign),))
        self.save_own(own)
        return own

    def load_root(self, mesh: MeshId) -> Identity | None:
        """The root key of ``mesh``, if it is here. Raises ConfigError if it is damaged."""
        path = self.root_path(mesh)
        if not path.exists():
            return None
        root = load_key(path, "root key", "put back a copy of it; without it nobody can act for the mesh as its root")
        if root.peer_id != PeerId(mesh):
            raise ConfigError(f"the root key {path} is of another mesh: its name is the mesh that it belongs to")
        return root

    def find_root(self, wanted: str = "") -> MeshId:
        """The mesh with the id or the name ``wanted`` whose root key is here; '': the only one. Raises InvalidRequest."""
        names = {mesh: self._left(mesh).name for mesh in self._roots()}
        found = [mesh for mesh, name in names.items() if wanted in ("", mesh, name)]
        if len(found) == 1:
            return found[0]
        if not names:
            raise InvalidRequest(
                f"no root key is here: copy it to {self.folder / ROOTS_FOLDER} under its own name, or join with a ticket"
            )
        shown = ", ".join(f"{mesh} ({name})" if name else mesh for mesh, name in sorted(names.items()))
        raise InvalidRequest(f"say of which mesh; root keys are here of {shown}")

    def rejoin(self, mesh: MeshId, peer_id: PeerId, now_s: float, name: str = "") -> OwnMesh:
        """Make ``peer_id`` a member of ``mesh``, all scopes, by its root key; revocations that were kept count again.

        ``name``: '' as it was called. Raises InvalidRequest (no key, no name), ConfigError, StoreFull, StoreError.
        """
        root = self.load_root(mesh)
        if root is None:
            raise InvalidRequest(f"the root key {self.root_path(mesh)} is not here")
        own, left = self.load_own(), self._left(mesh)
        known = own.name if own is not None and own.mesh == mesh else left.name
        if not name and not known:
            raise InvalidRequest("what the mesh is called is not known here: say it, `meshmax mesh rejoin --name NAME`")
        name = check_mesh_name(name or known)
        revocations = Membership(mesh, (*left.notices, *self.load_notices(mesh)), now_s).revocations
        membership = Membership(mesh, revocations.notices(), now_s)
        certificate = membership.issue(peer_id, SCOPES, now_s, issuer=(), issuer_id=root.peer_id)
        back = OwnMesh(mesh, name, (sign_certificate(certificate, root.peer_id, root.sign),))
        self.save_notices(mesh, revocations.notices())
        self.save_own(back)
        return back

    def _roots(self) -> tuple[MeshId, ...]:
        names = (path.stem for path in (self.folder / ROOTS_FOLDER).glob("*.key"))
        return tuple(MeshId(name) for name in names if _is_id(name))

    def _left(self, mesh: MeshId) -> _Left:
        left = self._load(_left_name(mesh), _Left)
        if left is None:
            return _Left(mesh, "")
        if left.mesh != mesh or len(left.name) > MAX_MESH_NAME:
            self._damaged(_left_name(mesh))
        return left

    def root_path(self, mesh: MeshId) -> Path:
        """Where the root key of ``mesh`` is, if it is here. Raises InvalidRequest for what is no mesh."""
        return self.folder / ROOTS_FOLDER / f"{parse_peer_id(mesh)}.key"

    def _create_root(self) -> Identity:
        folder = self.folder / ROOTS_FOLDER
        with translated("the root key was not written"):
            self._make_folder()
            folder.mkdir(mode=0o700, exist_ok=True)
            temp = folder / "new.key"  # its name is its public key, which is not known before it is made
            self._disk.unlink(temp)
            create_key(temp)
            root = load_key(temp, "root key", "remove it")
            self._disk.move_in(temp, self.root_path(MeshId(root.peer_id)))
            self._disk.sync_folder(self.folder)
        return root

    # --- revocations and tickets ---------------------------------------------------------------------------------------

    def load_notices(self, mesh: MeshId) -> tuple[RevocationNotice, ...]:
        """The revocations of ``mesh`` that were kept. Raises ConfigError."""
        kept = self._load(REVOCATIONS_FILE, _Notices)
        return kept.notices if kept is not None and kept.mesh == mesh else ()

    def save_notices(self, mesh: MeshId, notices: Iterable[RevocationNotice]) -> None:
        """Keep them in place of what was kept. Raises StoreFull, StoreError."""
        self._save(REVOCATIONS_FILE, _Notices(mesh, tuple(notices)))

    def load_tickets(self, mesh: MeshId) -> tuple[GivenTicket, ...]:
        """The tickets of ``mesh`` that this node gave out. Raises ConfigError."""
        kept = self._load(TICKETS_FILE, _Given)
        return kept.tickets if kept is not None and kept.mesh == mesh else ()

    def save_tickets(self, mesh: MeshId, tickets: Iterable[GivenTicket]) -> None:
        """Keep them in place of what was kept. Raises StoreFull, StoreError."""
        self._save(TICKETS_FILE, _Given(mesh, tuple(tickets)))

    # --- a ticket to be redeemed ----------------------------------------------------------------------------------------

    def load_pending(self) -> str | None:
        """The text of a ticket that was taken while no peer ran. Raises ConfigError."""
        raw = self._read(PENDING_FILE)
        if raw is None:
            return None
        try:
            parse_ticket(text := raw.decode("ascii"))
        except (UnicodeDecodeError, InvalidRequest):
            self._damaged(PENDING_FILE)
        return text

    def save_pending(self, text: str) -> None:
        """Keep a ticket for the next start. Raises StoreFull, StoreError."""
        self._write(PENDING_FILE, text.encode("ascii"))

    def drop_pending(self) -> None:
        """It was redeemed, or never can be. Raises StoreError."""
        with translated(f"{self.folder / PENDING_FILE} was not removed"):
            self._disk.unlink(self.folder / PENDING_FILE)

    # --- files ---------------------------------------------------------------------------------------------------------

    def _load(self, name: str, word: type[W]) -> W | None:
        raw = self._read(name)
        if raw is None:
            return None
        try:
            return msgspec.json.decode(raw, type=word)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._damaged(name)

    def _read(self, name: str) -> bytes | None:
        path, limit = self.folder / name, _MAX_BYTES.get(name, _MAX_LEFT_BYTES)
        try:
            with path.open("rb") as file:
                raw = file.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; check its owner and mode") from None
        if len(raw) > limit:
            self._damaged(name)
        return raw

    def _damaged(self, name: str) -> NoReturn:
        raise ConfigError(f"{self.folder / name} is damaged: {_REMEDY.get(name, _LEFT_REMEDY)}")

    def _save(self, name: str, word: Any) -> None:
        self._write(name, msgspec.json.encode(word))

    def _write(self, name: str, data: bytes) -> None:
        with translated(f"{self.folder / name} was not written"):
            self._make_folder()
            self._disk.write_whole(self.folder / name, data, private=True)

    def _make_folder(self) -> None:
        if self.folder.is_dir():
            return
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self._disk.sync_folder(self.folder.parent)


def _left_name(mesh: MeshId) -> str:
    return f"{ROOTS_FOLDER}/{parse_peer_id(mesh)}.json"


def _is_id(text: str) -> bool:
    try:
        parse_peer_id(text)
    except InvalidRequest:
        return False
    return True
