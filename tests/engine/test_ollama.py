"""The engine of an Ollama that is there already."""

from __future__ import annotations

from typing import Any

import pytest
import trio.testing

from meshmax.base.catalog import ModelFile
from meshmax.base.errors import CapabilityMissing, EngineUnavailable, InvalidRequest, ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.inference import ChatRequest, EmbedRequest, GenerateRequest, Message, Said, Vector
from meshmax.engine.ollama import OllamaEngine
from tests.engine.server_site import DIGEST, TAGS, answered, http, json, open_ollama, open_server, stream, text

Clock = trio.testing.MockClock
CHAT = ('{"message":{"content":"hi"}}', '{"message":{},"done":true,"done_reason":"stop"}')
PROMPT = ('{"response":"hi"}', '{"response":"","done":true,"done_reason":"stop"}')
OPEN = {"template": "{{ range .Messages }}{{ .Content }}{{ if not $last }}<|end|>{{ end }}{{ end }}"}


async def test_prompts_and_chats_go_to_their_paths(autojump_clock: Clock) -> None:
    async with open_server() as server, open_ollama(server) as model:
        server.replies |= {"/api/chat": stream(*CHAT), "/api/generate": stream(*PROMPT)}
        assert text(await answered(model)) == "hi"
        assert server.body()["messages"] == [{"role": "user", "content": "hello"}]
        assert text(await answered(model, GenerateRequest("hello"))) == "hi"
        assert server.body() == {"model": "m:latest", "stream": True, "options": {}, "prompt": "hello", "raw": False}


@pytest.mark.parametrize(("shown", "goes_on"), [(OPEN, True), ({"template": "{{ .Messages }}"}, False), ({}, False)])
async def test_an_answer_goes_on_where_the_template_lets_it(shown: Any, goes_on: bool, autojump_clock: Clock) -> None:
    async with open_server() as server, open_ollama(server) as model:
        server.replies |= {"/api/chat": stream(*CHAT), "/api/generate": stream(*PROMPT), "/api/show": json(shown)}
        for request in (
            ChatRequest((Message("user", "c"),), said=Said("One,")),
            GenerateRequest("c", said=Said("One,")),
        ):
            if goes_on:
                assert text(await answered(model, request)) == "hi"
                assert server.body()["messages"][-1] == {"role": "assistant", "content": "One,"}
            else:
                with pytest.raises(CapabilityMissing, match="template"):
                    await answered(model, request)
        assert text(await answered(model, GenerateRequest("c", raw=True, said=Said(" One,")))) == "hi"
        assert server.body()["prompt"] == "c One,"


async def test_the_daemon_of_another_person_is_told_nothing(autojump_clock: Clock) -> None:
    async with open_server() as server:
        found = [1001]
        engine = OllamaEngine(http(server), strangers=lambda: found)
        with pytest.raises(EngineUnavailable, match=r"another user's \(uid 1001\).*set engine.ollama"):
            await engine.look()
        assert not server.scripted.requests
        found.clear()
        assert await engine.look()


async def test_loading_keeping_and_unloading_are_told_to_it(autojump_clock: Clock) -> None:
    async with open_server() as server:
        engine = OllamaEngine(http(server))
        await engine.look()
        server.replies["/api/generate"] = json({"done": True})
        for seconds, told in ((None, None), (5.0, 5.0), (-1.0, -1), (0.0, 0.0)):
            await engine.keep(DIGEST, seconds)
            assert server.body().get("keep_alive") == told
        server.replies["/api/generate"] = json({"error": "no"}, 400)
        with pytest.raises(InvalidRequest):
            await engine.keep(DIGEST, None)
        with pytest.raises(ModelNotFound):
            await engine.keep(Sha256("0" * 64), None)


async def test_what_the_list_does_not_tell_is_asked_for_once(autojump_clock: Clock) -> None:
    async with open_server() as server:
        tags = [{key: value for key, value in tag.items() if key != "capabilities"} for tag in TAGS["models"]]
        server.replies["/api/tags"] = json({"models": tags})
        server.replies["/api/show"] = json(
            {"capabilities": ["completion", "tools"], "model_info": {"llama.context_length": 64}, "details": {}}
        )
        engine = OllamaEngine(http(server))
        for _ in range(3):
            (offer,) = await engine.look()
            assert (offer.details.capabilities, offer.details.context_length) == (("completion", "tools"), 64)
        assert sum(request.startswith(b"POST /api/show") for request in server.scripted.requests) == 1
        assert (await engine.describe(DIGEST)).details == offer.details


async def test_vectors_that_are_to_stay_as_long_as_they_are_come_from_the_older_interface(
    autojump_clock: Clock,
) -> None:
    async with open_server() as server, open_ollama(server) as model:
        server.replies["/api/embeddings"] = json({"embedding": [3.0, 4.0]})
        server.replies["/api/embed"] = json({"embeddings": [[3.0, 4.0]], "prompt_eval_count": 2})
        long, _ = await answered(model, EmbedRequest(("a",), normalize=False))
        short, _ = await answered(model, EmbedRequest(("a",), truncate=False))
        assert isinstance(long, Vector)
        assert isinstance(short, Vector)
        assert long.values == b"\x00\x00@@\x00\x00\x80@"
        assert short.values == b"\x9a\x99\x19?\xcd\xccL?"
        assert server.body() == {"model": "m:latest", "options": {}, "input": ["a"], "truncate": False}


async def test_a_model_that_is_not_in_memory_runs_where_others_did(autojump_clock: Clock) -> None:
    async with open_server() as server:
        engine = OllamaEngine(http(server))
        assert [offer.device for offer in await engine.look()] == ["cpu"]
        loaded = {"name": "m:latest", "digest": DIGEST, "size": 9, "size_vram": 9}
        for models, loaded_now in (([loaded], True), ([], False)):
            server.replies["/api/ps"] = json({"models": models})
            (offer,) = await engine.look()
            assert (offer.device, offer.loaded is not None) == ("gpu", loaded_now)


async def test_a_model_is_asked_for_by_the_name_that_it_has_now(autojump_clock: Clock) -> None:
    (tag,) = TAGS["models"]
    async with open_server() as server:
        server.replies |= {"/api/chat": stream(*CHAT)}
        engine = OllamaEngine(http(server))
        (offer,) = await engine.look()
        async with engine.open_model(ModelFile(DIGEST, offer.name, "", 9)) as model:
            await answered(model)
            assert server.body()["model"] == "m:latest"
            # Somebody kept it under another name, and pulled what its old one means now.
            kept, pulled = tag | {"name": "old:1", "model": "old:1"}, tag | {"digest": "e" * 64}
            server.replies["/api/tags"] = json({"models": [pulled, kept]})
            await engine.look()
            await answered(model)
            assert server.body()["model"] == "old:1"
            server.replies["/api/tags"] = json({"models": [pulled]})
            await engine.look()
            with pytest.raises(ModelNotFound):
                await answered(model)
