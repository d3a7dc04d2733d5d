"""How long a peer would take for a prompt: round trip + queue + load + reading the prompt + writing the answer, in seconds.

Rules: our own measurements decide; what a peer says of itself counts until we have measured it, and within bounds. Where
nobody knows a default stands in, but no more than the fastest of the same kind of device is known to do with the model: else
whoever was never tried would seem faster than all that were measured; not where that is slower than people read, since one
slow peer alone would keep all prompts. Before that default stands what we saw the device do with other models, or
devices of its kind, by the models' sizes. A figure that was measured long ago fades into what the
peer says, its weight halved every FADE_S: who was slow an hour ago gets another chance. Who waits is expected to wait as long as
the peer tells (core.told_wait), or, where it does not, as we did there lately, if not longer. Tokens of the prompt that the peer
holds from before need not be read again. A model that is loaded with too little context for the prompt is loaded anew, when what
runs has ended. What an answer costs beside others grows with how many those are. Pure: no state, no clock. Not here: measuring
(core.measurements), what follows (core.policies).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from meshmax.base.inference import ChatRequest, EmbedRequest, InferRequest
from meshmax.base.route import Figures as Estimate
from meshmax.base.status import Device, Load
from meshmax.core.contender import Contender, ToldWait
from meshmax.core.measurements import SHARE

DEFAULT_RTT_S: Final = 0.05  # never measured: as a peer in another town, so that a measured neighbour goes first
OUTPUT_TOKENS: Final = (
    256  # of a usual chat answer, until answers of the model were seen; at most what the request allows
)
BYTES_PER_TOKEN: Final = 4  # of English text, in the usual vocabularies
IMAGE_TOKENS: Final = 600  # of one picture in the usual vision models
ADVERTISED_AGAINST: Final = 4.0  # a peer's claims about itself may beat our defaults by this factor, until measured
READING_PER_S: Final = 5.0  # tokens, about what people read: who is slower says nothing of those that were never tried
UNTRIED: Final = 1.1  # times the fastest that is known: one that was never tried is, where that costs no load

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
FADE_S: Final = 900.0  # seconds; machines get and lose other work within minutes
WARY: Final = (
    1.3  # factor of a wait: answers that take long are those that are met; scripts/bench_routing shows the gain
)
WARY_OF_WORD: Final = 1.5  # the same of a wait that the peer told; who waits also keeps others waiting after him
WARY_S: Final = 0.3  # and in any case, where none of its slots is free: its word is a moment old
BOAST_S: Final = 1.0  # a wait of less where a slot was told to be free is somebody who came at the same moment
LONG_PROMPT: Final = 500  # tokens; those ahead of us are not expected to have longer ones, whatever ours is


class Work(msgspec.Struct, frozen=True):
    """What is asked: tokens of the prompt and of the answer, both expected."""

    prompt_tokens: int = 0
    output_tokens: int = 0


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


def wanted_context(request: InferRequest) -> int:
    """Tokens of context that ``request`` wants by its own word, or else by its size; 0: any will do."""
    named = request.options.num_ctx
    if named is not None and named > 0:
        return named
    return 0 if isinstance(request, EmbedRequest) else expected_work(request).prompt_tokens


class Known(msgspec.Struct, frozen=True):
    """The highest rates that are known of a model on one kind of device, tokens a second; infinite where none is."""

    decode_per_s: float = math.inf
    prefill_per_s: float = math.inf


NOTHING_KNOWN: Final[Mapping[Device, Known]] = {}
_NOTHING: Final = Known()


def known_rates(contenders: Iterable[tuple[Contender, Device]]) -> Mapping[Device, Known]:
    """What the contenders for one prompt, each with where it would run, show of each device: by our measurements, or else by
    their word."""
    decode: dict[Device, float] = {}
    prefill: dict[Device, float] = {}
    for contender, device in contenders:
        model, figures = contender.model, contender.figures
        if (rate := figures.decode_per_s or model.decode_per_s) > decode.get(device, 0.0):
            decode[device] = rate
        if (rate := figures.prefill_per_s or model.prefill_per_s) > prefill.get(device, 0.0):
            prefill[device] = rate
    return {d: Known(decode.get(d, math.inf), prefill.get(d, math.inf)) for d in {*decode, *prefill}}


def estimate(
    contender: Contender, work: Work, device: Device, known: Mapping[Device, Known] = NOTHING_KNOWN
) -> Estimate:
    """Seconds until the whole answer is there, by their parts. ``device``: where it would run (core.memory_fit).

    ``known``: what all contenders show of each device.
    """
    model, figures, load = contender.model, contender.figures, contender.load
    size = max(model.size, MIN_MODEL_BYTES)
    usual = min(MEMORY_BYTES_PER_S[device] / size, MAX_DECODE_PER_S)
    trust = 0.5 ** (figures.age_s / FADE_S)
    others, ratio = known.get(device, _NOTHING), PREFILL_PER_DECODE[device]
    pace = figures.pace
    likely = usual if pace.decode is None else min(pace.decode / size, MAX_DECODE_PER_S)
    decode = _rate(figures.decode_per_s, trust, model.decode_per_s, usual, likely, others.decode_per_s, READING_PER_S)
    likely = likely * ratio if pace.prefill is None else pace.prefill / size
    best, least = others.prefill_per_s, READING_PER_S * ratio
    prefill = _rate(figures.prefill_per_s, trust, model.prefill_per_s, usual * ratio, likely, best, least)
    unread = work.prompt_tokens
    ready = contender.is_ready
    if contender.prefix_tokens and ready:
        unread = max(0, unread - contender.prefix_tokens)
    fixed_s = trust * (figures.first_token_s or 0.0)
    ahead, capacity = ahead_of(load), load.capacity if load.capacity > 1 else 1
    places = ahead - capacity + 1
    if places > 0:
        beside = capacity - 1
    else:
        beside, places = ahead, 0
    output_s = work.output_tokens / decode * (1 + SHARE[device] * beside)
    turn_s = fixed_s + min(unread, LONG_PROMPT) / prefill + output_s  # if all take as long as ours
    if figures.turn_s is not None and figures.turn_s > turn_s:
        turn_s = figures.turn_s  # who looks for the shortest queue finds the most underrated one
    queue_s = _queue_s(contender.told, places, turn_s / capacity)
    if not ready and load.running > 0 and contender.lacks_context:
        queue_s = max(queue_s, turn_s)
    return Estimate(
        rtt_of(contender),
        queue_s,
        0.0 if ready else _load_s(contender, size, device, trust),
        fixed_s + unread / prefill,
        output_s,
    )


def _queue_s(told: ToldWait | None, places: int, place_s: float) -> float:
    """``places`` ahead of us by the counts of its load, of ``place_s`` each; or by the peer's own word."""
    if told is None:
        return WARY * places * place_s
    if told.free:
        boast_s = told.wait_s if told.wait_s >= BOAST_S else 0.0  # it said so before, and we waited
        return WARY * max(0, told.sent - told.free + 1) * place_s + boast_s
    there = told.queued + 1
    if told.sent < 0:
        wait_s = told.wait_s * max(0, there + told.sent) / there
        return WARY_OF_WORD * wait_s + (WARY_S if wait_s else 0.0)
    return WARY_OF_WORD * told.wait_s + WARY_S + WARY * told.sent * place_s


def total_s(figures: Estimate) -> float:
    """What the parts add up to."""
    return figures.rtt_s + figures.queue_s + figures.load_s + figures.prompt_s + figures.output_s


def ahead_of(load: Load) -> int:
    """Requests that run or wait, within bounds, whatever a peer says."""
    ahead = (load.running if load.running > 0 else 0) + (load.queued if load.queued > 0 else 0)
    return ahead if ahead < MAX_AHEAD else MAX_AHEAD


def rtt_of(contender: Contender) -> float:
    """The round trip in seconds; to ourselves none."""
    if contender.view.state == "self":
        return 0.0
    return DEFAULT_RTT_S if contender.rtt_s is None else contender.rtt_s


def _rate(
    measured: float | None, trust: float, advertised: float, usual: float, likely: float, known: float, least: float
) -> float:
    """``likely``: where it tells nothing; but little more than the best that is ``known``, if that is more than ``least``."""
    if advertised > 0 and math.isfinite(advertised):
        seed = max(min(advertised, usual * ADVERTISED_AGAINST), MIN_RATE_PER_S)
    else:
        seed = max(min(likely, UNTRIED * max(known, least)), MIN_RATE_PER_S)
    if not measured:
        return seed
    return 1 / (trust / max(measured, MIN_RATE_PER_S) + (1 - trust) / seed)


def _load_s(contender: Contender, size: int, device: Device, trust: float) -> float:
    model, measured = contender.model, contender.figures.load_s
    seed_s = START_S[device] + size / LOAD_BYTES_PER_S
    if model.load_s > 0 and math.isfinite(model.load_s):
        seed_s = max(min(model.load_s, MAX_LOAD_S), seed_s / ADVERTISED_AGAINST)
    elif pace_per_s := contender.figures.pace.load:
        seed_s = min(max(size / pace_per_s, START_S[device]), MAX_LOAD_S)
    return seed_s if measured is None else trust * min(measured, MAX_LOAD_S) + (1 - trust) * seed_s
