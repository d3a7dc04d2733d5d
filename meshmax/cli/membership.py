"""`meshmax mesh`: the mesh that this peer is in, making a private one, its members, revoking them, leaving it.

The commands ask the running peer. Where none runs (and none was named by its address), the mesh is shown, made and left in the
files of the home, which is held meanwhile as a peer would. Not here: tickets (cli.ticket), what a membership is
(core.membership).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from meshmax.base.errors import InvalidRequest, NotAMember
from meshmax.base.membership import OPEN_MESH, SCOPES, BootstrapAddress, MeshView
from meshmax.cli.client import NoPeerRunning, PeerStarting, Target, home_folder, open_client, running_api
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, human_time, parse_time_s, printable, table

if TYPE_CHECKING:
    from meshmax.base.ids import PeerId
    from meshmax.store.mesh_files import MeshFiles

LABEL_WIDTH = 10
_NAMED_BY = {"config": "of the configuration", "ticket": "a ticket named it; forgotten with the mesh"}

mesh = App(
    name="mesh",
    help="Show the mesh that this peer is in, or make, leave and manage one.",
    default_parameter=Parameter(negative=(), show_default=False),
    help_format="plaintext",
    version_flags=[],
)


@mesh.default
def show(
    word: Annotated[str, Parameter(show=False)] = "", /, *, as_json: AsJson = False, target: Target = HERE
) -> None:
    """Show the mesh that this peer is in."""
    if word:
        accepted = "new NAME, members, revoke PEER, leave and rejoin; alone it shows the mesh"
        raise InvalidRequest(f"`meshmax mesh` does not know '{word[:40]}': it takes {accepted}")
    if target.home and not target.api and not home_folder(target.home).is_dir():
        raise InvalidRequest(f"no peer's home is at {home_folder(target.home)}: `meshmax peer --home` makes one")
    _tell(local_view(target) if runs_none(target) else _asked(target, "GET", "/api/v1/mesh"), as_json)


@mesh.command
def new(name: str, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """Make a private mesh called NAME, whose first member this peer is. Its root key stays on this machine."""
    if alone := runs_none(target):
        _make(name, target)
        answer = local_view(target)
    else:
        answer = _asked(target, "POST", "/api/v1/mesh", {"name": name})
    _tell(answer, as_json)
    if not as_json:
        emit(f"`meshmax ticket` invites another peer{'; for that, `meshmax peer` must run' if alone else ''}.")


@mesh.command
def members(*, as_json: AsJson = False, target: Target = HERE) -> None:
    """List the members that this peer knows: those that it has met, and those that were revoked."""
    answer = _asked(target, "GET", "/api/v1/mesh/members")
    if as_json:
        emit_json(answer)
        return
    if not answer["members"]:
        emit("This peer is in the open mesh, which has no list of members: `meshmax peers` shows who is there.")
        return
    header = ("NAME", "PEER ID", "SCOPES", "STATE")
    emit(table(header, [_member_row(member, time.time()) for member in answer["members"]]))


@mesh.command
def revoke(peer: str, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """End the membership of PEER (a PeerId, or a name that only one has): everywhere, within seconds."""
    answer = _asked(target, "POST", "/api/v1/mesh/revoke", {"peer": peer})
    if as_json:
        emit_json(answer)
    else:
        emit(
            f"{answer['peer_id']} is no member any more. Tickets that were given out before go on, and it may hold one:"
            " `meshmax ticket --withdraw` takes back those of a peer."
        )


@mesh.command
def rejoin(
    mesh_: Annotated[str, Parameter(name="MESH", help="Its id or name; not needed where one root key is here.")] = "",
    /,
    *,
    name: Annotated[str, Parameter(help="What the mesh is called, if its key came from elsewhere.")] = "",
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Come back into a mesh whose root key is on this machine: after leaving it, or with a copy put into mesh/roots/."""
    if runs_none(target):
        with held_mesh(target) as (files, peer_id):
            _require_open(files, root := files.find_root(mesh_))
            files.rejoin(root, peer_id, time.time(), name)
            files.drop_pending()
        answer = local_view(target)
    else:
        answer = _asked(target, "POST", "/api/v1/mesh/rejoin", {"mesh": mesh_, "name": name})
    _tell(answer, as_json)


@mesh.command
def leave(*, as_json: AsJson = False, target: Target = HERE) -> None:
    """Leave the private mesh: this peer is in the open mesh of its LAN again.

    Its tickets are worth nothing any more. A root key stays where it is: `meshmax mesh rejoin` comes back with it.
    """
    if runs_none(target):
        before = local_view(target)
        with held_mesh(target) as (files, _):
            files.leave()
        answer = local_view(target)
    else:
        before = _asked(target, "GET", "/api/v1/mesh")
        answer = _asked(target, "POST", "/api/v1/mesh/leave", {})
    if not as_json:
        emit(_left(before))
    _tell(answer, as_json)


# --- what is shown -----------------------------------------------------------------------------------------------------


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(answer)
    else:
        emit(describe(answer, time.time()))


def _left(before: dict[str, Any]) -> str:
    """What it means that the mesh ``before`` was left."""
    if not before["private"]:
        joining = printable(before.get("joining") or "")
        return f"The ticket for '{joining}' is given up." if joining else "This peer was in no private mesh."
    words = f"Left '{printable(before['name'])}'. Tickets of this peer that were still open are void."
    if before["root"]:
        words += " The root key stays on this machine: `meshmax mesh rejoin` returns with it."
    return words


def open_words(lan: bool) -> str:
    """What the open mesh means to a person; ``lan``: the peer shows itself on its LAN."""
    if lan:
        return "the open LAN mesh: anyone on this LAN may use it; `meshmax mesh new NAME` closes it"
    return (
        "open, and not announced on the LAN (--no-lan): peers given with --join, and those that join this one;"
        " `meshmax mesh new NAME` closes it"
    )


def describe(answer: dict[str, Any], now_s: float) -> str:
    """The lines of `meshmax mesh`."""
    if not answer["private"]:
        joining = answer.get("joining")
        lines = [("mesh", f"joining '{joining}'" if joining else open_words(answer.get("lan", True)))]
    else:
        lines = [("mesh", f"{answer['name']} (private)"), ("id", answer["mesh"])]
        if answer["scopes"]:
            until = human_time(parse_time_s(answer["expires_at"] or ""), now_s)
            lines.append(
                ("you", f"{', '.join(answer['scopes'])}; the certificate ends {until} and is renewed by itself")
            )
        if answer["root"]:
            lines.append(("root key", "on this machine, in mesh/roots/ of its home: keep a copy where nobody finds it"))
    lines += [("bootstrap", f"{each['address']} ({_NAMED_BY[each['source']]})") for each in answer.get("bootstrap", ())]
    if answer.get("problem"):
        lines.append(("problem", answer["problem"]))
    return "\n".join(f"{label:<{LABEL_WIDTH}}{printable(text)}" for label, text in lines)


def _member_row(member: dict[str, Any], now_s: float) -> tuple[str, ...]:
    revoked = parse_time_s(member["revoked_at"] or "")
    if revoked is not None:
        state = f"revoked {human_time(revoked, now_s)}"
    else:
        state = f"until {human_time(parse_time_s(member['expires_at']), now_s)}"
    return printable(member["name"]) or "-", member["peer_id"], ", ".join(member["scopes"]) or "-", state


# --- with and without a peer -------------------------------------------------------------------------------------------


def _asked(target: Target, method: str, path: str, body: Any = None) -> dict[str, Any]:
    with open_client(target) as client:
        answer: dict[str, Any] = client.call(method, path, body)
    return answer


def runs_none(target: Target) -> bool:
    """Whether no peer was named by its address, and none runs on the home."""
    if target.api or (not target.home and os.environ.get("MESHMAX_API")):
        return False
    try:
        running_api(home_folder(target.home))
    except (NoPeerRunning, PeerStarting):  # who starts is told when the home is to be held
        return True
    return False


@contextmanager
def held_mesh(target: Target) -> Iterator[tuple[MeshFiles, PeerId]]:
    """The files of the home that no peer runs on, and who it is; held, so that none starts meanwhile. Raises ConfigError."""
    from meshmax.store.home import hold_home
    from meshmax.store.identity import load_identity
    from meshmax.store.mesh_files import MeshFiles

    with hold_home(home_folder(target.home).absolute()) as home:
        yield MeshFiles(home.path), load_identity(home.path).peer_id


def _make(name: str, target: Target) -> None:
    with held_mesh(target) as (files, peer_id):
        _require_open(files)
        files.found(name, peer_id, time.time())
        files.drop_pending()


def _require_open(files: MeshFiles, but: str = "") -> None:
    own = files.load_own()
    if own is not None and own.mesh != but:
        raise InvalidRequest(f"this peer is in the mesh '{own.name}' already: `meshmax mesh leave` leaves it first")


def local_view(target: Target) -> dict[str, Any]:
    """The mesh as the files say, in the shape of GET /api/v1/mesh."""
    from meshmax.api.membership_routes import mesh_json
    from meshmax.core.membership import Membership
    from meshmax.store.identity import KEY_FILE, load_identity
    from meshmax.store.mesh_files import MeshFiles
    from meshmax.wire.ticket import parse_ticket

    home = home_folder(target.home).absolute()
    files = MeshFiles(home)
    own, now_s = files.load_own(), time.time()
    pending = files.load_pending()
    waiting = "not joined yet: a ticket waits to be used, and `meshmax peer` does it" if pending else ""
    joining = parse_ticket(pending).mesh_name if pending else ""
    if own is None:
        return mesh_json(MeshView(OPEN_MESH, "", False, SCOPES, problem=waiting, joining=joining))
    root = files.load_root(own.mesh) is not None
    learnt = tuple(BootstrapAddress(text, "ticket") for text in own.bootstrap)
    if not (home / KEY_FILE).exists():
        return mesh_json(MeshView(own.mesh, own.name, root, (), problem="the identity is gone: join with a new ticket"))
    try:
        certificate = Membership(own.mesh, files.load_notices(own.mesh), now_s).verify(
            own.chain, load_identity(home).peer_id, now_s
        )
    except NotAMember as error:
        return mesh_json(MeshView(own.mesh, own.name, root, (), problem=error.message))
    scopes, until = certificate.scopes, certificate.expires_at_s
    return mesh_json(MeshView(own.mesh, own.name, root, scopes, until, waiting, learnt, joining))
