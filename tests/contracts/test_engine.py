"""What every engine does, over all of them: echo, llama.cpp with a real small model on loopback, and the engines of others,
played by a peer of ours, whose interfaces are Ollama's and OpenAI's; and a real Ollama on loopback, where there is one
(tests/ollama_site.py says how to get one tried)."""

import array
import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from meshmax.api.app import make_app
from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig, OpenAiServer
from meshmax.base.errors import CapabilityMissing, ContextTooLong, InvalidRequest
from meshmax.base.ids import Sha256
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Message,
    Options,
    Vector,
)
from meshmax.base.model import ModelDetails
from meshmax.core.continuation import Joint, SoFar, plan
from meshmax.engine.echo import EchoEngine
from meshmax.engine.llamacpp import LlamaCppEngine
from meshmax.engine.ollama import OllamaEngine
from meshmax.engine.openai_compat import OpenAiEngine
from meshmax.engine.openai_words import digest_of
from meshmax.engine.server_http import ServerHttp
from meshmax.ports import Backend, Engine, LoadedModel
from meshmax.testing.asgi_front import AsgiFront
from tests.api.fake_node import DIGEST, open_fake_node
from tests.ollama_site import CONTEXT_TOKENS, Daemon, ollama_with_a_model, small_gguf

CONFIG = EngineConfig(threads=1, parallel=2, context_tokens=512, echo_tokens_per_s=1e9)
TINY = Options(temperature=0.0, seed=1, num_predict=8)


def small_model() -> ModelFile:
    path = small_gguf()
    return ModelFile(Sha256("a" * 64), "smollm2:135m", str(path), path.stat().st_size)


URL = "http://127.0.0.1:11434"


REAL = [pytest.param(kind, marks=pytest.mark.loopback) for kind in ("llamacpp", "real ollama")]


@pytest.fixture(params=["echo", "ollama", "openai", *REAL])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "real ollama":
        request.getfixturevalue("daemon")  # here, since a skip in a fixture that is async loses its reason
    return str(request.param)


@pytest.fixture
def clock(kind: str) -> trio.testing.MockClock | None:
    return None if kind in ("llamacpp", "real ollama") else trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with ollama_with_a_model(tmp_path_factory.mktemp("ollama")) as started:
        yield started


@pytest.fixture
async def engine(kind: str, clock: object, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    if kind == "echo":
        yield EchoEngine(CONFIG)
        return
    if kind == "llamacpp":
        yield LlamaCppEngine(CONFIG, tmp_path)
        return
    if kind == "real ollama":
        beside = OllamaEngine(ServerHttp(request.getfixturevalue("daemon").url), parallel=2)
        await beside.look()
        yield beside
        return
    fields = {"parallel": 2, "context_tokens": 512, "echo_tokens_per_s": 1e9}
    async with open_fake_node(engine=fields) as node, trio.open_nursery() as nursery:
        front = AsgiFront(make_app(node), nursery)
        backend: Backend = OllamaEngine(ServerHttp(URL, connect=front.connect), parallel=2)
        if kind == "openai":
            http = ServerHttp(f"{URL}/v1", connect=front.connect)
            backend = OpenAiEngine(OpenAiServer(URL, parallel=2), http)
        await backend.look()
        yield backend
        nursery.cancel_scope.cancel()


@pytest.fixture
async def file(kind: str, engine: Engine) -> ModelFile:
    if kind == "llamacpp":
        return small_model()
    if kind == "real ollama":
        (offer,) = await engine.look()  # type: ignore[attr-defined]
        details = msgspec.structs.replace(offer.details, context_length=CONTEXT_TOKENS)
        return ModelFile(offer.digest, offer.name, "", offer.size, details)
    digest = {"ollama": DIGEST, "openai": digest_of("echo:latest")}.get(engine.name, Sha256("a" * 64))
    return ModelFile(digest, "echo", "/nowhere", 1, ModelDetails(context_length=512))


@pytest.fixture
async def model(engine: Engine, file: ModelFile) -> AsyncIterator[LoadedModel]:
    async with engine.open_model(file) as loaded:
        yield loaded


def chat(text: str, options: Options = TINY, **more: object) -> ChatRequest:
    return ChatRequest((Message("user", text),), options=options, **more)  # type: ignore[arg-type]


async def answer(model: LoadedModel, request: InferRequest) -> list[Event]:
    async with model.answer(request) as events:
        return [event async for event in events]


async def said(model: LoadedModel, request: InferRequest) -> tuple[str, Finish]:
    events = await answer(model, request)
    assert isinstance(events[-1], Finish)
    assert all(isinstance(event, Delta) for event in events[:-1])
    return "".join(event.text for event in events if isinstance(event, Delta)), events[-1]


async def refusal(model: LoadedModel, request: InferRequest) -> None:
    async with model.answer(request) as events:
        await anext(events)


async def test_its_facts_are_true(model: LoadedModel) -> None:
    await trio.lowlevel.checkpoint()
    assert model.alive
    assert (model.facts.parallel, model.facts.context_length) == (2, 512)
    assert model.facts.size > 0
    assert model.facts.device == ("gpu" if model.facts.size_vram else "cpu")


async def test_devices_is_an_answer(engine: Engine) -> None:
    assert isinstance(await engine.devices(), tuple)


async def test_an_answer_streams_and_ends_with_one_finish(model: LoadedModel) -> None:
    events = await answer(model, chat("one two three four five six seven eight nine ten"))
    assert len(events) > 3
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert finish.done_reason == "length"
    assert finish.output_tokens == 8
    assert finish.prompt_tokens >= 10
    assert finish.output_s > 0


async def test_the_same_seed_gives_the_same_answer(model: LoadedModel) -> None:
    request = chat("Tell me a story", Options(temperature=1.0, seed=42, num_predict=12))
    first = (await said(model, request))[0]
    await said(model, chat("Something else"))
    assert (await said(model, request))[0] == first


async def test_a_stop_word_ends_the_answer_and_is_not_in_it(model: LoadedModel) -> None:
    text, _ = await said(model, chat("alpha beta gamma delta"))
    stop = text.split()[2]
    cut, finish = await said(
        model, chat("alpha beta gamma delta", Options(temperature=0.0, seed=1, num_predict=8, stop=(stop,)))
    )
    assert stop not in cut
    assert text.startswith(cut)
    assert finish.done_reason == "stop"


@pytest.mark.parametrize(
    "format_",
    ["json", {"type": "object", "properties": {"echo": {"type": "string", "maxLength": 9}}, "required": ["echo"]}],
)
async def test_json_was_asked_for_and_json_comes(model: LoadedModel, format_: object) -> None:
    text, finish = await said(
        model, chat("Hi", Options(temperature=0.0, seed=3, num_predict=200, repeat_penalty=1.3), format=format_)
    )
    if finish.done_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert text.lstrip().startswith("{")


async def test_a_prompt_can_be_raw_or_templated_and_only_the_latter_has_a_context(
    engine: Engine, model: LoadedModel
) -> None:
    if engine.name == "openai":
        pytest.skip("OpenAI's interface has no context of tokens")
    raw, plain = (
        GenerateRequest("The capital of France is", raw=True, options=TINY),
        GenerateRequest("Hello", options=TINY),
    )
    assert (await said(model, raw))[1].context == ()
    context = (await said(model, plain))[1].context
    assert len(context) >= 2
    assert (await said(model, GenerateRequest("And now?", context=context, options=TINY)))[1].context[
        : len(context)
    ] == context


async def test_vectors_have_length_one_and_equal_texts_equal_vectors(model: LoadedModel) -> None:
    events = await answer(model, EmbedRequest(("a cat sat", "a cat sat", "stock markets fell")))
    vectors = [array.array("f", event.values) for event in events if isinstance(event, Vector)]
    assert [event.index for event in events if isinstance(event, Vector)] == [0, 1, 2]
    for vector in vectors:
        assert math.sqrt(sum(value * value for value in vector)) == pytest.approx(1.0, abs=1e-4)
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-3)
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert finish.prompt_tokens >= 9


async def test_vectors_are_cut_and_brought_to_length_one_again(model: LoadedModel) -> None:
    vector, _ = await answer(model, EmbedRequest(("a cat",), dimensions=8))
    assert isinstance(vector, Vector)
    values = array.array("f", vector.values)
    assert len(values) == 8
    assert math.sqrt(sum(value * value for value in values)) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(InvalidRequest, match="dimensions must be between"):
        await answer(model, EmbedRequest(("a cat",), dimensions=100_000))


async def test_no_texts_are_no_vectors(model: LoadedModel) -> None:
    (finish,) = await answer(model, EmbedRequest(()))
    assert isinstance(finish, Finish)


async def test_a_text_too_long_to_embed_is_cut_or_refused(kind: str, engine: Engine, model: LoadedModel) -> None:
    if engine.name == "openai":
        pytest.skip("OpenAI's interface leaves it to the server whether a text is cut")
    long = ("word " * 600,)
    events = await answer(model, EmbedRequest(long))
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert finish.prompt_tokens == 512 or (kind == "real ollama" and 500 < finish.prompt_tokens < 512)
    with pytest.raises(ContextTooLong, match="the input length exceeds the context length"):
        await answer(model, EmbedRequest(long, truncate=False))


async def test_a_prompt_longer_than_the_context_is_refused_before_the_first_event(
    kind: str, model: LoadedModel
) -> None:
    if kind == "real ollama":
        pytest.skip("an Ollama cuts a prompt that is too long, as its own clients expect")
    with pytest.raises(ContextTooLong, match=r"context (512|4096)"):
        await refusal(model, chat("word " * 5000))  # more than it was trained for: a peer of ours loads it with more


@pytest.mark.parametrize(
    "request_",
    [
        ChatRequest((Message("user", "what is this?", images=(b"png",)),)),
        GenerateRequest("what is this?", images=(b"png",)),
        GenerateRequest("def f(", suffix="return 1"),
    ],
)
async def test_what_the_model_cannot_do_is_refused_before_the_first_event(
    model: LoadedModel, request_: InferRequest
) -> None:
    with pytest.raises(CapabilityMissing):
        await refusal(model, request_)


async def test_answers_run_side_by_side(model: LoadedModel) -> None:
    texts: list[str] = []

    async def one(text: str) -> None:
        texts.append((await said(model, chat(text)))[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, "left side of it")
        nursery.start_soon(one, "right side of it")
    assert len(texts) == 2
    assert all(texts)


async def test_after_an_answer_that_was_left_the_next_is_whole(model: LoadedModel) -> None:
    for _ in range(3):
        async with model.answer(chat("w " * 60, Options(num_predict=200))) as events:
            await anext(events)
    text, finish = await said(model, chat("one two three"))
    assert text
    assert finish.output_tokens > 0


async def test_unloading_is_the_end_of_it(engine: Engine, file: ModelFile) -> None:
    async with engine.open_model(file) as loaded:
        assert loaded.alive
    assert not loaded.alive


# --- the rest of an answer that another peer began --------------------------------------------------------------------


async def in_two_halves(model: LoadedModel, request: InferRequest, whole: list[Event], at: int) -> list[Event]:
    """What a client gets whose first peer died after ``at`` events, and whose second one is ``model``."""
    so_far = SoFar()
    for event in whole[:at]:
        so_far.on_event(event)
    how = plan(request, so_far)
    assert how is not None
    try:
        rest = await answer(model, how.request)
    except CapabilityMissing:
        how = plan(request, so_far, can_go_on=False)
        assert how is not None
        rest = await answer(model, how.request)
    joint = Joint(how, so_far)
    return whole[:at] + [out for event in rest for out in joint.on_event(event)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.mark.parametrize(
    "request_",
    [
        chat("alpha beta gamma delta epsilon zeta eta theta iota"),
        chat("alpha beta gamma delta", Options(temperature=0.0, num_predict=6, stop=("delta", "! H", "!\n"))),
        GenerateRequest("one two three four five six", options=TINY),
        GenerateRequest("The capital of France is", raw=True, options=TINY),
        GenerateRequest("\U0001f98a \u6587\u5b57 caf\xe9", options=TINY),
    ],
)
async def test_an_answer_goes_on_after_what_was_said_as_if_nothing_had_happened(
    engine: Engine, model: LoadedModel, request_: InferRequest
) -> None:
    if engine.name in ("ollama", "openai") and isinstance(request_, GenerateRequest) and request_.raw:
        pytest.skip("a raw prompt with a begun answer is another prompt, which the echo behind this engine repeats")
    whole = await answer(model, request_)
    end = whole[-1]
    for at in (1, len(whole) // 2, len(whole) - 1):
        got = await in_two_halves(model, request_, whole, at)
        assert text_of(got) == text_of(whole)
        last = got[-1]
        assert isinstance(last, Finish)
        assert isinstance(end, Finish)
        assert (last.done_reason, last.output_tokens) == (end.done_reason, end.output_tokens)
        assert last.context in (end.context, ())


async def test_an_answer_with_a_context_goes_on(model: LoadedModel) -> None:
    context = (await said(model, GenerateRequest("Hello", options=TINY)))[1].context
    if not context:
        pytest.skip("this engine has no contexts")
    request = GenerateRequest("And now some more of it?", context=context, options=TINY)
    whole = await answer(model, request)
    got = await in_two_halves(model, request, whole, len(whole) // 2)
    assert text_of(got) == text_of(whole)


async def test_an_answer_that_is_whole_but_for_its_end_ends_at_once(model: LoadedModel) -> None:
    request = chat("What is 2 plus 2?", Options(temperature=0.0, num_predict=64))
    whole = await answer(model, request)
    got = await in_two_halves(model, request, whole, len(whole) - 1)
    assert len(got) == len(whole)
    last, end = got[-1], whole[-1]
    assert isinstance(last, Finish)
    assert isinstance(end, Finish)
    assert (last.done_reason, last.output_tokens) == (end.done_reason, end.output_tokens)


async def test_json_that_broke_off_becomes_json(model: LoadedModel) -> None:
    request = chat("Tell me of a cat", Options(temperature=0.0, num_predict=120, repeat_penalty=1.3), format="json")
    whole = await answer(model, request)
    for at in (1, len(whole) // 2):
        got = await in_two_halves(model, request, whole, at)
        assert text_of(got).startswith(text_of(whole[:at]))
        last = got[-1]
        assert isinstance(last, Finish)
        if last.done_reason == "stop":
            assert isinstance(json.loads(text_of(got)), dict)
