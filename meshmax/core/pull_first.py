"""Which peer fetches a model that nobody who could answer has: where it would run best, and why others would not do.

Rules. Only where no peer with an engine has the model whole and takes prompts, and at least one has files of it to give.
A peer can hold it that has an engine and memory enough in all. A GPU with room for it goes before a GPU, that before a CPU;
at a tie ourselves, then who has some of it already, then who has the least to do, then the nearest. Whether there is room on a
disk shows by trying, so the order has several. Pure. Not here: fetching (services.pull_first).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.route import Candidate, Verdict
from meshmax.base.status import NO_ENGINE, ModelPresence, PeerStatus, PeerView
from meshmax.base.units import format_bytes

MAX_TRIES: Final = 3  # peers asked to fetch a model for one request; each may refuse
HEADROOM: Final = 1.1  # of memory beside the weights: context and buffers of a short conversation
NAMED: Final = 4  # peers named in one sentence

# From the best to the worst place.
_GPU_FITS, _GPU, _CPU = 0, 1, 2
_TIER_WORDS: Final = ("on its GPU", "beside its GPU, which it does not fit", "in its memory")
_Key = tuple[int, bool, bool, int, float, PeerId]


class Taker(msgspec.Struct, frozen=True):
    """A peer that can hold the model. ``told``: as `meshmax why` shows it."""

    peer_id: PeerId
    name: str
    ours: bool
    told: Candidate


class PullPlan(msgspec.Struct, frozen=True):
    """``takers``: whom to ask, best first. ``holders``: who has it and does not answer. ``given``: one of them has files of it.

    ``able``: somebody could answer as it is. ``unfit``: why we ourselves would not answer whatever we hold, '' where we would;
    ``drained_here``: because we are being drained. ``engines``: somebody has one.
    """

    takers: tuple[Taker, ...] = ()
    holders: tuple[Candidate, ...] = ()
    given: bool = False
    able: bool = False
    unfit: str = ""
    engines: bool = True
    drained_here: bool = False

    @property
    def drained(self) -> bool:
        """Whether the model is there, but for peers that are being drained."""
        return any(holder.verdict == "draining" for holder in self.holders)


def plan_pull(views: Iterable[PeerView], digest: Sha256, size: int) -> PullPlan:
    """Who could fetch the model ``digest`` of ``size`` bytes; ``views``: ourselves and everybody we know."""
    takers: list[tuple[_Key, Taker]] = []
    holders: list[Candidate] = []
    able = given = False
    unfit, drained_here = "", False
    engines = False
    for view in views:
        status = view.status
        if status is None or view.state == "offline":
            continue
        if view.state == "self":
            kept, unfit = _kept_from(view, status, None)
            drained_here = kept == "draining"
        engines = engines or status.engine not in ("", NO_ENGINE)
        model = next((model for model in status.models if model.digest == digest), None)
        if model is not None:
            verdict, why = _kept_from(view, status, model)
            able = able or not why
            given = given or not model.served  # what an engine brings along has no files that could be fetched
            holders.append(_told(view, status, verdict, why, model))
        if (model is None or model.state == "partial") and not _kept_from(view, status, None)[1]:
            tier = _tier(status, size)
            if tier is not None:
                takers.append((_key(tier, view, status, model), _taker(view, status, tier, model)))
    takers.sort(key=lambda each: each[0])
    return PullPlan(tuple(taker for _, taker in takers), tuple(holders), given, able, unfit, engines, drained_here)


def _key(tier: int, view: PeerView, status: PeerStatus, model: ModelPresence | None) -> _Key:
    """By which takers are put in order, the best first."""
    ahead = status.load.running + status.load.queued
    return tier, view.state != "self", model is None, ahead, view.rtt_s or 0.0, view.peer_id


def _taker(view: PeerView, status: PeerStatus, tier: int, model: ModelPresence | None) -> Taker:
    why = f"can hold it {_TIER_WORDS[tier]}" + (", has some of it already" if model else "")
    return Taker(view.peer_id, name_of(view), view.state == "self", _told(view, status, "slower", why, model))


def _told(view: PeerView, status: PeerStatus, verdict: Verdict, why: str, model: ModelPresence | None) -> Candidate:
    return Candidate(
        peer_id=view.peer_id,
        name=status.name,
        device="gpu" if status.gpus else "cpu",
        loaded=model is not None and model.state == "loaded",
        rtt_s=view.rtt_s or 0.0,
        queue=status.load.running + status.load.queued,
        estimate_s=0.0,
        verdict=verdict,
        why=why,
    )


def name_of(view: PeerView) -> str:
    """A peer as people call it."""
    return view.status.name if view.status and view.status.name else view.peer_id


def _kept_from(view: PeerView, status: PeerStatus, model: ModelPresence | None) -> tuple[Verdict, str]:
    """Why a peer would not answer a prompt with its copy; '' where it would."""
    if ((model.engine if model else "") or status.engine) in ("", NO_ENGINE):
        return "excluded", "only stores models (it has no engine)"
    if view.state == "draining" or status.draining:
        return "draining", "is being drained"
    if model is not None and model.state == "partial":
        return "excluded", "has only a part of it"
    return "slower", ""


def _tier(status: PeerStatus, size: int) -> int | None:
    """How good a place it is; None where the model does not fit its memory."""
    needed = size * HEADROOM
    if status.gpus:
        total = sum(gpu.memory_total_bytes for gpu in status.gpus)
        if total >= needed:
            return _GPU_FITS
        if status.memory_total_bytes == 0 or total + status.memory_total_bytes >= needed:
            return _GPU
        return None
    return _CPU if status.memory_total_bytes == 0 or status.memory_total_bytes >= needed else None


def not_here(plan: PullPlan, name: str, size: int) -> str:
    """A sentence for a prompt that was for this peer alone, which does not answer it: why, and what to do."""
    why = plan.unfit or f"has no copy of '{name}'"
    sentence = f"the prompt was for this peer alone (policy local-only), which {why}"
    others = ", ".join(holder.name or holder.peer_id for holder in plan.holders[:NAMED] if not holder.why)
    elsewhere = f"; by another policy {others} could answer" if others else ""
    if plan.unfit:
        return sentence + (": `meshmax undrain` ends that" if plan.drained_here else "") + elsewhere
    if not plan.given:
        return sentence + elsewhere
    if not any(taker.ours for taker in plan.takers):
        return f"{sentence}, nor room in memory for its {format_bytes(size)}{elsewhere}"
    return f"{sentence}: `meshmax pull {name}` brings it here{elsewhere}"


def who_could(plan: PullPlan, name: str, size: int) -> str:
    """The end of a sentence that says no peer answers with the model: why, who could hold it, and what to type."""
    told = [f"{holder.name or holder.peer_id} {holder.why}" for holder in plan.holders[:NAMED] if holder.why]
    why = f" ({'; '.join(told)})" if told else ""
    if not plan.engines:
        return f"{why}, and no peer that is here now runs models: start one with an engine (engine.kind)"
    if not plan.takers:
        return f"{why}, and no peer with an engine has room in memory for its {format_bytes(size)}"
    names = [taker.name for taker in plan.takers[:NAMED]]
    here = plan.takers[0].ours
    verb = f"`meshmax pull {name}`" if here else f"`meshmax distribute {name} --to {names[0]}`"
    return f"{why}; {', '.join(names)} could hold it: {verb} brings it to {'this peer' if here else names[0]}"
