"""The commands about transfers: which there are (transfers), steering them, and having other peers download (distribute)."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any, Final

from cyclopts import App, Parameter

from meshmax.base.errors import InvalidRequest
from meshmax.base.units import format_bytes
from meshmax.cli.client import PeerClient, Target, open_client
from meshmax.cli.models import ENDED, HERE, AsJson, advised
from meshmax.cli.output import emit, emit_json, printable, table
from meshmax.cli.spelling import corrected

WATCH_INTERVAL_S: Final = 1.0
ENDED_SHOWN: Final = 10  # ended transfers in the table; --json has all that are remembered
_HEADER: Final = ("ID", "MODEL", "STATE", "DONE", "RATE", "ETA", "SOURCES")
_CLEAR: Final = "\x1b[H\x1b[J"  # cursor home, erase what is below

transfers = App(
    name="transfers",
    help="List the transfers of models, or cancel, pause and resume them.",
    help_format="plaintext",
    version_flags=[],
    default_parameter=Parameter(negative=(), show_default=False),
    result_action="return_value",
)


@transfers.default
def list_transfers(
    *,
    watch: Annotated[bool, Parameter(name=("--watch", "-w"), help="Show them again every second.")] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """List the transfers of models: those under way, what is sent to others, and those that ended lately."""
    with open_client(target) as client:
        while True:
            answer = client.get("/api/v1/transfers")
            if watch and as_json:
                emit(json.dumps(answer, ensure_ascii=False))
            elif as_json:
                emit_json(answer)
            else:
                if watch and sys.stdout.isatty():
                    sys.stdout.write(_CLEAR)
                emit(describe(answer["transfers"]))
            if not watch:
                return
            sys.stdout.flush()
            time.sleep(WATCH_INTERVAL_S)


@transfers.command
def cancel(transfer: str, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """End a transfer; what was fetched is kept, and pulling the model again goes on from there."""
    _steer(transfer, "cancel", as_json, target)


@transfers.command
def pause(transfer: str, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """Halt a transfer until it is resumed; a detached one stays so over restarts."""
    _steer(transfer, "pause", as_json, target)


@transfers.command
def resume(transfer: str, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """Let a paused transfer go on; one that waits tries again at once."""
    _steer(transfer, "resume", as_json, target)


def _steer(transfer: str, action: str, as_json: bool, target: Target) -> None:
    if not transfer.isascii() or not transfer.replace("-", "").isalnum():
        raise InvalidRequest(f"'{printable(transfer)[:100]}' is no transfer's id: `meshmax transfers` shows them")
    with open_client(target) as client:
        answer = client.call("POST", f"/api/v1/transfers/{transfer}/{action}", {})
    if as_json:
        emit_json(answer)
    else:
        emit(f"{answer['id']} is {answer['state']}")


def describe(shown: list[dict[str, Any]]) -> str:
    """The table of transfers, and below it why some of them wait or failed."""
    going = [transfer for transfer in shown if transfer["state"] not in ENDED]
    ended = [transfer for transfer in shown if transfer["state"] in ENDED][:ENDED_SHOWN]
    lines = [table(_HEADER, [_row(transfer) for transfer in (*going, *ended)])]
    reasons = [
        (t["id"], str(t.get("reason") or t.get("note") or "")) for t in (*going, *ended) if t["state"] != "cancelled"
    ]
    reasons = [(name, text) for name, text in reasons if text]
    if reasons:
        lines += ["", *(f"{name}: {printable(reason)}" for name, reason in reasons)]
    return "\n".join(lines)


def _row(transfer: dict[str, Any]) -> tuple[str, ...]:
    done, total, rate = transfer["bytes_done"], transfer["bytes_total"], transfer.get("rate_bytes_per_s") or 0
    peers = transfer.get("peers") or {}
    if transfer["direction"] == "out":
        state = "sending" if transfer["state"] == "running" else "sent"
        return (transfer["id"], transfer["model"], state, format_bytes(done), show_rate(rate), "-", f"to {len(peers)}")
    amount = f"{format_bytes(done)} / {format_bytes(total)}" if total else "-"
    sources = str(active_sources(peers) if transfer["state"] not in ENDED else len(peers))
    return (
        transfer["id"],
        transfer["model"],
        transfer["state"],
        amount,
        show_rate(rate),
        show_eta(transfer.get("eta_s")),
        sources,
    )


def active_sources(peers: dict[str, dict[str, Any]]) -> int:
    """How many peers are giving something now."""
    return sum(bool(peer.get("lanes") or peer.get("wants") or peer.get("rate_bytes_per_s")) for peer in peers.values())


def show_rate(bytes_per_s: float) -> str:
    """A rate as people read it; ``-`` for none."""
    return f"{format_bytes(int(bytes_per_s))}/s" if bytes_per_s >= 1 else "-"


def show_eta(seconds: float | None) -> str:
    """Remaining time: ``42s``, ``3m05s``, ``1h20m``; ``-`` where it is not known."""
    if seconds is None or seconds > 99 * 3600:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02}m"


def distribute(
    model: str,
    /,
    *,
    to: Annotated[
        tuple[str, ...],
        Parameter(
            name="--to", consume_multiple=True, negative=(), help="Peers by name or PeerId, that are to download it."
        ),
    ] = (),
    replicas: Annotated[int, Parameter(help="How many peers are to have it in the end, this one included.")] = 0,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Have other peers download a model: those that are named, or as many as it takes to have so many replicas."""
    if bool(to) is bool(replicas):
        raise InvalidRequest("say either --to PEER... or --replicas N")
    body = {"nodes": list(to)} if to else {"replicas": replicas}
    with open_client(target) as client:
        with corrected(client, model):
            answer = client.call("POST", f"/api/v1/models/{_in_path(model)}/distribute", body)
        names = {} if as_json else _node_names(client)
    if as_json:
        emit_json(answer)
        return
    for peer, transfer in answer["transfer_ids"].items():
        emit(f"{names.get(peer, peer)} downloads it as {printable(transfer)}")
    for peer, error in answer.get("refused", {}).items():
        emit(f"{names.get(peer, peer)} refused: {printable(error['error'])}")
    if not answer["transfer_ids"] and not answer.get("refused"):
        emit(f"{replicas} peers have it already")


def detach(client: PeerClient, model: str, as_json: bool) -> None:
    """Have the peer pull ``model`` in the background."""
    with advised(client, model):
        answer = client.call("POST", f"/api/v1/models/{_in_path(model)}/download", {})
    if as_json:
        emit_json(answer)
    else:
        emit(f"downloading '{model}' as {answer['transfer_id']}: `meshmax transfers` shows how far it is")


def _in_path(model: str) -> str:
    from urllib.parse import quote

    return quote(model, safe="/:@")


def _node_names(client: PeerClient) -> dict[str, str]:
    nodes = client.get("/api/v1/nodes")["nodes"]
    return {peer: printable(node["name"]) for peer, node in nodes.items() if node.get("name")}
