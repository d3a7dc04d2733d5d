"""How much memory a model takes and how much there is for models on this peer. Pure.

What a model takes (`need_of`): its file, mapped from where it lies; a context for each answer at once; and OVERHEAD_BYTES. What
a load really took counts from then on (`Measured`). What there is (`room_of`): what the configuration says, else of the GPUs that
the engine can use what other programs leave, less GPU_SPARE; without a GPU CPU_SHARE of the machine's memory, less what others
use. The file of a model that runs on the CPU is in the system's cache, which it counts as free, so only the rest of our own
models is taken off what is used. One that exceeds an automatic budget may still have it alone, as long as the machine has so
much: llama.cpp then leaves layers on the CPU, or the system reads parts of the file anew. One that exceeds what a person
configured is refused. Where nothing is known there is no bound. Not here: which model goes (core.residency), reading the
machine (telemetry.meter, engine.gpu).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import ConfigError, InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.inference import Options
from meshmax.base.status import Gpu
from meshmax.base.units import MIB, format_bytes, parse_bytes

DEFAULT_CONTEXT_TOKENS: Final = 4096  # as Ollama's on a small machine
MIN_CONTEXT_TOKENS: Final = 64  # less holds no template
MAX_CONTEXT_TOKENS: Final = 1 << 22  # where the model does not say what it was trained for; as options take it
OVERHEAD_BYTES: Final = 200 * MIB  # of an engine process: itself, its scratch buffers
GUESSED_CACHE: Final = 0.1  # of the file, where the file does not say how large a token's keys and values are
CPU_SHARE: Final = 0.8  # of the machine's memory; people work on it, too
GPU_SPARE: Final = 0.05  # of the GPUs' memory: drivers and allocators round up
CACHE_VALUE_BYTES: Final = 2  # half precision, llama.cpp's default
MAX_CACHE_BYTES_PER_TOKEN: Final = 1 << 26  # the largest models have a few MiB; a file may claim anything
MAX_MEASURED: Final = 256  # loads whose memory is remembered; the one longest ago is forgotten first


class Need(msgspec.Struct, frozen=True):
    """What a model takes, in bytes: its file, and ``working_bytes`` of its own beside it."""

    file_bytes: int = 0
    working_bytes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.file_bytes + self.working_bytes


class Reading(msgspec.Struct, frozen=True):
    """What the machine uses and has, in bytes; a total of 0 is unknown. ``gpus``: those that the engine uses."""

    memory_bytes: int = 0
    memory_total_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()


class Room(msgspec.Struct, frozen=True):
    """What there is for models. ``budget_bytes`` for all; one alone may have ``most_bytes``. None: no bound.

    ``why``: where the bound comes from, for a person.
    """

    budget_bytes: int | None = None
    most_bytes: int | None = None
    why: str = ""

    def takes(self, need_bytes: int, taken_bytes: int, *, alone: bool) -> bool:
        """Whether there is room for one more. ``alone``: no other is in memory."""
        if self.budget_bytes is None or taken_bytes + need_bytes <= self.budget_bytes:
            return True
        return alone

    def too_small_for(self, need: Need) -> str:
        """Why a model can never be loaded here, a sentence; '' if it can."""
        if self.most_bytes is None or need.total <= self.most_bytes:
            return ""
        return (
            f"the model needs about {format_bytes(need.total)} of memory, {format_bytes(need.working_bytes)} of it for its"
            f" context and the engine; {self.why} {format_bytes(self.most_bytes)}: a smaller num_ctx or engine.parallel"
            " needs less, and engine.memory sets how much models may take"
        )


def parse_memory(text: str) -> int | None:
    """The setting engine.memory in bytes; None for '', automatic. Raises ConfigError."""
    if not text.strip():
        return None
    try:
        size = parse_bytes(text)
    except InvalidRequest as error:
        raise ConfigError(f"engine.memory: {error.message}") from None
    if not size:
        raise ConfigError("engine.memory: write a size like 24GB, or nothing for as much as there is")
    return size


def context_tokens(model: ModelFile, config: EngineConfig) -> int:
    """Tokens of context with which ``model`` is loaded: its own, else the configured, never more than it was trained for."""
    wanted = model.parameters.num_ctx or config.context_tokens or DEFAULT_CONTEXT_TOKENS
    return max(MIN_CONTEXT_TOKENS, min(wanted, model.details.context_length or MAX_CONTEXT_TOKENS))


def need_of(model: ModelFile, config: EngineConfig) -> Need:
    """What ``model``, whose parameters hold the request's, will take by what its file says."""
    if config.kind == "echo":
        return Need(model.size)
    tokens = context_tokens(model, config) * config.parallel
    cache = model.cache_bytes_per_token * tokens or int(model.size * GUESSED_CACHE)
    return Need(model.size, cache + OVERHEAD_BYTES)


def cache_bytes_per_token(facts: Mapping[str, Any]) -> int:
    """Bytes of keys and values of one token, by a GGUF's key-values; 0 where they do not tell.

    Layers that need none, or few, are not looked for, so it may be too much.
    """
    architecture = facts.get("general.architecture")

    def number(key: str) -> int:
        value = facts.get(f"{architecture}.{key}")
        if isinstance(value, list):
            value = max((each for each in value if isinstance(each, int)), default=0)
        return value if isinstance(value, int) and value > 0 else 0

    heads = number("attention.head_count")
    width = number("embedding_length") // heads if heads else 0
    kept = number("attention.head_count_kv") or heads
    keys = number("attention.key_length") or width
    values = number("attention.value_length") or width
    return min(number("block_count") * kept * (keys + values) * CACHE_VALUE_BYTES, MAX_CACHE_BYTES_PER_TOKEN)


def room_of(reading: Reading, configured: int | None, own: Iterable[Need]) -> Room:
    """What there is now. ``own``: what our models in memory take."""
    if configured is not None:
        return Room(configured, configured, "engine.memory is")
    held = tuple(own)
    total = reading.memory_total_bytes
    gpu_total, gpu_used = _of_gpus(reading.gpus)
    if reading.gpus:
        if not gpu_total:
            return Room()
        others = max(0, gpu_used - sum(need.total for need in held))
        budget = gpu_total - others - int(gpu_total * GPU_SPARE)
        return Room(max(budget, 0), gpu_total + total if total else None, "this peer's GPUs and memory have together")
    if not total:
        return Room()
    others = max(0, reading.memory_bytes - sum(need.working_bytes for need in held))
    return Room(max(int(total * CPU_SHARE) - others, 0), total, "this peer has")


def _of_gpus(gpus: Iterable[Gpu]) -> tuple[int, int]:
    """(total, used) of all; (0, 0) where a driver does not tell."""
    total = used = 0
    for gpu in gpus:
        if gpu.memory_total_bytes <= 0:
            return 0, 0
        total += gpu.memory_total_bytes
        used += min(max(gpu.memory_bytes, 0), gpu.memory_total_bytes)
    return total, used


def measured_need(file_bytes: int, size: int, size_vram: int) -> Need:
    """What a load took, as the engine tells: all of ``size``, or on a GPU what it took there."""
    taken = size_vram or size
    return Need(min(file_bytes, taken), max(taken - file_bytes, 0))


class Measured:
    """What loads have taken, by model and the options that count."""

    def __init__(self) -> None:
        self._needs: OrderedDict[tuple[Sha256, Options], Need] = OrderedDict()

    def on_loaded(self, model: ModelFile, need: Need) -> None:
        """``model`` is in memory, loaded with its parameters."""
        key = model.digest, _that_count(model.parameters)
        self._needs[key] = need
        self._needs.move_to_end(key)
        if len(self._needs) > MAX_MEASURED:
            self._needs.popitem(last=False)

    def need(self, model: ModelFile) -> Need | None:
        """What it took, None if it was never loaded like this."""
        return self._needs.get((model.digest, _that_count(model.parameters)))


def _that_count(parameters: Options) -> Options:
    return Options(num_ctx=parameters.num_ctx, num_gpu=parameters.num_gpu)
