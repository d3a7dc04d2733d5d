"""Ollama's ``options`` object as `base.inference.Options`: known names typed and bounded, unknown ones set aside.

Rules (ollama-api 1.4): an unknown option is ignored and logged by the caller; a wrong type is the error
``option "num_ctx" must be of type integer``; null means not given; a fraction given for an integer is cut, as Go does; an integer
beyond what means anything is brought to the nearest that does, since Ollama takes every one and clients send -1 or 99999
for "as many as there are". Zero is as good as not given where Ollama says so: num_ctx, and num_predict (no limit).
"""

from __future__ import annotations

import math
from typing import Any, Final

from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import MAX_STOP, Options

MAX_STOP_CHARACTERS: Final = 1024  # of one stop word
MAX_OPTIONS: Final = 256  # entries of one object, known or not
NO_LIMIT: Final = -1  # of num_predict
_INT64: Final = 1 << 63
_INT32: Final = (1 << 31) - 1

# Integers with their bounds; what is beyond them is brought to them, but a seed, which takes all of 64 bits.
_INTEGERS: Final[dict[str, tuple[int, int]]] = {
    "num_keep": (-1, _INT32),
    "seed": (-_INT64, _INT64 - 1),
    "num_predict": (-2, _INT32),
    "top_k": (0, _INT32),
    "repeat_last_n": (-1, _INT32),
    "num_ctx": (0, 1 << 22),
    "num_batch": (0, 1 << 20),
    "num_gpu": (-1, 10_000),
    "main_gpu": (-1, 1024),
    "num_thread": (0, 1024),
    "draft_num_predict": (0, _INT32),
}
_FLOATS: Final = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
    }
)
_BOOLEANS: Final = frozenset({"use_mmap"})
# Known to Ollama, checked, and without effect here: the engine decides these by itself.
_WITHOUT_EFFECT: Final = frozenset({"main_gpu", "draft_num_predict", "use_mmap", "num_batch"})


def parse_options(given: dict[str, Any]) -> tuple[Options, list[str]]:
    """(the options, names that were set aside). Raises InvalidRequest."""
    if len(given) > MAX_OPTIONS:
        raise InvalidRequest(f"options: at most {MAX_OPTIONS} entries")
    known: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in given.items():
        if value is None:
            continue
        if name in _INTEGERS:
            known[name] = _integer(name, value)
        elif name in _FLOATS:
            known[name] = _float(name, value)
        elif name in _BOOLEANS:
            if not isinstance(value, bool):
                raise InvalidRequest(f'option "{name}" must be of type boolean')
            known[name] = value
        elif name == "stop":
            known[name] = _stop(value)
        else:
            ignored.append(name[:64])
    if known.get("num_ctx") == 0:  # Ollama's zero: decide for me
        del known["num_ctx"]
    if known.get("num_predict") == 0:
        known["num_predict"] = NO_LIMIT
    ignored += sorted(known.keys() & _WITHOUT_EFFECT)
    return Options(**{name: value for name, value in known.items() if name not in _WITHOUT_EFFECT}), ignored


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f'option "{name}" must be of type integer')
    low, high = _INTEGERS[name]
    number = int(value)
    if name == "seed" and not low <= number <= high:
        raise InvalidRequest(f'option "{name}" must be between {low} and {high}')
    return min(max(number, low), high)


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f'option "{name}" must be of type float32')
    if not -1e6 <= value <= 1e6:
        raise InvalidRequest(f'option "{name}" must be between -1000000 and 1000000')
    return float(value)


def _stop(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InvalidRequest('option "stop" must be of type array')
    if not all(isinstance(word, str) for word in value):
        raise InvalidRequest('option "stop" must be of an array of strings')
    return check_stop(tuple(value))


def check_stop(words: tuple[str, ...]) -> tuple[str, ...]:
    """``words`` without empty ones, within bounds. Raises InvalidRequest."""
    if len(words) > MAX_STOP or any(len(word) > MAX_STOP_CHARACTERS for word in words):
        raise InvalidRequest(f"stop: at most {MAX_STOP} words of {MAX_STOP_CHARACTERS} characters")
    return tuple(word for word in words if word)
