"""`meshmax ticket` and `meshmax join`: inviting a peer into a mesh, and following an invitation.

A ticket is a secret until it is used. It is printed where it was asked for and nowhere else; `join` reads it from its argument
(and hides that from the process list at once, see cli.main), from standard input, or asks for it without showing it. It goes to
the peer in a request's body. Without a running peer it is kept in a file of mode 0600 for the next `meshmax peer`. Not here: the
text's form (wire.ticket), who redeems it (services.membership).
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from typing import Annotated, Any, Final

from cyclopts import Parameter

from meshmax.base.errors import ConnectError, InvalidRequest
from meshmax.base.membership import Ticket
from meshmax.base.units import format_span, parse_span_s
from meshmax.cli.client import Target, open_client
from meshmax.cli.membership import describe, held_mesh, local_view, runs_none
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, human_time, parse_time_s, printable
from meshmax.core.membership import parse_scopes
from meshmax.core.tickets import MAX_LIFE_S, MAX_USES
from meshmax.wire.ticket import MAX_PASTED, parse_ticket, ticket_text

QUIET_ZONE: Final = 2  # dots around a QR code; readers want some, the standard's four cost four lines


def ticket(
    *,
    expires: Annotated[
        str,
        Parameter(
            help="How long it can be used: 90s, 30m, 12h, 7d, 2w; 366d at most, 7d if not said.",
            allow_leading_hyphen=True,
        ),
    ] = "7d",
    scope: Annotated[
        str,
        Parameter(
            help="What its user may do: infer (have prompts answered), pull (be sent models), admin (admit and revoke"
            " others); infer,pull if not said."
        ),
    ] = "infer,pull",
    uses: Annotated[
        int, Parameter(help=f"How many peers can use it: 1 to {MAX_USES}, 1 if not said.", allow_leading_hyphen=True)
    ] = 1,
    withdraw: Annotated[bool, Parameter(help="Make none, but take back all that this peer gave out.")] = False,
    no_qr: Annotated[bool, Parameter(help="Print no QR code.")] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Make a ticket: who has it can `meshmax join` this mesh, once unless --uses says more. Keep it secret.

    Into a pipe only the ticket's text is printed: `meshmax ticket | ssh other meshmax join`.
    """
    if withdraw:
        _withdraw(as_json, target)
        return
    body = {"expires_s": _life_s(expires), "scopes": parse_scopes(scope), "uses": _checked_uses(uses)}
    with open_client(target) as client:
        answer = client.call("POST", "/api/v1/mesh/tickets", body)
    if as_json:
        emit_json(answer)
    elif not sys.stdout.isatty():
        emit(printable(answer["ticket"]))
        if warning := answer.get("warning"):
            sys.stderr.write(f"{printable(warning)}\n")
    else:
        emit(invitation(answer, time.time(), shutil.get_terminal_size().columns, qr=not no_qr))


def _life_s(text: str) -> int:
    seconds = parse_span_s(text)
    if seconds > MAX_LIFE_S:
        raise InvalidRequest(f"--expires takes {MAX_LIFE_S // 86400}d at most, like 90s, 30m, 12h, 7d or 2w")
    return seconds


def _checked_uses(uses: int) -> int:
    if not 1 <= uses <= MAX_USES:
        raise InvalidRequest(f"--uses takes a number from 1 to {MAX_USES}: how many peers can use the ticket")
    return uses


def _withdraw(as_json: bool, target: Target) -> None:
    with open_client(target) as client:
        answer = client.call("POST", "/api/v1/mesh/tickets/withdraw", {})
    if as_json:
        emit_json(answer)
    else:
        count = answer["withdrawn"]
        emit(f"{'One ticket' if count == 1 else f'{count} tickets'} that could still be used will be refused now.")


def invitation(answer: dict[str, Any], now_s: float, width: int, qr: bool) -> str:
    """What a person sees of a new ticket, ``width`` columns wide."""
    text = printable(answer["ticket"])
    lines = []
    if qr:
        narrow = "(This terminal is too narrow for the QR code: a wider one shows it.)"
        lines = [qr_code(text, width) or narrow]
    count = answer["uses"]
    until = human_time(parse_time_s(answer["expires_at"]), now_s)
    lines += [
        text,
        "On the other machine:  meshmax join  (it asks for the ticket, and shows it to nobody)",
        f"It invites {'one peer' if count == 1 else f'{count} peers'} into '{printable(answer['mesh_name'])}'"
        f" with {', '.join(answer['scopes'])}, and ends {until}. Keep it secret until it is used.",
    ]
    if warning := answer.get("warning"):
        lines.append(f"Attention: {printable(warning)}")
    return "\n".join(lines)


def qr_code(text: str, width: int) -> str:
    """``text`` as a QR code in block characters; '' where ``width`` columns are too few."""
    import segno  # only where one is shown

    # Capitals take half the room of small letters, and a ticket reads the same in both.
    code = segno.make(text.upper(), error="l")
    if code.symbol_size(border=QUIET_ZONE)[0] > width:
        return ""
    drawn = io.StringIO()
    code.terminal(drawn, compact=True, border=QUIET_ZONE)
    return drawn.getvalue().rstrip("\n")


def join(
    text: Annotated[str, Parameter(name="TICKET", help="The ticket; better through a pipe or when asked for.")] = "",
    /,
    *,
    as_json: AsJson = False,
    target: Target = HERE,
) -> int:
    """Join the mesh that a ticket invites to. Without TICKET it is read from standard input, or asked for.

    Where no peer is running, the ticket is kept, and the next `meshmax peer` uses it. Exit code 4: not joined yet.
    """
    given = parse_ticket(text or _asked())
    if (late_s := time.time() - given.expires_at_s) > 0:
        raise InvalidRequest(f"the ticket expired {format_span(late_s)} ago by this machine's clock: ask for a new one")
    if runs_none(target):
        _keep(given, target, as_json)
        return 0
    if sys.stderr.isatty() and not as_json:
        sys.stderr.write(f"joining '{printable(given.mesh_name)}' ...\n")
    with open_client(target) as client:
        before = client.get("/api/v1/mesh")
        if _has_all(before, given):
            _tell_member(before, as_json)
            return 0
        answer = client.call("POST", "/api/v1/mesh/join", {"ticket": ticket_text(given)})
    joined = answer["mesh"] == given.mesh and not answer.get("joining")
    replaced = before.get("joining") or ""
    if as_json:
        emit_json({**answer, "replaced": replaced} if replaced else answer)
    else:
        if replaced:
            emit(_replaced(replaced))
        emit(describe(answer, time.time()) if joined else _not_yet(answer, given))
    return 0 if joined else ConnectError.exit_code


def _has_all(view: dict[str, Any], given: Ticket) -> bool:
    """Whether the ticket would bring nothing: it is left to somebody else."""
    return view["mesh"] == given.mesh and not view["problem"] and set(given.scopes) <= set(view["scopes"])


def _tell_member(view: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(view)
    else:
        emit(
            f"This peer is already a member of '{printable(view['name'])}', with {', '.join(view['scopes'])};"
            " the ticket was not used."
        )


def _replaced(mesh_name: str) -> str:
    return f"The ticket for '{printable(mesh_name)}' that was kept until now is given up for this one."


def _not_yet(answer: dict[str, Any], given: Ticket) -> str:
    why = printable(answer["problem"]) or "not joined yet; it is tried on by the running peer"
    return f"The ticket for '{printable(given.mesh_name)}' is kept; {why}. `meshmax mesh` shows how it stands."


def _asked() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.read(MAX_PASTED + 1)
    import getpass

    try:
        return getpass.getpass("Ticket (not shown): ")
    except EOFError:
        sys.stderr.write("\n")  # the prompt's line is still open
        raise InvalidRequest(
            "a ticket is needed: `meshmax ticket` at a member of the mesh makes one, and it is pasted here"
        ) from None


def _keep(given: Ticket, target: Target, as_json: bool) -> None:
    view = local_view(target)
    if _has_all(view, given):
        _tell_member(view, as_json)
        return
    with held_mesh(target) as (files, _):
        own = files.load_own()
        if own is not None and own.mesh != given.mesh:
            raise InvalidRequest(f"this peer is in the mesh '{own.name}' already: `meshmax mesh leave` leaves it first")
        kept, text = files.load_pending(), ticket_text(given)
        replaced = parse_ticket(kept).mesh_name if kept and kept != text else ""
        files.save_pending(text)
    if as_json:
        told = {"mesh": given.mesh, "name": given.mesh_name, "pending": True}
        emit_json({**told, "replaced": replaced} if replaced else told)
    else:
        if replaced:
            emit(_replaced(replaced))
        name = printable(given.mesh_name)
        emit(f"The ticket for '{name}' is kept: no peer is running here, and the next `meshmax peer` uses it.")
