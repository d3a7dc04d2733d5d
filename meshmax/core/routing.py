"""Which peer is asked for a prompt: puts those that have the model in order, and says why.

Rules: who may not be asked at all is left out (core.eligibility, and what the policy has no use for); the others get an
estimate each (core.estimate, on the device of core.memory_fit) and an order (core.policies). Pure: no state, no clock, and
the order in which contenders are given does not matter. Not here: measuring (core.measurements), what is under way
(core.outstanding), who holds which conversation (core.prefixes), asking (services.router).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Final

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.route import Candidate, Policy, Verdict
from meshmax.core.contender import Contender, holders
from meshmax.core.eligibility import is_resting, kept_out
from meshmax.core.estimate import Work, estimate, expected_work, known_rates, total_s
from meshmax.core.explain import candidate_of, explain, plain_name
from meshmax.core.memory_fit import device_of
from meshmax.core.outstanding import Outstanding
from meshmax.core.policies import NO_WEIGHTS, Choice, Judged, in_order, refused_by

__all__ = [
    "CANDIDATES_TOLD",
    "Contender",
    "Decision",
    "Outstanding",
    "Work",
    "decide",
    "expected_work",
    "explain",
    "holders",
    "plain_name",
]

CANDIDATES_TOLD: Final = 32  # of one decision, the first ones: more than anybody reads


class Decision(msgspec.Struct, frozen=True, dict=True):
    """``order``: whom to ask, one after the other; empty if nobody can answer now. ``resting``: those who may be asked again
    when their time is up, the first of them first; ``rested_s`` is when that is (by the clock of core.breaker)."""

    order: tuple[PeerId, ...]
    resting: tuple[PeerId, ...] = ()
    rested_s: float | None = None
    policy: Policy = "latency"
    ranked: tuple[Judged, ...] = ()
    out: tuple[tuple[Judged, Verdict, str], ...] = ()

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The first CANDIDATES_TOLD, best first, those that are kept out last."""
        told = [candidate_of(j, "slower" if n else "chosen") for n, j in enumerate(self.ranked[:CANDIDATES_TOLD])]
        told += [candidate_of(*out) for out in self.out[: CANDIDATES_TOLD - len(told)]]
        return tuple(told)


def decide(
    contenders: Iterable[Contender],
    work: Work,
    previous: PeerId | None = None,
    *,
    policy: Policy = "latency",
    weights: Mapping[str, float] = NO_WEIGHTS,
    turn: int = 0,
    key: bytes = b"",
) -> Decision:
    """Put ``contenders`` (one a peer) in order.

    ``previous``: who got the last request for this model (or of this conversation). ``weights``: shares by peers' names, for
    "weighted". ``turn``: how many requests for this model came before, for "round-robin" and "weighted". ``key``: stands for
    the beginning of the conversation, for "affinity".
    """
    choice = Choice(previous, turn, key, weights)
    picky = policy in ("local-only", "weighted")
    usable: list[Judged] = []
    out: list[tuple[Judged, Verdict, str]] = []
    placed = [(contender, device_of(contender.model, contender.view.status)) for contender in contenders]
    known = known_rates(placed)
    for contender, device in placed:
        figures = estimate(contender, work, device, known)
        judged = Judged(contender, device, figures, total_s(figures))
        kept = kept_out(contender)
        if kept is not None:
            out.append((judged, *kept))
        elif picky and (words := refused_by(policy, contender, choice)):
            out.append((judged, "excluded", words))
        else:
            usable.append(judged)
    ranked = in_order(policy, usable, choice)
    out.sort(key=lambda one: (not is_resting(one[1]), _until_s(one[0]), one[0].peer_id))
    resting = [judged for judged, verdict, _ in out if is_resting(verdict) and not _refused(policy, judged, choice)]
    return Decision(
        tuple(judged.peer_id for judged in ranked),
        tuple(judged.peer_id for judged in resting),
        _until_s(resting[0]) if resting else None,
        policy,
        tuple(ranked),
        tuple(out),
    )


def _refused(policy: Policy, judged: Judged, choice: Choice) -> bool:
    return bool(refused_by(policy, judged.contender, choice))


def _until_s(judged: Judged) -> float:
    return judged.contender.standing.until_s
