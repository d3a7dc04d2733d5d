"""How much a model takes and how much there is, by tables of cases."""

from typing import Any

import pytest

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import ConfigError
from meshmax.base.ids import Sha256
from meshmax.base.inference import Options
from meshmax.base.model import ModelDetails
from meshmax.base.status import Gpu
from meshmax.base.units import GIB, MIB
from meshmax.core.memory import (
    DEFAULT_CONTEXT_TOKENS,
    MAX_CACHE_BYTES_PER_TOKEN,
    MAX_MEASURED,
    OVERHEAD_BYTES,
    Measured,
    Need,
    Reading,
    Room,
    cache_bytes_per_token,
    context_tokens,
    measured_need,
    need_of,
    parse_memory,
    room_of,
)

DIGEST = Sha256("a" * 64)
CONFIG = EngineConfig(parallel=4)


def file(size: int = GIB, per_token: int = 0, trained: int = 8192, **options: Any) -> ModelFile:
    details = ModelDetails(context_length=trained)
    return ModelFile(DIGEST, "m", "/m", size, details, parameters=Options(**options), cache_bytes_per_token=per_token)


# --- what a model takes ----------------------------------------------------------------------------------------------

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (LLAMA, 32 * 8 * (128 + 128) * 2),
        ({**LLAMA, "llama.attention.head_count_kv": None}, 32 * 32 * 256 * 2),
        ({**LLAMA, "llama.attention.head_count_kv": [0, 8, 0, 4]}, 32 * 8 * 256 * 2),
        ({**LLAMA, "llama.attention.head_count_kv": []}, 32 * 32 * 256 * 2),
        ({**LLAMA, "llama.attention.key_length": 64, "llama.attention.value_length": 32}, 32 * 8 * 96 * 2),
        ({**LLAMA, "llama.block_count": "many"}, 0),
        ({**LLAMA, "llama.block_count": -3}, 0),
        ({**LLAMA, "llama.block_count": 1 << 60}, MAX_CACHE_BYTES_PER_TOKEN),
        ({}, 0),
    ],
)
def test_a_tokens_keys_and_values_are_counted_by_the_files_own_figures(facts: dict[str, object], expected: int) -> None:
    assert cache_bytes_per_token(facts) == expected


@pytest.mark.parametrize(
    ("model", "config", "tokens"),
    [
        (file(), CONFIG, DEFAULT_CONTEXT_TOKENS),
        (file(num_ctx=2048), EngineConfig(context_tokens=1024), 2048),
        (file(), EngineConfig(context_tokens=1024), 1024),
        (file(trained=512), CONFIG, 512),
        (file(num_ctx=1), CONFIG, 64),
        (file(trained=0, num_ctx=100_000), CONFIG, 100_000),
    ],
)
def test_the_context_is_what_was_asked_for_within_what_the_model_was_trained_for(
    model: ModelFile, config: EngineConfig, tokens: int
) -> None:
    assert context_tokens(model, config) == tokens


def test_a_model_takes_its_file_and_a_context_for_each_answer_at_once() -> None:
    need = need_of(file(per_token=1000, num_ctx=2048), CONFIG)
    assert need == Need(GIB, 1000 * 2048 * 4 + OVERHEAD_BYTES)
    assert need.total == GIB + need.working_bytes
    assert need_of(file(), CONFIG) == Need(GIB, GIB // 10 + OVERHEAD_BYTES)
    assert need_of(file(), EngineConfig(kind="echo")) == Need(GIB)


def test_what_a_load_took_is_remembered_for_loads_of_its_kind() -> None:
    measured = Measured()
    measured.on_loaded(file(), Need(GIB, 7))
    assert measured.need(file()) == Need(GIB, 7)
    assert measured.need(file(num_thread=2)) == Need(GIB, 7)
    assert measured.need(file(num_ctx=2048)) is None
    for tokens in range(MAX_MEASURED):
        measured.on_loaded(file(num_ctx=tokens + 1), Need())
    assert measured.need(file()) is None


def test_on_a_gpu_what_was_taken_there_counts() -> None:
    assert measured_need(100, size=150, size_vram=0) == Need(100, 50)
    assert measured_need(100, size=300, size_vram=130) == Need(100, 30)
    assert measured_need(100, size=300, size_vram=60) == Need(60, 0)


# --- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "own", "budget", "most"),
    [
        (Reading(), (), None, None),
        (Reading(0, 100), (), 80, 100),
        (Reading(30, 100), (), 50, 100),
        (Reading(30, 100), (Need(50, 20),), 70, 100),  # its file is in the cache, which counts as free
        (Reading(95, 100), (), 0, 100),
        (Reading(30, 100, (Gpu("g", 0, 1000),)), (), 950, 1100),
        (Reading(30, 100, (Gpu("g", 400, 1000),)), (), 550, 1100),
        (Reading(30, 100, (Gpu("g", 400, 1000),)), (Need(250, 50),), 850, 1100),
        (Reading(30, 100, (Gpu("g", 400, 1000), Gpu("h", 0, 1000))), (), 1500, 2100),
        (Reading(30, 100, (Gpu("g", 0, 1000), Gpu("h", 0, 0))), (), None, None),  # one whose driver tells nothing
        (Reading(0, 0, (Gpu("g", 0, 1000),)), (), 950, None),
    ],
)
def test_there_is_what_others_leave(reading: Reading, own: tuple[Need, ...], budget: int, most: int) -> None:
    room = room_of(reading, None, own)
    assert (room.budget_bytes, room.most_bytes) == (budget, most)


def test_what_is_configured_counts_whatever_the_machine_has() -> None:
    assert room_of(Reading(95, 100, (Gpu("g", 900, 1000),)), 70, (Need(60),)).budget_bytes == 70


def test_one_alone_may_exceed_an_automatic_budget_and_one_more_may_not() -> None:
    room = Room(100, 150)
    assert room.takes(100, 0, alone=True)
    assert room.takes(40, 60, alone=False)
    assert not room.takes(41, 60, alone=False)
    assert room.takes(140, 0, alone=True)
    assert Room().takes(1 << 50, 1 << 50, alone=False)


def test_what_can_never_fit_is_told_with_what_it_needs_what_there_is_and_which_setting() -> None:
    room = room_of(Reading(), 2 * GIB, ())
    assert room.too_small_for(Need(GIB, GIB)) == ""
    why = room.too_small_for(Need(4 * GIB, 512 * MIB))
    assert why.startswith("the model needs about 4.8 GB of memory, 536 MB of it for its context")
    assert "engine.memory is 2.1 GB" in why
    assert "num_ctx" in why
    assert "this peer has 8.6 GB" in room_of(Reading(0, 8 * GIB), None, ()).too_small_for(Need(9 * GIB))
    assert Room().too_small_for(Need(1 << 60)) == ""


@pytest.mark.parametrize(("text", "size"), [("", None), (" ", None), ("24GB", 24 * 10**9), ("2GiB", 2 * GIB)])
def test_the_setting_is_a_size_or_automatic(text: str, size: int | None) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["lots", "0", "-1GB", "80%"])
def test_a_setting_that_is_no_size_says_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.memory: .*GB"):
        parse_memory(text)
