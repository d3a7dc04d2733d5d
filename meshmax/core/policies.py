"""In which order those who may be asked are asked, by policy.

  latency       the smallest estimate; it sets a margin, and among those inside it a model loaded on a GPU goes before one on
                disk beside a GPU, that before one loaded on a CPU, that before one on disk beside a CPU. The previous choice
                gets a discount, so that two like peers do not take turns
  least-loaded  the fewest prompts for its slots; of those the smallest estimate
  round-robin   one after the other, whatever they are like
  weighted      by shares that people gave, evenly spread; who was given none has 1, and 0 gets nothing
  affinity      who holds most of the conversation; a new one goes to a peer drawn by its beginning (rendezvous hashing),
                so that all who begin alike share what is held
  local-only    ourselves or nobody

At a tie we answer ourselves. Pure; ``turn`` is counted by the caller. Not here: who may not be asked (core.eligibility).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Final

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.route import Figures as Estimate
from meshmax.base.route import Policy
from meshmax.base.status import Device
from meshmax.core.contender import Contender
from meshmax.core.estimate import ahead_of

TIER_MARGIN: Final = (
    0.05  # a better tier may be estimated this much slower; scripts/bench_routing shows what more would cost
)
TIER_MARGIN_S: Final = 0.02  # and this much in any case: shares of very short answers mean nothing
STICKY: Final = 0.06  # discount of the previous choice: means of measurements of one peer differ by less, by chance
TURNS: Final[tuple[Policy, ...]] = ("round-robin", "weighted")  # who is asked need not be the soonest
GOLDEN: Final = 0.6180339887498949  # steps of it (modulo 1) fill the unit interval more evenly than any other
_KEY: Final = itemgetter(0, 1, 2)
_EFFECTIVE_S: Final = itemgetter(0)
NO_WEIGHTS: Final[Mapping[str, float]] = {}


class Judged(msgspec.Struct, frozen=True):
    """A contender with its estimate. ``device``: where it would run."""

    contender: Contender
    device: Device
    figures: Estimate
    estimate_s: float

    @property
    def peer_id(self) -> PeerId:
        """Of the contender."""
        return self.contender.view.peer_id


class Choice(msgspec.Struct, frozen=True):
    """What a policy goes by, beside the contenders. ``turn``: how many requests came before. ``key``: the conversation's
    beginning, any bytes. ``weights``: shares by peers' names."""

    previous: PeerId | None = None
    turn: int = 0
    key: bytes = b""
    weights: Mapping[str, float] = NO_WEIGHTS


def refused_by(policy: Policy, contender: Contender, choice: Choice) -> str:
    """Why ``policy`` has no use for ``contender``; '' if it has."""
    if policy == "local-only" and contender.view.state != "self":
        return "only this machine was asked for"
    if policy == "weighted" and _weight(contender, choice.weights) <= 0:
        return "has a weight of 0"
    return ""


def in_order(policy: Policy, judged: list[Judged], choice: Choice) -> list[Judged]:
    """``judged``, the one to ask first first. Their order does not matter, but for those who are alike in everything."""
    return _ORDERS[policy](judged, choice) if judged else []


def tier_of(device: Device, loaded: bool) -> int:
    """0 is best: loaded on a GPU, on disk beside one, loaded on a CPU, on disk beside one."""
    return (0 if device == "gpu" else 2) + (0 if loaded else 1)


def _by_latency(judged: list[Judged], choice: Choice) -> list[Judged]:
    previous = choice.previous
    keyed = []
    for one in judged:
        view = one.contender.view
        effective_s = one.estimate_s * (1 - STICKY) if view.peer_id == previous else one.estimate_s
        keyed.append((effective_s, view.state != "self", view.peer_id, one))
    keyed.sort(key=_KEY)
    best_s = keyed[0][0]
    limit_s = max(best_s * (1 + TIER_MARGIN), best_s + TIER_MARGIN_S)
    close = bisect_right(keyed, limit_s, key=_EFFECTIVE_S)
    first = sorted(keyed[:close], key=lambda k: tier_of(k[3].device, k[3].contender.is_ready))
    return [k[3] for k in (*first, *keyed[close:])]


def _soonest(one: Judged) -> tuple[float, bool, PeerId]:
    view = one.contender.view
    return one.estimate_s, view.state != "self", view.peer_id


def _by_load(judged: list[Judged], _choice: Choice) -> list[Judged]:
    def key(one: Judged) -> tuple[float, tuple[float, bool, PeerId]]:
        load = one.contender.load
        return ahead_of(load) / max(load.capacity, 1), _soonest(one)

    return sorted(judged, key=key)


def _by_turn(judged: list[Judged], choice: Choice) -> list[Judged]:
    ordered = sorted(judged, key=lambda one: one.peer_id)
    first = choice.turn % len(ordered)
    return ordered[first:] + ordered[:first]


def _by_weight(judged: list[Judged], choice: Choice) -> list[Judged]:
    ordered = sorted(judged, key=lambda one: one.peer_id)
    shares = [_weight(one.contender, choice.weights) for one in ordered]
    left = sum(shares) * (choice.turn * GOLDEN % 1.0)
    chosen = len(ordered) - 1
    for index, share in enumerate(shares):
        left -= share
        if left < 0:
            chosen = index
            break
    first = ordered.pop(chosen)
    return [first, *sorted(ordered, key=_soonest)]


def _by_prefix(judged: list[Judged], choice: Choice) -> list[Judged]:
    def key(one: Judged) -> tuple[int, bytes]:
        held = one.contender.prefix_tokens if one.contender.is_ready else 0
        return -held, hashlib.blake2b(one.peer_id.encode(), key=choice.key[:64], digest_size=8).digest()

    return sorted(judged, key=key)


def _by_itself(judged: list[Judged], _choice: Choice) -> list[Judged]:
    return sorted(judged, key=_soonest)


def _weight(contender: Contender, weights: Mapping[str, float]) -> float:
    status = contender.view.status
    return weights.get(status.name, 1.0) if status else 1.0


_ORDERS: Final[Mapping[Policy, Callable[[list[Judged], Choice], list[Judged]]]] = {
    "latency": _by_latency,
    "least-loaded": _by_load,
    "round-robin": _by_turn,
    "weighted": _by_weight,
    "affinity": _by_prefix,
    "local-only": _by_itself,
}
