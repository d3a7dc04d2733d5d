"""`meshmax pin`, `meshmax unpin` and `meshmax sweep`: which models are kept, and making room."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import Parameter

from meshmax.base.errors import StoreFull
from meshmax.base.names import parse_name, split_digest
from meshmax.base.units import format_bytes, parse_bytes
from meshmax.cli.client import PeerClient, Target, open_client
from meshmax.cli.models import HERE, ID_CHARACTERS, AsJson
from meshmax.cli.output import emit, emit_json, human_time, parse_time_s, printable, table
from meshmax.cli.spelling import corrected

_HEADER = ("NAME", "ID", "SIZE", "LAST USED", "WHAT", "WHY")


def pin(model: str, /, *more: str, as_json: AsJson = False, target: Target = HERE) -> None:
    """Keep models: no sweep takes them, and their names go on meaning them."""
    _change("pin", (model, *more), as_json, target)


def unpin(model: str, /, *more: str, as_json: AsJson = False, target: Target = HERE) -> None:
    """Let go of pinned models: a sweep may take them again."""
    _change("unpin", (model, *more), as_json, target)


def _change(verb: str, models: tuple[str, ...], as_json: bool, target: Target) -> None:
    for model in models:
        parse_name(split_digest(model)[0])
    with open_client(target) as client:
        answers = [_changed(client, verb, model) for model in models]
    if as_json:
        emit_json({"models": answers})
        return
    for answer in answers:
        words = f"is pinned to {answer['digest'][:ID_CHARACTERS]}" if answer["pinned"] else "is not pinned"
        emit(f"'{printable(answer['name'])}' {words}")


def _changed(client: PeerClient, verb: str, model: str) -> dict[str, Any]:
    with corrected(client, model, here=True):
        answer: dict[str, Any] = client.call("POST", f"/api/v1/models/{quote(model, safe='/:@')}/{verb}", {})
        return answer


def sweep(
    *,
    dry_run: Annotated[bool, Parameter(help="Only show what would go, and why each other model stays.")] = False,
    free: Annotated[str, Parameter(help="How much is to go, like 20GB, whether or not a budget is set.")] = "",
    last_copies: Annotated[bool, Parameter(help="Also take what no other peer is known to have.")] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Make room: remove the models that were used longest ago, as far as disk_budget and keep_free ask for it.

    Never a pinned one, one in use, or the last copy that the mesh is known to have. Raises StoreFull if too little could go.
    """
    body = {"dry_run": dry_run, "free": parse_bytes(free) if free else 0, "last_copies": last_copies}
    with open_client(target) as client:
        answer = client.call_slowly("POST", "/api/v1/sweep", body)  # peers are asked
    if as_json:
        emit_json(answer)
    else:
        emit(describe(answer, time.time()))
    if answer["lacking_bytes"]:
        would = "would be" if dry_run else "are"
        raise StoreFull(f"{format_bytes(answer['lacking_bytes'])} more {would} needed, and nothing else may go")


def describe(answer: dict[str, Any], now_s: float) -> str:
    """The table of a sweep, and a line that sums it up."""
    rows = [_row(one, now_s) for one in (*answer["models"], *answer["partials"])]
    would = "would be " if answer["dry_run"] else ""
    bounds = [f"{format_bytes(answer['used_bytes'])} used", f"{format_bytes(answer['free_bytes'])} free"]
    if answer["disk_budget_bytes"] is not None:
        bounds.append(f"budget {format_bytes(answer['disk_budget_bytes'])}")
    if answer["keep_free_bytes"]:
        bounds.append(f"{format_bytes(answer['keep_free_bytes'])} to stay free")
    summary = f"{format_bytes(answer['freed_bytes'])} {would}freed ({', '.join(bounds)})"
    return "\n".join([table(_HEADER, rows), "", summary])


def _row(one: dict[str, Any], now_s: float) -> tuple[str, ...]:
    names = ", ".join(one["names"]) if "names" in one else "(partial)"
    last = human_time(parse_time_s(one.get("last_used") or one["touched"]), now_s)
    return (
        printable(names),
        one["digest"][:ID_CHARACTERS],
        format_bytes(one["size"]),
        last,
        one["action"],
        printable(one["reason"]),
    )
