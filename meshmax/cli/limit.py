"""`meshmax limit`: how fast blobs may move, shown and changed while the peer runs."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

from cyclopts import Parameter

from meshmax.base.units import format_bytes, parse_rate
from meshmax.cli.client import Target, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, table

_ROWS: Final = (
    ("up", "out, in all"), ("down", "in, in all"), ("peer_up", "out, to each peer"), ("peer_down", "in, from each peer"),
)  # fmt: skip
Rate = Annotated[str | None, Parameter(help="like 10MB/s, or none")]


def limit(
    *,
    up: Rate = None,
    down: Rate = None,
    peer_up: Rate = None,
    peer_down: Rate = None,
    reset: Annotated[bool, Parameter(help="Forget what was set by command: the configured limits hold again.")] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Show the limits on moving models, or set them: `--up 10MB/s`, `--down none`; `--reset` goes back to the configured ones.

    What is set holds at once and over restarts, and goes before the configured schedule.
    """
    given = {"up": up, "down": down, "peer_up": peer_up, "peer_down": peer_down}
    wanted = {key: parse_rate(text) for key, text in given.items() if text is not None}
    with open_client(target) as client:
        answer = client.get("/api/v1/limits")
        if wanted or reset:
            before = {} if reset else answer["set"]
            answer = client.call("PUT", "/api/v1/limits", {**before, **wanted})
    if as_json:
        emit_json(answer)
    else:
        emit(table(("WHAT", "LIMIT", "BY"), [_row(answer, key, words) for key, words in _ROWS]))
    if zeros := [key for key, text in given.items() if text is not None and text.strip().startswith("0")]:
        options = " ".join(f"--{key.replace('_', '-')} none" for key in zeros)
        sys.stderr.write(f"0 is no limit, as {options} says more plainly; `meshmax transfers pause` halts a pull\n")


def _row(answer: dict[str, Any], key: str, words: str) -> tuple[str, str, str]:
    rate = answer["limits"][key]
    by = "configuration" if answer["set"].get(key) is None else "command"
    return words, f"{format_bytes(rate)}/s" if rate else "none", by
