"""The words of a decision: what each candidate is like, and in one line who answers, why, and whom it beat.

The line stands in a response header (`header_line`): bounded printable ASCII, and names of peers hold no separators of it. Pure.
Not here: the decision (core.routing), the whole story (core.why).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from meshmax.base.errors import Busy, Draining
from meshmax.base.ids import PeerId
from meshmax.base.inference import Ask, EmbedRequest, is_load_only
from meshmax.base.route import Candidate, Policy, RequestKind, Verdict
from meshmax.base.status import MAX_PEER_NAME
from meshmax.core.contender import ToldWait
from meshmax.core.estimate import BOAST_S, ahead_of, rtt_of
from meshmax.core.policies import STICKY, TURNS, Judged, tier_of
from meshmax.core.told_wait import CALM_S

MAX_HEADER: Final = (
    600  # characters of a line in a header, the sign that it was cut included; servers take 8 KiB of headers
)
MAX_LINE: Final = 2000  # characters of the line that is kept: a sentence with the names of some peers
MIN_TOLD_S: Final = 0.05  # of a wait; less is not worth a word
MISTOLD: Final = 0.5  # of a wait that was told: that much more or less is worth a word
WAS_STOPPED: Final = "stopped"  # in place of the code of an error that says so
_TRIED_WORDS: Final = {Busy.code: "was busy", Draining.code: "is being drained", WAS_STOPPED: "was stopped"}


def explain(
    candidates: Iterable[Candidate],
    chosen: PeerId,
    failed: Iterable[tuple[str, str]] = (),
    tokens: int = 0,
    *,
    policy: Policy = "latency",
    among: int = 0,
    late: Collection[PeerId] = (),
    over: bool = True,
) -> str:
    """One line of ASCII: who answers, why, and whom it beat, by which rule where that was estimated to be sooner.

    ``failed``: (name, error code) of those tried before. ``tokens``: how long an answer the estimates are for. ``among``:
    how many could be asked that did not fail, ``chosen`` included, where ``candidates`` are only the best of them. ``late``:
    who was asked before, and had said nothing yet. ``over``: nothing more will come of it.
    """
    candidates = tuple(candidates)
    best = next((c for c in candidates if c.peer_id == chosen), None)
    tried = "".join(
        f"; {plain_name(name)} {_TRIED_WORDS.get(code) or f'failed before ({code})'}" for name, code in failed
    )
    if best is None:
        return f"nobody {'answered' if over else 'has answered yet'}{tried}"
    slow = [c for c in candidates if c.peer_id in late and c.peer_id != chosen]
    tried += "".join(f"; {plain_name(c.name)} was asked before, and had said nothing yet" for c in slow)
    others = [c for c in candidates if c.peer_id != chosen and c.verdict in ("slower", "chosen") and c not in slow]
    beat = ""
    if others:
        shown = min(others, key=lambda c: (c.estimate_s, c.peer_id))
        number = max(len(others), among - 1 - len(slow))
        count = f"{number} other{'s' if number > 1 else ''}"
        est = f"{plain_name(shown.name)}, est {_seconds(shown.estimate_s)}"
        rule = f": {_rule(best, shown, policy)}" if shown.estimate_s < best.estimate_s and not tried else ""
        turn = policy in TURNS and not tried  # one that took another's place has beaten the others
        beat = (
            f"; its turn ({policy}) before {count} (soonest: {est})" if turn else f"; beat {count} (next: {est}{rule})"
        )
    elif not tried:
        beat = "; nobody else has it ready" if policy != "local-only" else "; only this machine was asked for"
    size = f" for {tokens} tokens" if tokens else ""
    return f"{plain_name(best.name)}: {best.why}, est {_seconds(best.estimate_s)}{size}{beat}{tried}"


def header_line(line: str, request_id: str) -> str:
    """``line`` as a header can carry it: printable ASCII, at most MAX_HEADER characters of it.

    What is longer is cut between words, at a separator where there is one near, and says where the whole stands.
    """
    if len(line) <= MAX_HEADER and line.isascii() and line.isprintable():
        return line
    plain = "".join(c if " " <= c <= "~" else "?" for c in line[: MAX_HEADER + 1])
    if len(line) <= MAX_HEADER:
        return plain
    rest = f" ... (`meshmax why {request_id}` tells the rest)"
    kept = plain[: MAX_HEADER - len(rest)]
    ends = [kept.rfind(separator, len(kept) // 2) for separator in ("; ", ", ")]
    end = max(ends) if max(ends) >= 0 else kept.rfind(" ", len(kept) // 2)
    return (kept[:end] if end >= 0 else kept).rstrip(" ;,(") + rest


def plain_line(text: str) -> str:
    """A sentence as a line of a route: printable ASCII, at most MAX_LINE characters of it."""
    cut = " ..." if len(text) > MAX_LINE else ""
    return "".join(c if " " <= c <= "~" else "?" for c in text[: MAX_LINE - len(cut)]) + cut


def kind_of(ask: Ask) -> RequestKind:
    """What a request asks for."""
    if is_load_only(ask.request):
        return "unload" if ask.keep_alive_s == 0 else "load"
    return "vectors" if isinstance(ask.request, EmbedRequest) else "text"


def candidate_of(judged: Judged, verdict: Verdict, words: str = "") -> Candidate:
    """What is told of a contender. ``words``: why it was kept out."""
    contender = judged.contender
    view, loaded = contender.view, contender.is_ready
    return Candidate(
        peer_id=view.peer_id,
        name=view.status.name if view.status else "",
        device=judged.device,
        loaded=loaded,
        rtt_s=judged.figures.rtt_s,
        queue=ahead_of(contender.load),
        estimate_s=judged.estimate_s,
        verdict=verdict,
        why=f"{words}; {_describe(judged)}" if words else _describe(judged),
        figures=judged.figures,
        told_wait_s=contender.told.told_s if contender.told else None,
    )


def plain_name(name: str) -> str:
    """A peer's name as a header can carry it: printable ASCII without separators of the line, at most MAX_PEER_NAME."""
    kept = name[:MAX_PEER_NAME]
    if not (kept.isascii() and kept.isprintable()) or "," in kept or ";" in kept:
        kept = "".join(c if c.isascii() and c.isprintable() and c not in ",;" else "?" for c in kept)
    return kept.strip() or "unnamed"


def _describe(judged: Judged) -> str:
    contender = judged.contender
    model, view = contender.model, contender.view
    where = "GPU" if judged.device == "gpu" else "CPU"
    state = f"loaded on {where}" if model.state == "loaded" else f"on disk beside a {where}"
    if judged.device != model.device:
        state = "on disk, too large for its GPU"
    if contender.lacks_context:
        state += f" with {model.loaded_context} of the {contender.context_tokens} tokens of context that this wants: a new load"
    if contender.prefix_tokens and contender.is_ready:
        state += f" with about {contender.prefix_tokens} token{'s' * (contender.prefix_tokens != 1)} of the prompt read"
    away = "here" if view.state == "self" else f"{rtt_of(contender) * 1000:.1f} ms away ({view.path})"
    waiting = max(0, ahead_of(contender.load) - max(contender.load.capacity, 1) + 1)
    return f"{state}, {away}, {waiting} queued{_told(contender.told) if contender.told else ''}"


def _told(told: ToldWait) -> str:
    """The peer's own word on the wait, and what it is taken for where it was found to be wrong; '' where a slot is free."""
    if told.wait_s < (BOAST_S if told.free else MIN_TOLD_S):
        return ""
    word = f", told: you would wait {told.told_s:.1f} s"
    taken = abs(told.wait_s - told.told_s) >= MISTOLD * max(told.told_s, CALM_S)
    return f"{word}, taken for {told.wait_s:.1f} s by its former words" if taken else word


def _rule(best: Candidate, sooner: Candidate, policy: Policy) -> str:
    """By which rule ``best`` goes before one whose estimate is smaller."""
    if policy != "latency":
        return f"the policy is {policy}"
    if tier_of(best.device, best.loaded) < tier_of(sooner.device, sooner.loaded):
        better = "a GPU" if best.device != sooner.device else "a loaded model"
        return f"near enough for {better} to go first"
    return f"not {STICKY:.0%} sooner than the last choice"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 100 else f"{min(value, 1e6):.0f} s"
