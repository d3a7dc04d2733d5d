"""`meshmax drain` and `meshmax undrain`: take a peer out of service, and back into it.

The command says for how long at most it waits, what comes then and how to leave; then it waits until the peer is drained and
tells meanwhile how many answers still run and what time is left. Ending it with Ctrl-C leaves the draining
going on. Not here: what draining is (core.draining).
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, Final

from cyclopts import Parameter

from meshmax.base.drain import DEADLINE_S, MAX_DEADLINE_S
from meshmax.base.errors import InvalidRequest
from meshmax.base.units import parse_duration_s
from meshmax.cli.client import PeerClient, Target, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, printable

ASK_INTERVAL_S: Final = 0.25
TOLD_EVERY_S: Final = 10.0  # where no terminal shows the time that is left: so that who waits sees that it goes on
_NEW_LINE: Final = "\r\x1b[K"  # back to the beginning of the line, which is erased

Peer = Annotated[str | None, Parameter(help="Name or PeerId; else the peer that runs here.")]
Deadline = Annotated[
    str,
    Parameter(
        help=f"How long answers that run may go on before other peers carry them on; default {DEADLINE_S:.0f}s; 0s: at once."
    ),
]


def drain(
    peer: Peer = None, /, *, deadline: Deadline = f"{DEADLINE_S:.0f}s", as_json: AsJson = False, target: Target = HERE
) -> None:
    """Take a peer out of service: it takes no prompts any more, and those that it answers end or go on elsewhere.

    It stays in the mesh, still gives its models to others, and prompts that come to its own API are answered by other peers.
    A restart ends the draining. Another peer is drained with the scope admin, in a private mesh.
    """
    deadline_s = parse_duration_s(deadline)
    if not 0 <= deadline_s <= MAX_DEADLINE_S:
        raise InvalidRequest(
            f"the deadline must be between 0s (other peers carry on at once) and {MAX_DEADLINE_S / 3600:.0f}h, not {deadline}"
        )
    with open_client(target) as client:
        path, name = _node(client, peer)
        stand = client.call("POST", f"{path}/drain", {"deadline_s": deadline_s})
        if stand["status"] == "draining" and not as_json:
            emit(_told(name, stand, f" {name}" if peer else ""))
        stand = _wait(client, path, name, stand, quiet=as_json)
    if as_json:
        emit_json(stand)
    elif stand["status"] == "drained":
        moved = stand["handed_over"]
        emit(
            f"{name} is drained: it takes no prompts"
            + (f", and {_count(moved)} {_were(moved)} handed over" if moved else "")
            + f" (`meshmax undrain{f' {name}' if peer else ''}` takes it back)"
        )
    else:
        emit(f"{name} was undrained meanwhile: it takes prompts again")


def undrain(peer: Peer = None, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """Let a drained peer take prompts again."""
    with open_client(target) as client:
        path, name = _node(client, peer)
        stand = client.call("POST", f"{path}/undrain", {})
    if as_json:
        emit_json(stand)
    else:
        emit(f"{name} takes prompts again")


def _node(client: PeerClient, peer: str | None) -> tuple[str, str]:
    """(path of the node's resource, its name)."""
    from urllib.parse import quote

    if peer is None:
        state = client.get("/api/v1/status")
        return f"/api/v1/nodes/{state['node_id']}", printable(state.get("name") or state["node_id"])
    node = client.get(f"/api/v1/nodes/{quote(peer, safe='')}")
    return f"/api/v1/nodes/{node['id']}", printable(node.get("name") or node["id"])


def _told(name: str, stand: dict[str, Any], named: str) -> str:
    """What is waited for, for how long at most, what comes then, how to hurry and how to leave. ``named``: the peer, if given."""
    running, left_s = _count(stand["running"]), stand["left_s"] or 0.0
    if left_s < 1:
        return f"{name} takes no prompts; {running} under way here: other peers carry on at once"
    return (
        f"{name} takes no prompts; {running} may go on for {_time(left_s)}, then other peers carry on what is not whole\n"
        f"(`meshmax drain{named} --deadline 0s` hands over at once; Ctrl-C leaves this command, and {name} goes on draining)"
    )


def _wait(client: PeerClient, path: str, name: str, stand: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """How the node stands once it is no longer draining; what is left is shown meanwhile."""
    shown = (stand["running"], stand["left_s"] or 0.0)
    terminal, written = sys.stdout.isatty() and not quiet, False
    try:
        while stand["status"] == "draining":
            running, left_s = stand["running"], stand["left_s"] or 0.0
            text = f"{_count(running)} still running, {_time(left_s)} left"
            if terminal:
                sys.stdout.write(_NEW_LINE + text)
                written = True
            elif not quiet and (running != shown[0] or abs(left_s - shown[1]) >= TOLD_EVERY_S):
                emit(text)
                shown = (running, left_s)
            sys.stdout.flush()
            time.sleep(ASK_INTERVAL_S)
            stand = client.get(f"{path}/drain")
    except KeyboardInterrupt:
        sys.stderr.write(f"\nthe draining of {name} goes on\n")
        raise
    if written:
        sys.stdout.write(_NEW_LINE)
    return stand


def _time(seconds: float) -> str:
    """``4 min 10 s``: whole seconds, without what is zero."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{value} {unit}" for value, unit in ((hours, "h"), (minutes, "min"), (rest_s, "s")) if value]
    return " ".join(parts) or "0 s"


def _were(answers: int) -> str:
    return "was" if answers == 1 else "were"


def _count(answers: int) -> str:
    return f"{answers} answer{'' if answers == 1 else 's'}"
