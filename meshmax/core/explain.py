"""The words of a decision: what each candidate is like, and in one line who answers, why, and whom it beat.

The line stands in a response header: printable ASCII, and names of peers hold no separators of it. Pure. Not here: the
decision (core.routing).
"""

from __future__ import annotations

from collections.abc import Iterable

from meshmax.base.ids import PeerId
from meshmax.base.route import Candidate, Policy, Verdict
from meshmax.base.status import MAX_PEER_NAME
from meshmax.core.estimate import ahead_of, rtt_of
from meshmax.core.policies import STICKY, Judged, tier_of


def explain(
    candidates: Iterable[Candidate],
    chosen: PeerId,
    failed: Iterable[tuple[str, str]] = (),
    tokens: int = 0,
    *,
    policy: Policy = "latency",
    among: int = 0,
) -> str:
    """One line of ASCII: who answers, why, and whom it beat, by which rule where that was estimated to be sooner.

    ``failed``: (name, error code) of those tried before. ``tokens``: how long an answer the estimates are for. ``among``:
    how many could be asked, where ``candidates`` are only the best of them.
    """
    candidates = tuple(candidates)
    best = next((c for c in candidates if c.peer_id == chosen), None)
    tried = "".join(f"; {plain_name(name)} failed before ({code})" for name, code in failed)
    if best is None:
        return f"nobody answered{tried}"
    others = [c for c in candidates if c.peer_id != chosen and c.verdict in ("slower", "chosen")]
    beat = ""
    if others:
        shown = min(others, key=lambda c: (c.estimate_s, c.peer_id))
        number = max(len(others), among - 1)
        count = f"{number} other{'s' if number > 1 else ''}"
        rule = f": {_rule(best, shown, policy)}" if shown.estimate_s < best.estimate_s else ""
        beat = f"; beat {count} (next: {plain_name(shown.name)}, est {_seconds(shown.estimate_s)}{rule})"
    elif not tried:
        beat = "; nobody else has it ready" if policy != "local-only" else "; only this machine was asked for"
    size = f" for {tokens} tokens" if tokens else ""
    return f"{plain_name(best.name)}: {best.why}, est {_seconds(best.estimate_s)}{size}{beat}{tried}"


def candidate_of(judged: Judged, verdict: Verdict, words: str = "") -> Candidate:
    """What is told of a contender. ``words``: why it was kept out."""
    contender = judged.contender
    view, loaded = contender.view, contender.model.state == "loaded"
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
    )


def plain_name(name: str) -> str:
    """A peer's name as a header can carry it: printable ASCII without separators of the line, at most MAX_PEER_NAME."""
    kept = "".join(c if c.isascii() and c.isprintable() and c not in ",;" else "?" for c in name[:MAX_PEER_NAME])
    return kept.strip() or "unnamed"


def _describe(judged: Judged) -> str:
    contender = judged.contender
    model, view = contender.model, contender.view
    where = "GPU" if judged.device == "gpu" else "CPU"
    state = f"loaded on {where}" if model.state == "loaded" else f"on disk beside a {where}"
    if judged.device != model.device:
        state = "on disk, too large for its GPU"
    if contender.prefix_tokens and model.state == "loaded":
        state += f" with {contender.prefix_tokens} token{'s' * (contender.prefix_tokens != 1)} of the prompt read"
    away = "here" if view.state == "self" else f"{rtt_of(contender) * 1000:.1f} ms away ({view.path})"
    waiting = max(0, ahead_of(contender.load) - max(contender.load.capacity, 1) + 1)
    return f"{state}, {away}, {waiting} queued"


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
