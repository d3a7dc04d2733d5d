"""The llama.cpp engine's processes: that they end, how they fail, and what they keep secret. Real processes, a real model."""

from __future__ import annotations

import array
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import EngineCrashed, EngineUnavailable
from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, ChatRequest, Delta, EmbedRequest, Event, Finish, Message, Options, Vector
from meshmax.base.model import ModelDetails
from meshmax.engine.llamacpp import LlamaCppEngine, LlamaCppModel, load_words
from meshmax.engine.llamacpp_child import PROMPT_CACHE_MIB
from meshmax.engine.loopback_http import LoopbackHttp
from meshmax.services.residency import ModelResidency, open_residency
from tests.contracts.test_engine import small_model

pytestmark = pytest.mark.loopback

CONFIG = EngineConfig(threads=1, parallel=2, context_tokens=1024)
LONG = ChatRequest(
    (Message("user", "Write a very long story about the sea."),), options=Options(num_predict=900, temperature=0.0)
)
SHORT = ChatRequest((Message("user", "Say hello."),), options=Options(num_predict=8, temperature=0.0, seed=1))


@pytest.fixture
async def model(tmp_path: Path) -> AsyncIterator[LlamaCppModel]:
    async with LlamaCppEngine(CONFIG, tmp_path).open_model(small_model()) as loaded:
        yield loaded


@asynccontextmanager
async def residency_over(folder: Path) -> AsyncIterator[ModelResidency]:
    async def model_file(digest: Sha256) -> ModelFile:
        await trio.lowlevel.checkpoint()
        return small_model()

    async with open_residency(LlamaCppEngine(CONFIG, folder), model_file, CONFIG) as residency:
        yield residency


def ask(request: ChatRequest) -> Ask:
    return Ask("r", Sha256("a" * 64), "smollm2", request)


def engine_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("llamacpp_child" in word for word in child.cmdline())]


async def answer(model: LlamaCppModel, request: ChatRequest) -> list[Event]:
    async with model.answer(request) as events:
        return [event async for event in events]


async def idle(model: LlamaCppModel, within_s: float) -> None:
    with trio.fail_after(within_s):
        while True:
            if not await model.busy_slots():
                return
            await trio.sleep(0.02)


async def test_leaving_an_answer_frees_its_slot_long_before_its_end(model: LlamaCppModel) -> None:
    async with model.answer(LONG) as events:
        await anext(events)
        assert await model.busy_slots() == 1
        began_s = trio.current_time()
        for _ in range(10):
            await anext(events)
        token_s = (trio.current_time() - began_s) / 10
    await idle(model, max(1.0, 300 * token_s))  # a third of what the rest would take on this machine


async def test_cancelling_while_the_prompt_is_read_frees_the_slot(model: LlamaCppModel) -> None:
    prompt = ChatRequest((Message("user", "word " * 900),), options=Options(num_predict=900))
    with trio.move_on_after(0.3) as scope:
        await answer(model, prompt)
    assert scope.cancelled_caught
    await idle(model, 120.0)  # llama.cpp reads the batch that it is at (512 tokens) to its end


async def test_unloading_ends_the_process(tmp_path: Path) -> None:
    async with LlamaCppEngine(CONFIG, tmp_path).open_model(small_model()) as loaded:
        process = psutil.Process(loaded.pid)
        assert process.is_running()
    assert not process.is_running()


async def test_a_killed_process_is_a_crash_for_its_answer_and_the_next_request_loads_anew(tmp_path: Path) -> None:
    async with residency_over(tmp_path) as residency:
        with pytest.raises(EngineCrashed, match="exit status -9"):
            await kill_at_first_event(residency)
        async with residency.open_answer(ask(SHORT)) as events:
            said = [event async for event in events]
        finish = said[-1]
        assert isinstance(finish, Finish)
        assert finish.output_tokens > 0
        assert finish.load_s > 0
        (view,) = residency.loaded()
        assert view.load_s > 0
    assert engine_processes() == []


async def kill_at_first_event(residency: ModelResidency) -> None:
    async with residency.open_answer(ask(LONG)) as events:
        await anext(events)
        (process,) = engine_processes()
        process.kill()
        async for _event in events:
            pass


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(5000), b"not a model" * 100], ids=range(4))
async def test_what_is_no_model_is_refused_with_the_engines_own_words(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    file = ModelFile(Sha256("b" * 64), "bad", str(path), len(content))
    with pytest.raises(EngineUnavailable, match=r"cannot load the model: (?!Failed to init).*more in .*log\)"):
        async with LlamaCppEngine(CONFIG, tmp_path).open_model(file):
            pass
    assert engine_processes() == []


async def test_half_a_model_is_refused(tmp_path: Path) -> None:
    whole = Path(small_model().path)
    path = tmp_path / "half.gguf"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(EngineUnavailable, match="cannot load the model: "):
        async with LlamaCppEngine(CONFIG, tmp_path).open_model(ModelFile(Sha256("c" * 64), "half", str(path), 1)):
            pass


async def test_a_process_that_ends_while_loading_is_refused_not_waited_for(tmp_path: Path) -> None:
    async def kill_the_first() -> None:
        found = engine_processes()
        while True:
            if found:
                found[0].kill()
                return
            await trio.sleep(0.005)
            found = engine_processes()

    async def load() -> None:
        with pytest.raises(EngineUnavailable, match="ended while loading"):
            async with LlamaCppEngine(CONFIG, tmp_path).open_model(small_model()):
                pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load)
        nursery.start_soon(kill_the_first)


async def test_cancelling_a_load_leaves_no_process(tmp_path: Path) -> None:
    with trio.move_on_after(0.2):
        async with LlamaCppEngine(CONFIG, tmp_path).open_model(small_model()):
            await trio.sleep(60)
    assert engine_processes() == []


async def test_the_key_is_in_no_process_list_and_nobody_answers_without_it(model: LlamaCppModel) -> None:
    process = psutil.Process(model.pid)
    key = next(value for name, value in model._http._heads._headers if name == "Authorization").removeprefix("Bearer ")
    assert len(key) >= 32
    assert all(key not in word for word in (*process.cmdline(), *process.environ().values()))
    (listening,) = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening.laddr.ip == "127.0.0.1"
    stranger = LoopbackHttp(f"http://127.0.0.1:{listening.laddr.port}", "guess")
    async with stranger.open_response("GET", "/slots") as response:
        assert response.status == 401


KILLED_PARENT = """
import sys, trio
from pathlib import Path
from meshmax.base.config import EngineConfig
from meshmax.engine.llamacpp import LlamaCppEngine
from tests.contracts.test_engine import small_model

async def main():
    config = EngineConfig(threads=1, parallel=1, context_tokens=512)
    async with LlamaCppEngine(config, Path(sys.argv[1])).open_model(small_model()) as loaded:
        print(loaded.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def test_killing_the_node_with_kill_9_leaves_no_orphan(tmp_path: Path) -> None:
    small_model()
    command = [sys.executable, "-c", KILLED_PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        gone, _ = psutil.wait_procs([engine], timeout=60)
    assert gone


async def test_similar_texts_are_closer_than_others(model: LlamaCppModel) -> None:
    cat, kitten, money = await vectors(
        model, "The cat sat on the mat.", "A cat is sitting on a mat.", "Quarterly revenue fell by 4 %."
    )
    assert closeness(cat, kitten) > closeness(cat, money) + 0.1


async def test_a_vector_is_of_its_text_alone_whatever_shares_the_batch(model: LlamaCppModel) -> None:
    texts = ("One two three four five six seven.", "A cat.", "Quarterly revenue fell by 4 % in the north.")
    together = await vectors(model, *texts)
    for text, vector in zip(texts, together, strict=True):
        (alone,) = await vectors(model, text)
        assert closeness(alone, vector) > 0.999


async def vectors(model: LlamaCppModel, *texts: str) -> list[array.array[float]]:
    async with model.answer(EmbedRequest(texts)) as events:
        return [array.array("f", event.values) async for event in events if isinstance(event, Vector)]


def closeness(one: array.array[float], other: array.array[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


async def test_the_chat_template_is_the_ggufs_own(model: LlamaCppModel) -> None:
    prompt = (await model._call("POST", "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}))["prompt"]
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


async def test_a_turn_begun_is_continued_not_repeated(model: LlamaCppModel) -> None:
    begun = "One, two, three,"
    request = ChatRequest(
        (Message("user", "Count to ten in words."), Message("assistant", begun)),
        options=Options(num_predict=12, temperature=0.0),
    )
    text = "".join(event.text for event in await answer(model, request) if isinstance(event, Delta))
    assert not text.startswith(begun)


async def test_logprobs_come_with_their_tokens(model: LlamaCppModel) -> None:
    request = ChatRequest(SHORT.messages, logprobs=True, top_logprobs=2, options=SHORT.options)
    deltas = [event for event in await answer(model, request) if isinstance(event, Delta)]
    assert all(len(delta.logprobs[0]["top_logprobs"]) == 2 for delta in deltas)


async def test_no_gpu_is_an_answer_and_looking_leaves_no_process(tmp_path: Path) -> None:
    engine = LlamaCppEngine(CONFIG, tmp_path)
    assert await engine.devices() == await engine.devices()
    assert engine_processes() == []


def test_a_model_is_loaded_within_what_it_was_trained_for() -> None:
    def context(trained: int, num_ctx: int | None, configured: int) -> int:
        file = ModelFile(
            Sha256("a" * 64), "m", "/m", 1, ModelDetails(context_length=trained), parameters=Options(num_ctx=num_ctx)
        )
        return int(load_words(file, EngineConfig(context_tokens=configured))["context_tokens"])

    assert context(8192, None, 0) == 4096
    assert context(2048, None, 0) == 2048
    assert context(2048, 1 << 20, 0) == 2048
    assert context(8192, 256, 1024) == 256
    assert context(0, None, 1024) == 1024
    assert context(8192, 1, 0) == 64


async def test_memory_stays_within_bounds_over_many_prompts(model: LlamaCppModel) -> None:
    process = psutil.Process(model.pid)
    for number in range(6):
        await answer(model, ChatRequest((Message("user", f"{number} " * 100),), options=Options(num_predict=1)))
    assert process.memory_info().rss < model.facts.size + ((PROMPT_CACHE_MIB + 300) << 20)
