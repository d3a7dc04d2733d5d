"""Requests as the mesh's interface tells them: where each went, why, and what came of it; never a word of the prompt.

Moments are RFC 3339, lengths of time milliseconds (``_ms``); those of an attempt count from when it was sent, ``at_ms`` from when
the request came. ``story`` says the same in sentences (core.why).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshmax.api.stamps import rfc3339
from meshmax.base.ids import PeerId
from meshmax.base.route import Attempt, Candidate, Figures, Route
from meshmax.core.why import NOBODY, name_of, story


def request_json(route: Route, known: Mapping[PeerId, str] = NOBODY) -> dict[str, Any]:
    """One request's route. ``known``: what peers are called now, for those that were no candidates."""
    names = {**known, **{candidate.peer_id: candidate.name for candidate in route.candidates if candidate.name}}
    return {
        "id": route.request_id,
        "model": route.model,
        "kind": route.kind,
        "digest": route.digest,
        "policy": route.policy,
        "state": route.state,
        "peer_id": route.peer_id,
        "peer_name": name_of(route.peer_id, names),
        "line": route.line,
        "started_at": rfc3339(route.started_at_s),
        "first_token_ms": _ms(route.first_token_s),
        "total_ms": _ms(route.total_s),
        "prompt_tokens": route.prompt_tokens,
        "output_tokens": route.output_tokens,
        "error": route.error,
        "message": route.message,
        "candidates": [_candidate_json(candidate) for candidate in route.candidates],
        "attempts": [_attempt_json(attempt, name_of(attempt.peer_id, names)) for attempt in route.attempts],
        "waits": [{"at_ms": _ms(wait.at_s), "took_ms": _ms(wait.took_s), "why": wait.why} for wait in route.waits],
        "story": list(story(route, names)),
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "peer_id": candidate.peer_id,
        "name": candidate.name,
        "device": candidate.device,
        "loaded": candidate.loaded,
        "queue": candidate.queue,
        "rtt_ms": _ms(candidate.rtt_s),
        "estimate_ms": _ms(candidate.estimate_s),
        "figures": _figures_json(candidate.figures),
        "told_wait_ms": _ms(candidate.told_wait_s),
        "verdict": candidate.verdict,
        "why": candidate.why,
    }


def _figures_json(figures: Figures) -> dict[str, Any]:
    return {
        "rtt_ms": _ms(figures.rtt_s),
        "queue_ms": _ms(figures.queue_s),
        "load_ms": _ms(figures.load_s),
        "prompt_ms": _ms(figures.prompt_s),
        "output_ms": _ms(figures.output_s),
    }


def _attempt_json(attempt: Attempt, name: str) -> dict[str, Any]:
    return {
        "peer_id": attempt.peer_id,
        "name": name,
        "kind": attempt.kind,
        "at_ms": _ms(attempt.at_s),
        "first_token_ms": _ms(attempt.first_token_s),
        "load_ms": _ms(attempt.load_s),
        "ended_ms": _ms(attempt.ended_s),
        "tokens": attempt.tokens,
        "error": attempt.error,
        "message": attempt.message,
    }


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s * 1000, 3)
