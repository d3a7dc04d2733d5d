"""What the llama.cpp engine says of how it loaded a model."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.ids import Sha256
from meshmax.engine.llamacpp import GpuMemory, LlamaCppModel

MODEL = ModelFile(Sha256("a" * 64), "tiny", "/nowhere", 1000)


async def sizes(
    monkeypatch: pytest.MonkeyPatch, offload: bool, memory: GpuMemory, pid: int = 0
) -> tuple[int, int, str]:
    process: Any = SimpleNamespace(words={"offload": offload}, pid=pid or os.getpid())
    http: Any = None
    model = LlamaCppModel(MODEL, process, http, {"context_tokens": 64, "parallel": 2}, memory)

    async def call(*_args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return {"default_generation_settings": {"n_ctx": 32}}

    monkeypatch.setattr(model, "_call", call)
    await model.learn_facts()
    assert (model.facts.context_length, model.facts.parallel) == (32, 2)
    return model.facts.size, model.facts.size_vram, model.facts.device


async def test_on_a_cpu_a_model_takes_its_file_and_what_its_process_has_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, size_vram, device = await sizes(monkeypatch, False, GpuMemory(5000, 0))
    assert 1 << 20 < size < 4 << 30
    assert (size_vram, device) == (0, "cpu")


async def test_of_a_process_that_is_gone_the_file_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await sizes(monkeypatch, False, GpuMemory(), pid=1 << 30) == (1000, 0, "cpu")


@pytest.mark.parametrize(("total", "on_gpu"), [(9000, 5000), (3000, 3000), (0, 5000)])
async def test_on_gpus_it_takes_what_was_thought_as_far_as_they_have_it(
    monkeypatch: pytest.MonkeyPatch, total: int, on_gpu: int
) -> None:
    assert await sizes(monkeypatch, True, GpuMemory(5000, total)) == (5000, on_gpu, "gpu")
