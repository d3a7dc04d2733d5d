"""`meshmax doctor`: what each rung of discovery finds, who sees whom, and what to do where something is wrong.

Asks the peer that runs here; where none runs, looks at this machine alone and says so. Exit code 0 only when all is well.
Not here: what is found (core.doctor).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from meshmax.base.errors import NotFound, NotOffered, RemoteProtocolError
from meshmax.cli.client import NoPeerRunning, PeerClient, Target, home_folder, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, printable, table

EXIT_NOT_WELL: Final = 1
_MARKS: Final = {"ok": "ok", "warning": "WARN", "error": "FAIL"}
_PATH: Final = "/api/v1/doctor?stream=true"


def doctor(*, as_json: AsJson = False, target: Target = HERE) -> int:
    """Find out why peers do not find each other, and what to do. Ends with 0 only when all is well."""
    try:
        with open_client(target) as client:
            diagnosis = _examine(client, show=not as_json)
    except NoPeerRunning:
        if target.api or os.environ.get("MESHMAX_API"):
            raise  # another machine's peer: nothing of this one's would be of use
        diagnosis = _examine_machine(target)
    if as_json:
        emit_json(diagnosis)
    else:
        emit(describe(diagnosis))
    return 0 if diagnosis["well"] else EXIT_NOT_WELL


def _examine(client: PeerClient, *, show: bool) -> dict[str, Any]:
    try:
        with client.open_answer("GET", _PATH, timed=True) as answer:
            for line in answer.lines():
                if line.get("status") == "success":
                    return {key: value for key, value in line.items() if key != "status"}
                if show:
                    sys.stderr.write(f"{printable(str(line.get('status', '')))} ...\n")
                    sys.stderr.flush()
    except NotFound:
        raise NotOffered(f"the peer at {client.url} is older than `meshmax doctor`: update it") from None
    raise RemoteProtocolError("the peer stopped in the middle of it; ask again")


def _examine_machine(target: Target) -> dict[str, Any]:
    """Without a peer."""
    import msgspec

    from meshmax.base.doctor import Facts
    from meshmax.cli.settings import load_config
    from meshmax.core.doctor import diagnose
    from meshmax.net.addresses import running_addresses
    from meshmax.services.checkup import check_machine

    began_s = time.monotonic()
    config = load_config({"home": str(home_folder(target.home))}, os.environ)
    machine = check_machine(config, running_addresses(), time.time(), running=False)
    shown: dict[str, Any] = msgspec.to_builtins(diagnose(Facts(machine), time.monotonic() - began_s))
    return shown


# --- for people ----------------------------------------------------------------------------------------------------------


def describe(diagnosis: dict[str, Any]) -> str:
    """Rungs, peers, findings, and a line that sums it up."""
    peer = diagnosis["facts"].get("peer") or {}
    parts: list[str] = []
    told = " ".join(finding["sentence"] for finding in diagnosis["findings"])
    if peer.get("rungs"):
        parts += [
            table(
                ("RUNG", "STATE", "FOUND", "FIRST", "NOW", "PROBLEM"), [_rung_row(look, told) for look in peer["rungs"]]
            ),
            "",
        ]
    if peer.get("bootstrap"):
        parts += [table(("BOOTSTRAP NODE", "NAMED BY", "PROBLEM"), map(_bootstrap_row, peer["bootstrap"])), ""]
    if peer.get("looked_back"):
        header = ("PEER", "WE SEE IT BY", "IT SEES US BY", "AT", "CLOCK", "PORTS")
        parts += [table(header, map(_peer_row, peer["looked_back"])), ""]
    parts += _finding_lines(diagnosis["findings"])
    wrong = [finding for finding in diagnosis["findings"] if finding["severity"] != "ok"]
    words = "all is well" if diagnosis["well"] else f"{len(wrong)} thing{'s' * (len(wrong) > 1)} to look at"
    return "\n".join([*parts, "", f"{words} ({diagnosis['took_s']:.1f} s)"])


def _rung_row(look: dict[str, Any], told: str) -> tuple[str, ...]:
    report = look["report"]
    problem = report.get("problem", "")
    if problem and problem in told:
        problem = "see below"
    if report["state"] == "off":
        return (report["name"], "off", "-", "-", "-", report.get("problem", ""))
    first_s, now_s = report.get("first_found_s"), look.get("first_s")
    works = now_s is not None and report["state"] != "failing"  # a rung that fails only says again what it knew
    now = f"{look['found_now']} in {_seconds(now_s)}" if works else "-"
    return (report["name"], report["state"], str(report["found"]), _seconds(first_s), now, problem)


def _bootstrap_row(seen: dict[str, Any]) -> tuple[str, ...]:
    return (seen["address"], seen.get("source", "config"), "see below" if seen.get("problem") else "-")


def _peer_row(told: dict[str, Any]) -> tuple[str, ...]:
    if told.get("why"):
        return (told["name"], _rungs(told["ours"]), "?", "-", "-", told["why"])
    ahead_s = told.get("clock_ahead_s")
    clock = "-" if ahead_s is None else "same" if abs(ahead_s) <= told["uncertain_s"] + 1.0 else f"{ahead_s:+.0f} s"
    tried = [port for port in told["ports"] if port["outcome"] != "not_tried"]
    ports = ", ".join(f"{port['kind']} {port['port']} {port['outcome']}" for port in tried)
    if not ports and told.get("relayed_s") is not None:
        ports = "not tried (relay)"
    return (told["name"], _rungs(told["ours"]), _rungs(told["theirs"]), told["address"] or "-", clock, ports or "-")


def _rungs(seen: Sequence[dict[str, Any]]) -> str:
    return ", ".join(each["rung"] for each in seen) or "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _finding_lines(findings: Sequence[dict[str, Any]]) -> Iterator[str]:
    for finding in findings:
        yield f"{_MARKS.get(finding['severity'], '?'):<4}  {printable(finding['sentence'])}"
        if finding.get("advice"):
            yield f"      -> {printable(finding['advice'])}"
