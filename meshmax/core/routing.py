"""Which peer will answer a prompt soonest: ranks the peers that have the model, and says why in one line.

The estimate is the time until the whole answer is there: round trip + queue + load + prompt tokens / prefill rate +
expected tokens / decode rate, on the device that the peer's engine really uses. Rules: our own measurements decide;
what a peer says of itself counts until we have measured it, and within bounds; a default stands in where nobody knows.
The best estimate sets a margin; among those inside it a model loaded on a GPU goes before one on disk beside a GPU,
that before a CPU. Beyond the margin the estimate decides alone. The previous choice gets a discount, so that two like
peers do not take turns. A draining, partial or offline peer is never chosen; one that failed lately only when nobody
else is left. Pure: no state, no clock. Not here: measuring (core.measurements), asking (services.router).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import ChatRequest, EmbedRequest, InferRequest
from meshmax.base.route import Candidate, Verdict
from meshmax.base.status import MAX_PEER_NAME, NO_ENGINE, Device, Load, ModelPresence, PeerView
from meshmax.core.measurements import Figures, Setback

TIER_MARGIN: Final = (
    0.5  # a better tier may be estimated this much slower: estimates of a CPU under load are that far off
)
TIER_MARGIN_S: Final = 0.05  # and this much in any case: shares of very short answers mean nothing
STICKY: Final = 0.15  # discount of the previous choice; under it two measurements of one peer differ by chance
DEFAULT_RTT_S: Final = 0.05  # never measured: as a peer in another town, so that a measured neighbour goes first
OUTPUT_TOKENS: Final = (
    256  # of a usual chat answer, until answers of the model were seen; at most what the request allows
)
BYTES_PER_TOKEN: Final = 4  # of English text, in the usual vocabularies
IMAGE_TOKENS: Final = 600  # of one picture in the usual vision models
ADVERTISED_AGAINST: Final = 4.0  # a peer's claims about itself may beat our defaults by this factor, until measured

# Where nobody knows: decoding reads every weight once a token, so it goes at the memory's rate. Loading reads the file once.
MEMORY_BYTES_PER_S: Final[dict[Device, float]] = {"gpu": 300e9, "cpu": 20e9}  # a mid-range card; two channels of DDR4
PREFILL_PER_DECODE: Final[dict[Device, float]] = {
    "gpu": 20.0,
    "cpu": 4.0,
}  # a batch of tokens per reading of the weights
LOAD_BYTES_PER_S: Final = 500e6  # a SATA SSD
START_S: Final[dict[Device, float]] = {"gpu": 2.0, "cpu": 1.0}  # the engine's process, before it reads the file
MIN_RATE_PER_S: Final = 0.01  # tokens; slower is as bad, and estimates stay finite whatever a peer says
MAX_LOAD_S: Final = 3600.0  # the same
MAX_AHEAD: Final = 100_000  # requests; the same
MAX_DECODE_PER_S: Final = 500.0  # small models are bound by other things than memory
MIN_MODEL_BYTES: Final = 10_000_000  # smaller sizes are test files or lies; keeps the rates finite
SHARE: Final[dict[Device, float]] = {
    "gpu": 0.1,
    "cpu": 0.5,
}  # how much each answer beside ours slows it: GPUs batch well


class Contender(msgspec.Struct, frozen=True):
    """A peer, its copy of the model, and all that is needed to judge it. ``load`` is as of now: `Outstanding.load`."""

    view: PeerView
    model: ModelPresence
    load: Load
    figures: Figures = Figures()
    rtt_s: float | None = None
    setback: Setback | None = None


class Work(msgspec.Struct, frozen=True):
    """What is asked: tokens of the prompt and of the answer, both expected."""

    prompt_tokens: int = 0
    output_tokens: int = 0


class Decision(msgspec.Struct, frozen=True):
    """``candidates``: best first, those that are kept out last. ``order``: whom to try, one after the other."""

    candidates: tuple[Candidate, ...]
    order: tuple[PeerId, ...]


class _Judged(msgspec.Struct, frozen=True):
    contender: Contender
    estimate_s: float
    effective_s: float
    out: Verdict | None
    why: str


def expected_work(request: InferRequest, usual_tokens: float | None = None) -> Work:
    """How much work ``request`` is, by its size, the limit it sets, and how long the model's answers usually are."""
    if isinstance(request, EmbedRequest):
        return Work(sum(map(len, request.inputs)) // BYTES_PER_TOKEN, 0)
    if isinstance(request, ChatRequest):
        size = sum(len(message.content) + len(message.thinking) for message in request.messages)
        images = sum(len(message.images) for message in request.messages)
        empty = not request.messages
    else:
        size = len(request.prompt) + len(request.suffix) + len(request.system or "")
        size += BYTES_PER_TOKEN * len(request.context)
        images = len(request.images)
        empty = not (request.prompt or request.suffix or request.images)
    limit = request.options.num_predict
    usual = OUTPUT_TOKENS if usual_tokens is None else max(1, math.ceil(usual_tokens))
    output = 0 if empty else usual if limit is None or limit < 0 else min(limit, usual)
    return Work(0 if empty else size // BYTES_PER_TOKEN + IMAGE_TOKENS * images, output)


def decide(contenders: Iterable[Contender], work: Work, previous: PeerId | None = None) -> Decision:
    """Rank ``contenders`` (one a peer, whatever their order). Empty ``order``: nobody can answer."""
    judged = sorted((_judge(c, work, previous) for c in contenders), key=lambda j: j.contender.view.peer_id)
    usable = _rank([j for j in judged if j.out is None])
    # Kept out for a failure: better than nobody, those first whose time is up soonest.
    resting = [j for j in judged if j.contender.setback is not None and j.out in ("failed", "busy")]
    resting.sort(key=lambda j: j.contender.setback.until_s if j.contender.setback else 0.0)
    never = [j for j in judged if j.out is not None and j not in resting]
    order = [*usable, *resting]
    candidates = [_candidate(j, "chosen" if j is order[0] else j.out or "slower") for j in order]
    candidates += [_candidate(j, j.out or "excluded") for j in never]
    return Decision(tuple(candidates), tuple(j.contender.view.peer_id for j in order))


def explain(
    candidates: Iterable[Candidate], chosen: PeerId, failed: Iterable[tuple[str, str]] = (), tokens: int = 0
) -> str:
    """One line of ASCII: who answers, why, and whom it beat, by which rule where that was estimated to be sooner.

    ``failed``: (name, error code) of those tried before. ``tokens``: how long an answer the estimates are for.
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
        count = f"{len(others)} other{'s' if len(others) > 1 else ''}"
        rule = f": {_rule(best, shown)}" if shown.estimate_s < best.estimate_s else ""
        beat = f"; beat {count} (next: {plain_name(shown.name)}, est {_seconds(shown.estimate_s)}{rule})"
    elif not tried:
        beat = "; nobody else has it ready"
    size = f" for {tokens} tokens" if tokens else ""
    return f"{plain_name(best.name)}: {best.why}, est {_seconds(best.estimate_s)}{size}{beat}{tried}"


def _rule(best: Candidate, sooner: Candidate) -> str:
    """By which rule ``best`` goes before one whose estimate is smaller."""
    if _rank_of(best.device, best.loaded) < _rank_of(sooner.device, sooner.loaded):
        better = "a GPU" if best.device != sooner.device else "a loaded model"
        return f"near enough for {better} to go first"
    return f"not {STICKY:.0%} sooner than the last choice"


def plain_name(name: str) -> str:
    """A peer's name as a header can carry it: printable ASCII without separators of the line, at most MAX_PEER_NAME."""
    kept = "".join(c if c.isascii() and c.isprintable() and c not in ",;" else "?" for c in name[:MAX_PEER_NAME])
    return kept.strip() or "unnamed"


def _judge(contender: Contender, work: Work, previous: PeerId | None) -> _Judged:
    estimate_s = estimate(contender, work)
    effective_s = estimate_s * (1 - STICKY) if contender.view.peer_id == previous else estimate_s
    out, reason = _kept_out(contender)
    return _Judged(contender, estimate_s, effective_s, out, reason or _describe(contender))


def _kept_out(contender: Contender) -> tuple[Verdict | None, str]:
    view, setback = contender.view, contender.setback
    if view.state == "offline" or view.status is None:
        return "excluded", "not connected"
    if view.state == "draining" or view.status.draining:
        return "draining", "draining"
    if contender.model.state == "partial":
        return "excluded", "has only a part of it"
    if setback is not None:
        return ("busy", "said it is busy") if setback.code == "busy" else ("failed", f"failed lately ({setback.code})")
    return None, ""


def _rank(usable: list[_Judged]) -> list[_Judged]:
    if not usable:
        return []
    best_s = min(j.effective_s for j in usable)
    limit_s = max(best_s * (1 + TIER_MARGIN), best_s + TIER_MARGIN_S)

    def key(judged: _Judged) -> tuple[bool, int, float, bool, PeerId]:
        close = judged.effective_s <= limit_s
        view = judged.contender.view
        model = judged.contender.model
        tier = _rank_of(model.device, model.state == "loaded") if close else 0
        return (not close, tier, judged.effective_s, view.state != "self", view.peer_id)

    return sorted(usable, key=key)


def _rank_of(device: Device, loaded: bool) -> int:
    if device == "cpu":
        return 2
    return 0 if loaded else 1


def estimate(contender: Contender, work: Work) -> float:
    """Seconds until the whole answer is there."""
    model, figures, device = contender.model, contender.figures, contender.model.device
    size = max(model.size, MIN_MODEL_BYTES)
    usual = min(MEMORY_BYTES_PER_S[device] / size, MAX_DECODE_PER_S)
    decode = _rate(figures.decode_per_s, model.decode_per_s, usual)
    prefill = _rate(figures.prefill_per_s, model.prefill_per_s, usual * PREFILL_PER_DECODE[device])
    prompt_s = max(work.prompt_tokens / prefill, figures.first_token_s or 0.0)
    beside = min(_ahead(contender.load), max(contender.load.capacity, 1) - 1)
    answer_s = prompt_s + work.output_tokens / decode * (1 + SHARE[device] * beside)
    return _rtt_s(contender) + _queue_s(contender.load, answer_s) + _load_s(contender, size) + answer_s


def _rate(measured: float | None, advertised: float, usual: float) -> float:
    if measured:
        return max(measured, MIN_RATE_PER_S)
    if advertised > 0 and math.isfinite(advertised):
        return max(min(advertised, usual * ADVERTISED_AGAINST), MIN_RATE_PER_S)
    return usual


def _load_s(contender: Contender, size: int) -> float:
    model = contender.model
    if model.state == "loaded":
        return 0.0
    if contender.figures.load_s is not None:
        return min(contender.figures.load_s, MAX_LOAD_S)
    usual_s = START_S[model.device] + size / LOAD_BYTES_PER_S
    if model.load_s > 0 and math.isfinite(model.load_s):
        return max(min(model.load_s, MAX_LOAD_S), usual_s / ADVERTISED_AGAINST)
    return usual_s


def _queue_s(load: Load, answer_s: float) -> float:
    """Until a slot is free, if every answer takes as long as ours."""
    capacity = max(load.capacity, 1)
    return max(0, _ahead(load) - capacity + 1) * answer_s / capacity


def _ahead(load: Load) -> int:
    return min(max(load.running, 0) + max(load.queued, 0), MAX_AHEAD)


def _rtt_s(contender: Contender) -> float:
    if contender.view.state == "self":
        return 0.0
    return DEFAULT_RTT_S if contender.rtt_s is None else contender.rtt_s


def _describe(contender: Contender) -> str:
    model, view = contender.model, contender.view
    where = "GPU" if model.device == "gpu" else "CPU"
    state = f"loaded on {where}" if model.state == "loaded" else f"on disk beside a {where}"
    away = "here" if view.state == "self" else f"{_rtt_s(contender) * 1000:.1f} ms away ({view.path})"
    waiting = max(0, _ahead(contender.load) - max(contender.load.capacity, 1) + 1)
    return f"{state}, {away}, {waiting} queued"


def _candidate(judged: _Judged, verdict: Verdict) -> Candidate:
    contender = judged.contender
    view = contender.view
    why = judged.why if judged.out is None else f"{judged.why}; {_describe(contender)}"
    return Candidate(
        peer_id=view.peer_id,
        name=view.status.name if view.status else "",
        device=contender.model.device,
        loaded=contender.model.state == "loaded",
        rtt_s=_rtt_s(contender),
        queue=_ahead(contender.load),
        estimate_s=judged.estimate_s,
        verdict=verdict,
        why=why,
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 100 else f"{min(value, 1e6):.0f} s"


MAX_ENDED: Final = 1024  # peers whose status still counts a request of ours that has ended; the oldest is forgotten


class Outstanding:
    """Our requests at each peer, against what its newest status can already tell of them.

    A status is seconds old: requests that we sent after it was issued are added to its load, and those that it counted
    but that have ended since are taken off. Bounded by the requests under way and MAX_ENDED.
    """

    __slots__ = ("_ended", "_sent")

    def __init__(self) -> None:
        self._sent: dict[PeerId, list[int]] = {}  # sequence of the peer's status when each request now there was sent
        self._ended: dict[PeerId, tuple[int, int]] = {}  # (sequence, how many it counts that have ended since)

    def on_sent(self, peer: PeerId, sequence: int) -> None:
        """A request goes to ``peer``, whose newest status is ``sequence``."""
        self._sent.setdefault(peer, []).append(sequence)

    def on_ended(self, peer: PeerId, sent_at: int, sequence: int) -> None:
        """A request that was sent when the status was ``sent_at`` has ended; ``sequence`` is the newest now."""
        sent = self._sent.get(peer, [])
        if sent_at in sent:
            sent.remove(sent_at)
        if not sent:
            self._sent.pop(peer, None)
        if sent_at < sequence:
            at, count = self._ended.pop(peer, (sequence, 0))
            self._ended[peer] = (sequence, count + 1 if at == sequence else 1)
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]

    def count(self, peer: PeerId) -> int:
        """Our requests at ``peer`` now."""
        return len(self._sent.get(peer, ()))

    def load(self, peer: PeerId, sequence: int, stated: Load) -> Load:
        """The load of ``peer`` as of now, from the one ``stated`` in its status ``sequence``."""
        unseen = sum(at >= sequence for at in self._sent.get(peer, ()))
        at, ended = self._ended.get(peer, (sequence, 0))
        gone = ended if at == sequence else 0
        total = max(0, stated.running + stated.queued - gone) + unseen
        running = min(total, max(stated.capacity, 1))
        return Load(running, total - running, stated.capacity)


def holders(views: Iterable[PeerView], digest: Sha256) -> list[tuple[PeerView, ModelPresence]]:
    """Who says it has something of the model, and an engine to run it: each peer with its own word about it."""
    found = []
    for view in views:
        if view.status and view.status.engine == NO_ENGINE:
            continue
        model = next((m for m in view.status.models if m.digest == digest), None) if view.status else None
        if model is not None:
            found.append((view, model))
    return found
