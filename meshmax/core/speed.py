"""How fast a model was in this node's memory: means of what its loads and answers took. Pure.

Not here: what others make of it (core.measurements).
"""

from __future__ import annotations

from typing import Final

import msgspec

from meshmax.base.inference import Finish
from meshmax.base.status import Speed

RATE_WEIGHT: Final = 0.3  # of the newest measurement in an EWMA: a few answers make the figure, one outlier does not
MIN_RATE_TOKENS: Final = 8  # fewer tokens measure overhead, not rate


def speed_after_load(speed: Speed, took_s: float) -> Speed:
    """The EWMA with one more load."""
    return msgspec.structs.replace(speed, load_s=_ewma(speed.load_s, took_s))


def speed_after_answer(speed: Speed, finish: Finish) -> Speed:
    """The EWMA with one more answer; parts of it that are too short to measure do not count."""
    prefill, decode = speed.prefill_per_s, speed.decode_per_s
    read = finish.prompt_tokens - finish.cached_tokens
    if read >= MIN_RATE_TOKENS and finish.prompt_s > 0:
        prefill = _ewma(prefill, read / finish.prompt_s)
    if finish.output_tokens >= MIN_RATE_TOKENS and finish.output_s > 0:
        decode = _ewma(decode, finish.output_tokens / finish.output_s)
    return msgspec.structs.replace(speed, prefill_per_s=prefill, decode_per_s=decode)


def _ewma(old: float, new: float) -> float:
    return new if old == 0 else old + RATE_WEIGHT * (new - old)
