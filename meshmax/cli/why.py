"""`meshmax why`: where a prompt went, and why there: whom it could go to with figures, what was tried, how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Final

from cyclopts import Parameter

from meshmax.base.errors import InvalidRequest, NotFound
from meshmax.cli.client import Target, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, human_time, parse_time_s, printable, table
from meshmax.core.why import CANCELLED, VERDICT_WORDS, seconds

_HEADER: Final = ("PEER", "VERDICT", "EXPECTED", "WAY", "QUEUE", "LOADING", "PROMPT", "ANSWER", "WHY")
MAX_NAMED: Final = 4  # ids that a text is the beginning of
_PARTS: Final = ("rtt_ms", "queue_ms", "load_ms", "prompt_ms", "output_ms")


def why(
    request: Annotated[
        str | None,
        Parameter(
            help="Its id, as in X-Request-ID and `meshmax run --verbose`, or how that begins; else the last one."
        ),
    ] = None,
    /,
    *,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Show where a prompt of this peer went and why, while it is under way as well. The prompt itself is not kept."""
    from urllib.parse import quote

    with open_client(target) as client:
        if request is None:
            known = client.get("/api/v1/requests")["requests"]
            if not known:
                raise NotFound(
                    "no prompt has come to this peer yet; those that it answers for others are known where they came"
                )
            route = known[0]
        else:
            try:
                route = client.get(f"/api/v1/requests/{quote(request, safe='')}")
            except NotFound:
                if (begun := _begun_by(request, client.get("/api/v1/requests")["requests"])) is None:
                    raise
                route = begun
    if as_json:
        emit_json(route)
    else:
        emit(describe(route, time.time()))


def _begun_by(text: str, known: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The one of ``known``, newest first, whose id begins with ``text``; None: there is none. Raises InvalidRequest."""
    found = {route["id"]: route for route in reversed(known) if text and route["id"].startswith(text)}
    if len(found) > 1:
        ids = [printable(one) for one in reversed(found)]
        more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
        raise InvalidRequest(
            f"{len(ids)} ids begin with '{text[:100]}': {', '.join(ids[:MAX_NAMED])}{more}; give more of the one that you mean"
        )
    return next(iter(found.values()), None)


def describe(route: dict[str, Any], now_s: float) -> str:
    """What a person reads of one request."""
    asked = human_time(parse_time_s(route.get("started_at") or ""), now_s, "at an unknown time")
    lines = [f"request {printable(route['id'])}, {asked.lower()}", ""]
    lines += [printable(line) for line in route.get("story") or ()]
    if candidates := route.get("candidates"):
        attempts = route.get("attempts") or ()
        lines += ["", table(_HEADER, [_row(candidate, attempts) for candidate in candidates])]
    return "\n".join(lines)


def _row(candidate: dict[str, Any], attempts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    figures = candidate.get("figures") or {}
    parts = [_time(figures.get(key)) for key in _PARTS]
    name = candidate.get("name") or candidate["peer_id"][-8:]
    return (
        name,
        _verdict(candidate.get("verdict", ""), [a for a in attempts if a["peer_id"] == candidate["peer_id"]]),
        _time(candidate.get("estimate_ms")),
        *parts,
        candidate.get("why", ""),
    )


def _verdict(verdict: Any, own: Sequence[dict[str, Any]]) -> str:
    """The verdict with what came of it. ``own``: what the peer was asked."""
    last = own[-1] if own else {}
    if verdict == "slower" and last.get("kind") == "continuation" and last.get("tokens") and not last.get("error"):
        return "carried it on"
    if verdict == "slower" and last.get("error") == CANCELLED:
        return "asked, and slower"
    if verdict == "chosen" and last.get("tokens") and last.get("error") not in ("", None, CANCELLED):
        return "began, broke off"
    return VERDICT_WORDS.get(verdict, str(verdict))


def _time(ms: float | None) -> str:
    return seconds(ms / 1000) if ms else "-"
